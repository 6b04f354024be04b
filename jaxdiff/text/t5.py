"""Captions to frozen T5 embeddings: the text box of Imagen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.tokenizer import Tokens, tokenize

BLOCK = 64
"""Captions per call of the compiled program; fewer are padded to the next power of two."""


class TextEmbedding(NamedTuple):
    """What a generator is conditioned on. Embeddings are zero wherever the mask is False."""

    embeddings: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen encoder: settings, parameters (the `shared` and `encoder` subtrees), tokenizer, tokens per caption."""

    config: T5Config
    params: dict
    tokenizer: PreTrainedTokenizerBase
    length: int


def encode(encoder: TextEncoder, captions: Sequence[str]) -> TextEmbedding:
    """Float32 embeddings (b, length, d_model) of `captions`.

    A blank caption becomes the null text: zeros, nothing to attend to. One that is too long is cut with a warning.
    """
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, not one string")
    tokens = tokenize(encoder.tokenizer, captions, encoder.length)
    written = np.array([bool(caption.strip()) for caption in captions], bool)
    return embed(encoder, Tokens(tokens.ids, tokens.mask & written[:, None]))


def null_text(encoder: TextEncoder, count: int) -> TextEmbedding:
    """The embedding of `count` captions that say nothing."""
    shape = (count, encoder.length)
    return TextEmbedding(jnp.zeros((*shape, encoder.config.d_model)), jnp.zeros(shape, bool))


def embed(encoder: TextEncoder, tokens: Tokens) -> TextEmbedding:
    """Embeddings of tokens, in blocks of one size so that the compiled program is reused."""
    if not len(tokens.ids):
        return null_text(encoder, 0)
    embeddings = in_blocks(partial(_embed, encoder.config, encoder.params), tokens.ids, tokens.mask)
    return TextEmbedding(embeddings, jnp.asarray(tokens.mask))


def in_blocks(program: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """What `program` makes of the rows of `arrays`, at least one, called with blocks of one size."""
    count = len(arrays[0])
    block = min(BLOCK, 1 << (count - 1).bit_length())
    arrays = tuple(np.pad(array, ((0, -count % block), (0, 0))) for array in arrays)
    parts = [program(*(array[i : i + block] for array in arrays)) for i in range(0, len(arrays[0]), block)]
    return jax.tree.map(lambda *leaves: (leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves))[:count], *parts)


@partial(jax.jit, static_argnums=0)
def _embed(config: T5Config, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    return jnp.where(mask[..., None], T5Encoder(config).apply({"params": params}, ids, mask), 0.0)

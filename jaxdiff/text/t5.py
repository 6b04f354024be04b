"""Captions to frozen T5 embeddings: the text box of Imagen."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from jaxdiff.core.messages import quoted
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.tokenizer import Tokens, tokenize

BLOCK = 64
"""Captions per call of the compiled program; fewer are padded to the next power of two."""


@dataclass(frozen=True, eq=False)
class T5TextEncoder:
    """A frozen encoder: settings, parameters (the `shared` and `encoder` subtrees), tokenizer, tokens per caption.

    whole: what the encoder says of padding counts too, and a blank caption is one like any other (DeepFloyd IF);
    otherwise both are zeros that are masked. prepare: done with each caption before it is cut into tokens.
    """

    config: T5Config
    params: dict
    tokenizer: PreTrainedTokenizerBase
    length: int
    whole: bool = False
    prepare: Callable[[str], str] = str

    @property
    def width(self) -> int:
        return self.config.d_model


@dataclass(frozen=True, eq=False)
class EmbeddedCaptions:
    """Captions that an encoder has embedded before, in its place: it need not be in memory when pictures are drawn.

    made_by: what says which encoder it was.
    """

    captions: tuple[str, ...]
    embedding: TextEmbedding
    whole: bool = False
    made_by: str = ""

    @property
    def width(self) -> int:
        return self.embedding.tokens.shape[2]

    @property
    def length(self) -> int:
        return self.embedding.tokens.shape[1]


def embed_captions(encoder: T5TextEncoder, captions: Sequence[str], made_by: str = "") -> EmbeddedCaptions:
    """Each caption once, and the empty one."""
    each = tuple(dict.fromkeys(["", *captions]))
    # On the host, so that nothing of it stays on the encoder's devices.
    return EmbeddedCaptions(each, jax.tree.map(np.asarray, encode(encoder, each)), encoder.whole, made_by)


def encode(encoder: T5TextEncoder | EmbeddedCaptions, captions: Sequence[str]) -> TextEmbedding:
    """Float32 embeddings (b, length, width) of `captions`.

    A blank caption becomes the null text: zeros, nothing to attend to; or the embedding of the empty one, where the
    encoder's are `whole`. One that is too long is cut with a warning. ValueError for a caption that was not embedded.
    """
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, not one string")
    if isinstance(encoder, EmbeddedCaptions):
        return _found(encoder, captions)
    tokens = tokens_of(encoder, captions)
    if encoder.whole:
        return TextEmbedding(_in_blocks(encoder, tokens), jnp.ones(tokens.mask.shape, bool))
    return embed(encoder, tokens)


def tokens_of(encoder: T5TextEncoder, captions: Sequence[str]) -> Tokens:
    """What the encoder reads of `captions`; nothing of a blank one, unless its embeddings are `whole`."""
    prepared = [encoder.prepare(caption) for caption in captions]
    emptied = [before for before, after in zip(captions, prepared) if before.strip() and not after.strip()]
    if emptied:
        warnings.warn(
            f"nothing is left of {quoted(emptied[0], 200)} after cleaning: it is taken for an empty caption",
            stacklevel=3,
        )
    tokens = tokenize(encoder.tokenizer, prepared, encoder.length, encoder.config.vocab)
    written = np.array([encoder.whole or bool(caption.strip()) for caption in captions], bool)
    return Tokens(tokens.ids, tokens.mask & written[:, None])


def _found(embedded: EmbeddedCaptions, captions: Sequence[str]) -> TextEmbedding:
    places = {caption: place for place, caption in enumerate(embedded.captions)}
    lacking = [caption for caption in captions if caption not in places]
    if lacking:
        raise ValueError(f"no embedding of {quoted(lacking[0], 200)} among those of {len(places)} captions")
    rows = np.array([places[caption] for caption in captions], int)
    return jax.tree.map(lambda array: jnp.asarray(array[rows]), embedded.embedding)


def null_text(encoder: T5TextEncoder, count: int) -> TextEmbedding:
    """The embedding of `count` captions that say nothing."""
    shape = (count, encoder.length)
    return TextEmbedding(jnp.zeros((*shape, encoder.config.d_model)), jnp.zeros(shape, bool))


def embed(encoder: T5TextEncoder, tokens: Tokens) -> TextEmbedding:
    """Embeddings of tokens, in blocks of one size so that the compiled program is reused."""
    if not len(tokens.ids):
        return null_text(encoder, 0)
    embeddings = _in_blocks(encoder, tokens)
    return TextEmbedding(jnp.where(tokens.mask[..., None], embeddings, 0.0), jnp.asarray(tokens.mask))


def _in_blocks(encoder: T5TextEncoder, tokens: Tokens) -> Float[Array, "b n d"]:
    return in_blocks(partial(_embed, encoder.config, encoder.params), tokens.ids, tokens.mask)


def in_blocks(program: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """What `program` makes of the rows of `arrays`, at least one, called with blocks of one size."""
    count = len(arrays[0])
    block = min(BLOCK, 1 << (count - 1).bit_length())
    arrays = tuple(np.pad(array, ((0, -count % block), (0, 0))) for array in arrays)
    parts = [program(*(array[i : i + block] for array in arrays)) for i in range(0, len(arrays[0]), block)]
    return jax.tree.map(lambda *leaves: (leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves))[:count], *parts)


@partial(jax.jit, static_argnums=0)
def _embed(config: T5Config, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    return cast(Array, T5Encoder(config).apply({"params": params}, ids, mask))
T5TextEncoder.encode = lambda self, c: encode(self, c)  # TEMP
T5TextEncoder.padding_is_read = property(lambda s: s.whole)  # TEMP
EmbeddedCaptions.encode = lambda self, c: encode(self, c)  # TEMP
EmbeddedCaptions.padding_is_read = property(lambda s: s.whole)  # TEMP

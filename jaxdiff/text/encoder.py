"""What every text encoder is to its callers: captions in, a `TextEmbedding` out. And what all of them are made with."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.core.settings import canonical
from jaxdiff.core.trees import update_digest
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens

BLOCK = 64
"""Captions per call of the compiled program; fewer are padded to the next power of two."""


class TextEmbedding(NamedTuple):
    """Captions as a generator reads them. Tokens are zero wherever the mask is False.

    tokens: states of the encoder, one per token. mask: True for the tokens that are attended to. pooled: one vector per
    caption, where the encoder has one. ids: what the tokenizer made of the captions, where there is one tokenizer.
    """

    tokens: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]
    pooled: Float[Array, "b e"] | None = None
    ids: Int[Array, "b n"] | None = None


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder, the same to all who call it."""

    @property
    def width(self) -> int:
        """d of `TextEmbedding.tokens`."""
        ...

    @property
    def length(self) -> int:
        """n of `TextEmbedding.tokens`: tokens per caption, padding included."""
        ...

    @property
    def padding_is_read(self) -> bool:
        """The mask is True everywhere: padding and blank captions are read like other text."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest that changes with anything that changes the embeddings, and with nothing else: weights, tokenizer,
        settings. The same in every process."""
        ...

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Float32 embeddings of `captions`, which may be none. One that is too long is cut with a warning.

        ValueError for one string in place of a list.
        """
        ...


@runtime_checkable
class NetworkTextEncoder(TextEncoder, Protocol):
    """A text encoder that is one tokenizer and one network: its two steps can be taken apart (`text/bulk.py`)."""

    @property
    def params(self) -> dict: ...

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """The first step, on the host: ids of `length` tokens per caption, and which of them are not padding."""
        ...

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """The second step."""
        ...

    def states(self, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        """The network alone, to be compiled by the caller, for any n up to `length`. States of padding are not zero."""
        ...


def caption_list(captions: Sequence[str]) -> list[str]:
    """ValueError for one string, whose characters would else be taken for captions."""
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, not one string")
    return list(captions)


def fingerprint_of(settings: Any, tokenizer: PreTrainedTokenizerBase, params: dict) -> str:
    """16 hexadecimal digits that change with the settings, the vocabulary and the parameters of an encoder."""
    digest = hashlib.blake2b(canonical(settings), digest_size=8)
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    update_digest(digest, params)
    return digest.hexdigest()


def in_blocks(program: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """`program` of the rows of `arrays`, called with blocks of one size: one compiled program serves them all."""
    count = len(arrays[0])
    if not count:
        row = [jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for array in arrays]
        return jax.tree.map(lambda a: jnp.zeros((0, *a.shape[1:]), a.dtype), jax.eval_shape(program, *row))
    block = min(BLOCK, 1 << (count - 1).bit_length())
    arrays = tuple(np.pad(array, ((0, -count % block), (0, 0))) for array in arrays)
    blocks = [program(*(array[i : i + block] for array in arrays)) for i in range(0, len(arrays[0]), block)]
    return jax.tree.map(lambda *leaves: (leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves))[:count], *blocks)

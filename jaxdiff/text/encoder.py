"""The protocol of text encoders: captions in, a `TextEmbedding` out. And their shared helpers."""

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
    """Embedded captions. Tokens are zero wherever the mask is False.

    tokens: states of the encoder, one per token. mask: True for the tokens that are attended to. pooled: one vector per
    caption; None if the encoder has none. ids: token ids; None unless there is exactly one tokenizer.
    """

    tokens: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]
    pooled: Float[Array, "b e"] | None = None
    ids: Int[Array, "b n"] | None = None


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder."""

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
        """Whether the mask is True everywhere, so that padding and blank captions are read like other text."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of everything that affects the embeddings (weights, tokenizer, settings), and nothing else. The same
        in every process."""
        ...

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Float32 embeddings of `captions`, which may be empty. Long captions are truncated with a warning.

        ValueError for a string instead of a list.
        """
        ...


@runtime_checkable
class NetworkTextEncoder(TextEncoder, Protocol):
    """A text encoder with one tokenizer and one network, as two separate steps (`text/bulk.py`)."""

    @property
    def params(self) -> dict: ...

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """The first step, on the host: ids of `length` tokens per caption, and their padding mask."""
        ...

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """The second step."""
        ...

    def states(self, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        """The network only, to be compiled by the caller, for any n up to `length`. States of padding are not zero."""
        ...


def caption_list(captions: Sequence[str]) -> list[str]:
    """`captions` as a list. ValueError for a string, whose characters would otherwise become captions."""
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, not one string")
    return list(captions)


def fingerprint_of(settings: Any, tokenizer: PreTrainedTokenizerBase, params: dict) -> str:
    """A digest of an encoder's settings, vocabulary and parameters: 16 hexadecimal digits."""
    digest = hashlib.blake2b(canonical(settings), digest_size=8)
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    update_digest(digest, params)
    return digest.hexdigest()


def in_blocks(program: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """Apply `program` to the rows of `arrays` in blocks of one size, so that it is compiled only once."""
    count = len(arrays[0])
    if not count:
        row = [jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for array in arrays]
        return jax.tree.map(lambda a: jnp.zeros((0, *a.shape[1:]), a.dtype), jax.eval_shape(program, *row))
    block = min(BLOCK, 1 << (count - 1).bit_length())
    arrays = tuple(np.pad(array, ((0, -count % block), (0, 0))) for array in arrays)
    blocks = [program(*(array[i : i + block] for array in arrays)) for i in range(0, len(arrays[0]), block)]
    return jax.tree.map(lambda *leaves: (leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves))[:count], *blocks)

"""What every text encoder is to its callers: captions in, a `TextEmbedding` out."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int


class TextEmbedding(NamedTuple):
    """Captions as a generator reads them.

    tokens: states of the encoder, one per token. mask: True for the tokens that are attended to. pooled: one vector per
    caption, where the encoder has one. ids: what the tokenizer made of the captions, where the encoder has one.
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
        """d of `tokens`."""
        ...

    @property
    def length(self) -> int:
        """n of `tokens`: tokens per caption."""
        ...

    @property
    def padding_is_read(self) -> bool:
        """Padding counts as tokens and a blank caption is encoded like any other: `mask` is True everywhere."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest that changes with anything that changes the embeddings; the same in every process."""
        ...

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """The embeddings of `captions`, float32. ValueError for one string in place of a list."""
        ...

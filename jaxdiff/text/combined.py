"""Several text encoders as one: Stable Diffusion XL (two), Stable Diffusion 3 (three)."""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp

from jaxdiff.core.settings import canonical
from jaxdiff.text.encoder import TextEmbedding, TextEncoder, caption_list


class Axis(enum.Enum):
    """The axis of `TextEmbedding.tokens` (b n d) for concatenation."""

    TOKENS = 1
    """Along the sequence; narrower embeddings are zero-padded to the widest (Stable Diffusion 3)."""
    FEATURES = 2
    """Along the features; all encoders have the same number of tokens (Stable Diffusion XL)."""


@dataclass(frozen=True, eq=False)
class CombinedTextEncoder:
    """Concatenates the embeddings of all `encoders` along an axis, and their pooled vectors, if any.

    Along the features, the mask is the union of the encoders' masks. An encoder may itself be combined: Stable
    Diffusion 3 is `CombinedTextEncoder((CombinedTextEncoder((clip_l, clip_g), FEATURES), t5), TOKENS)`. `ids` is None,
    because each encoder has its own.
    """

    encoders: tuple[TextEncoder, ...]
    axis: Axis

    def __post_init__(self):
        if not self.encoders:
            raise ValueError("no text encoders to combine")
        lengths = [encoder.length for encoder in self.encoders]
        if self.axis is Axis.FEATURES and len(set(lengths)) > 1:
            raise ValueError(
                f"text encoders of {' and '.join(map(str, lengths))} tokens cannot be combined along the features"
            )

    @property
    def width(self) -> int:
        widths = [encoder.width for encoder in self.encoders]
        return sum(widths) if self.axis is Axis.FEATURES else max(widths)

    @property
    def length(self) -> int:
        lengths = [encoder.length for encoder in self.encoders]
        return lengths[0] if self.axis is Axis.FEATURES else sum(lengths)

    @property
    def padding_is_read(self) -> bool:
        read = [encoder.padding_is_read for encoder in self.encoders]
        return any(read) if self.axis is Axis.FEATURES else all(read)

    @cached_property
    def fingerprint(self) -> str:
        settings = self.axis, [encoder.fingerprint for encoder in self.encoders]
        return hashlib.blake2b(canonical(settings), digest_size=8).hexdigest()

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        captions = caption_list(captions)
        each = [encoder.encode(captions) for encoder in self.encoders]
        pooled = [embedding.pooled for embedding in each if embedding.pooled is not None]
        tokens = [embedding.tokens for embedding in each]
        if self.axis is Axis.FEATURES:
            mask = jnp.stack([embedding.mask for embedding in each]).any(0)
        else:
            tokens = [jnp.pad(array, ((0, 0), (0, 0), (0, self.width - array.shape[2]))) for array in tokens]
            mask = jnp.concatenate([embedding.mask for embedding in each], 1)
        return TextEmbedding(
            jnp.concatenate(tokens, self.axis.value), mask, jnp.concatenate(pooled, 1) if pooled else None
        )

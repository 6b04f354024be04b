"""Several text encoders as one: Stable Diffusion XL's two, Stable Diffusion 3's three."""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp

from jaxdiff.core.settings import canonical
from jaxdiff.text.encoder import TextEmbedding, TextEncoder, caption_list


class Axis(enum.Enum):
    """Which axis of `TextEmbedding.tokens` (b n d) the encoders share."""

    TOKENS = 1
    """One encoder's tokens behind another's; narrower ones are padded with zeros to the widest (Stable Diffusion 3)."""
    FEATURES = 2
    """Side by side, token by token: all encoders give the same number of tokens (Stable Diffusion XL)."""


@dataclass(frozen=True, eq=False)
class CombinedTextEncoder:
    """The embeddings of all `encoders`, concatenated along an axis; so are the pooled vectors of those that have one.

    Side by side, a token is attended to where any of its encoders attends to it. An encoder may itself be combined:
    Stable Diffusion 3 is `CombinedTextEncoder((CombinedTextEncoder((clip_l, clip_g), FEATURES), t5), TOKENS)`. `ids` is
    None: each encoder has its own.
    """

    encoders: tuple[TextEncoder, ...]
    axis: Axis

    def __post_init__(self):
        if not self.encoders:
            raise ValueError("no text encoders to combine")
        lengths = [encoder.length for encoder in self.encoders]
        if self.axis is Axis.FEATURES and len(set(lengths)) > 1:
            raise ValueError(f"text encoders of {' and '.join(map(str, lengths))} tokens cannot stand side by side")

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

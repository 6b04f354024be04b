"""How unCLIP's decoders read the embedding of an image: text readers (`nets/conditioning.py: TextReader`).

The embedding is the last token of the conditioning, masked where there is none.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.blocks import Dtype
from jaxdiff.nets.conditioning import TextRead


@dataclass(frozen=True)
class TextWithImage:
    """unCLIP's decoder (arXiv 2204.06125, 2.1): a caption's tokens, then the embedding of an image.

    The embedding is projected to `extra` tokens before the caption's and to a vector; a learned embedding replaces a
    masked one. The caption's tokens are projected to `width` and normalized. With a mask of None there is an embedding.
    """

    width: int = 1536
    extra: int = 4

    def read(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, features: int, dtype: Dtype
    ) -> TextRead:
        mask = jnp.ones(tokens.shape[:2], bool) if mask is None else mask
        context = ImageContext(self.width, self.extra, features, dtype, name="text")
        return context(tokens[:, :-1], mask[:, :-1], tokens[:, -1], mask[:, -1])


class ImageContext(nn.Module):
    """The layers of `TextWithImage`. known (b): where there is an embedding of an image."""

    width: int
    extra: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "b n d"],
        mask: Bool[Array, "b n"],
        image: Float[Array, "b d"],
        known: Bool[Array, " b"],
    ) -> TextRead:
        null = self.param("null", nn.initializers.zeros, image.shape[-1:])
        image = jnp.where(known[:, None], image, null).astype(self.dtype)
        vector = nn.Dense(self.features, dtype=self.dtype, name="image_vector")(image)
        extra = nn.Dense(self.extra * self.width, dtype=self.dtype, name="image_tokens")(image)
        # The tokens' numbers alternate, as in Karlo: those of one token are `extra` apart.
        extra = extra.reshape(-1, self.width, self.extra).swapaxes(1, 2)
        text = nn.Dense(self.width, dtype=self.dtype, name="states")(text)
        text = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(text)
        always = jnp.ones((len(mask), self.extra), bool)
        return TextRead(jnp.concatenate([extra, text], 1), jnp.concatenate([always, mask], 1), vector)


@dataclass(frozen=True)
class ImageTokens:
    """Kandinsky 2.2's decoder: the embedding of an image alone, projected to `count` tokens of `width` and to a vector,
    both normalized. A null embedding among the parameters replaces a masked one, as in `TextWithImage`; Kandinsky's is
    that of an empty image.
    """

    width: int = 768
    count: int = 32

    def read(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, features: int, dtype: Dtype
    ) -> TextRead:
        known = jnp.ones(tokens.shape[:1], bool) if mask is None else mask[:, -1]
        return ProjectedImage(self.width, self.count, features, dtype, name="text")(tokens[:, -1], known)


class ProjectedImage(nn.Module):
    """The layers of `ImageTokens`."""

    width: int
    count: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b d"], known: Bool[Array, " b"]) -> TextRead:
        null = self.param("null", nn.initializers.zeros, image.shape[-1:])
        image = jnp.where(known[:, None], image, null).astype(self.dtype)
        tokens = nn.Dense(self.count * self.width, dtype=self.dtype, name="tokens")(image)
        tokens = nn.LayerNorm(1e-5, dtype=self.dtype, name="tokens_norm")(tokens.reshape(-1, self.count, self.width))
        vector = nn.Dense(self.features, dtype=self.dtype, name="vector")(image)
        return TextRead(tokens, None, nn.LayerNorm(1e-5, dtype=self.dtype, name="vector_norm")(vector))

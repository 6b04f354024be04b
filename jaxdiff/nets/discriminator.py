"""The patch discriminator of an autoencoder (PatchGAN, arXiv 1611.07004): one logit per patch of an image.

Batch norm is replaced by group norm, so that no sample depends on the others of its batch.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets.blocks import Norm, to_float32


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Settings. The defaults are those of latent diffusion; a logit then depends on 70×70 pixels.

    channels: width of the first layer, doubled by each of `layers` up to eightfold. layers: convolutions that halve the
    image. norm: normalize between the first and the last layer.
    """

    channels: int = 64
    layers: int = 3
    norm: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def least_side(self) -> int:
        """The side of the smallest images with at least one logit."""
        return 3 * 2**self.layers


class Discriminator(nn.Module):
    """Strided 4×4 convolutions with leaky ReLUs, then two convolutions without stride."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2"]:
        """Images in [-1, 1] → logits, float32. ValueError for images without a patch."""
        config = self.config
        if min(x.shape[1:3]) < config.least_side:
            raise ValueError(f"a discriminator of {config.layers} layers needs images of {config.least_side} pixels")
        x = x.astype(config.dtype)
        for layer in range(config.layers + 1):
            strides = 2 if layer < config.layers else 1
            x = self._conv(config.channels * min(2**layer, 8), strides, f"conv_{layer}")(x)
            if layer and config.norm:
                x = Norm(config.dtype, name=f"norm_{layer}")(x)
            x = nn.leaky_relu(x, 0.2)
        return to_float32(self._conv(1, 1, "head")(x)[..., 0])

    def _conv(self, channels: int, strides: int, name: str) -> nn.Conv:
        init = jax.nn.initializers.normal(0.02)
        padding = ((1, 1), (1, 1))
        return nn.Conv(channels, (4, 4), strides, padding, dtype=self.config.dtype, kernel_init=init, name=name)


def init(config: DiscriminatorConfig, key: Array, channels: int = 3) -> dict:
    """Initial float32 parameters for images of `channels`."""
    return Discriminator(config).init(key, jnp.zeros((1, config.least_side, config.least_side, channels)))["params"]

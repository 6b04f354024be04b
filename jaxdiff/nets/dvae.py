"""The discrete variational autoencoder of DALL·E 1 (arXiv 2102.12092, 2.1 and A.1).

An encoder maps images to logits over a codebook, `stride` times smaller; a decoder maps one-hot or relaxed codes to the
parameters of a logit-Laplace distribution of each pixel. With the default settings these are OpenAI's published
networks (`weights/dvae.py`).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.nets.blocks import Dtype
from jaxdiff.nets.execution import HOW

MARGIN = 0.1
"""ε of `to_unit`: the logit-Laplace distribution has no mass at 0 and 1."""


@dataclass(frozen=True)
class DVAEConfig:
    """Settings of a dVAE. The defaults are those of the published one.

    codes: size of the codebook. hidden: width of the finest level. multipliers: width of each level relative to it, the
    finest first; each level after the first halves the image. blocks: residual blocks per level. code_width: width of
    the decoder's embedding of a code. residual_gain: the factor on each block's residual path; None: 1 / (number of
    blocks)², as published.
    dtype: compute type; the logits, the embedding of codes and the outputs are float32, as published. remat: recompute
    every block in the backward pass.
    """

    codes: int = 8192
    hidden: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks: int = 2
    code_width: int = 128
    residual_gain: float | None = None
    image_channels: int = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = field(default=False, metadata=HOW)

    def __post_init__(self):
        if not self.multipliers or self.blocks < 1:
            raise ValueError("a dVAE needs at least one level, and a block on each")
        for multiplier in self.multipliers:
            if self.hidden * multiplier % 4:
                raise ValueError(f"a level of {self.hidden * multiplier} channels: a block needs a multiple of 4")

    def module(self) -> "DVAE":
        return DVAE(self)

    @property
    def stride(self) -> int:
        """Pixels per code, along each axis. Image sides must be multiples of it."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def gain(self) -> float:
        """The factor on each block's residual path."""
        if self.residual_gain is not None:
            return self.residual_gain
        return 1.0 / (len(self.multipliers) * self.blocks) ** 2


class DVAE(nn.Module):
    """Encoder and decoder. Parameters: `encoder`, `decoder`."""

    config: DVAEConfig

    def setup(self) -> None:
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """For initialization: decodes the softmax of the logits."""
        return self.decode(nn.softmax(self.encode(image)))

    def encode(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        """The logits of each code's categorical distribution. image: in the range of `to_unit`."""
        return self.encoder(image)

    def decode(self, codes: Float[Array, "b h2 w2 k"]) -> Float[Array, "b h w c2"]:
        """Means, then logarithms of the scales, of the pixels' logits (`logit_laplace`). codes: weights of the
        codebook's entries, one-hot or relaxed."""
        return self.decoder(codes)

    def decode_indices(self, indices: Int[Array, "b h2 w2"]) -> Float[Array, "b h w c2"]:
        """`decode` of one-hot codes, by a table lookup."""
        return self.decoder.of_indices(indices)


def initializer(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Normal with variance 1 / fan-in, as published (flax's `lecun_normal` truncates)."""
    fan_in = shape[0] * shape[1] * shape[2]
    return jax.random.normal(key, shape, dtype) * fan_in**-0.5


def conv(features: int, size: int, dtype: Dtype, name: str | None = None) -> nn.Conv:
    return nn.Conv(features, (size, size), dtype=dtype, kernel_init=initializer, name=name)


class Block(nn.Module):
    """x + gain · four convolutions of relu, through a quarter of the width. sizes: of their kernels. The residual path
    is a 1×1 convolution if the width changes."""

    features: int
    sizes: tuple[int, int, int, int]
    gain: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        y = x
        widths = *(self.features // 4,) * 3, self.features
        for number, (width, size) in enumerate(zip(widths, self.sizes), 1):
            y = conv(width, size, self.dtype, name=f"conv_{number}")(nn.relu(y))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, name="shortcut")(x)
        return x + self.gain * y


class Encoder(nn.Module):
    config: DVAEConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        config = self.config
        block = nn.remat(Block) if config.remat else Block
        x = conv(config.hidden, 7, config.dtype, name="stem")(image.astype(config.dtype))
        for level, multiplier in enumerate(config.multipliers):
            if level:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for number in range(config.blocks):
                name = f"level_{level}_{number}"
                x = block(config.hidden * multiplier, (3, 3, 3, 1), config.gain, config.dtype, name=name)(x)
        return conv(config.codes, 1, jnp.float32, name="head")(nn.relu(x).astype(jnp.float32))


class Decoder(nn.Module):
    config: DVAEConfig

    def setup(self) -> None:
        config = self.config
        block = nn.remat(Block) if config.remat else Block
        # Its input is one of the codes, not their sum: with a deviation of 1 / √codes all codes would begin as one.
        table = nn.initializers.normal(1.0)
        self.stem = nn.Conv(config.code_width, (1, 1), dtype=jnp.float32, kernel_init=table)
        self.levels = [
            [
                block(config.hidden * multiplier, (1, 3, 3, 3), config.gain, config.dtype, name=f"level_{level}_{i}")
                for i in range(config.blocks)
            ]
            for level, multiplier in reversed(list(enumerate(config.multipliers)))
        ]
        self.head = conv(2 * config.image_channels, 1, jnp.float32)

    def __call__(self, codes: Float[Array, "b h2 w2 k"]) -> Float[Array, "b h w c2"]:
        return self._rest(self.stem(codes.astype(jnp.float32)))

    def of_indices(self, indices: Int[Array, "b h2 w2"]) -> Float[Array, "b h w c2"]:
        stem = self.stem.variables["params"]
        return self._rest(stem["kernel"][0, 0][indices] + stem["bias"])

    def _rest(self, x: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c2"]:
        x = x.astype(self.config.dtype)
        for number, level in enumerate(self.levels):
            if number:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
            for block in level:
                x = block(x)
        return self.head(nn.relu(x).astype(jnp.float32))


def to_unit(image: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """[-1, 1] → [ε, 1 − ε], the range in which the networks work (A.1)."""
    return (1.0 - 2.0 * MARGIN) * 0.5 * (image + 1.0) + MARGIN


def from_unit(pixels: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The inverse of `to_unit`, clipped to [-1, 1]."""
    return jnp.clip(2.0 * (pixels - MARGIN) / (1.0 - 2.0 * MARGIN) - 1.0, -1.0, 1.0)


def reconstruction(stats: Float[Array, "b h w c2"]) -> Float[Array, "b h w c"]:
    """The image in [-1, 1] of the decoder's output: the sigmoid of the means."""
    return from_unit(nn.sigmoid(jnp.split(stats, 2, axis=-1)[0]))


def logit_laplace(
    stats: Float[Array, "b h w c2"], image: Float[Array, "b h w c"], least_scale: float = 0.0
) -> Float[Array, "b h w c"]:
    """The log-density of each value of an image in [-1, 1], in the range of `to_unit` (Eq. 2 of A.3).

    With μ and ln b from `stats`, and x in (0, 1): −|logit x − μ| / b − ln(2 b x (1 − x)). b is at least `least_scale`.
    """
    mean, log_scale = jnp.split(stats, 2, axis=-1)
    if least_scale:
        log_scale = jnp.maximum(log_scale, math.log(least_scale))
    x = to_unit(image)
    logit = jnp.log(x) - jnp.log1p(-x)
    return -jnp.abs(logit - mean) * jnp.exp(-log_scale) - log_scale - jnp.log(2.0 * x * (1.0 - x))

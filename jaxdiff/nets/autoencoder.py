"""The convolutional autoencoder of latent diffusion (arXiv 2112.10752, 3.1 and G; VQGAN, arXiv 2012.09841).

An encoder maps images to a grid of codes, `stride` times smaller, and a decoder maps codes to images. The bottleneck is
a diagonal Gaussian per code (KL) or the nearest entry of a codebook (VQ). With the published settings these are the
networks of Stable Diffusion and of the paper's VQ models; `weights/autoencoder.py` reads them.

To process large images in tiles, both networks run in two parts: the fine levels, at high resolution and without
attention, and the coarse levels, which are small enough for the entire image. In tiles, `Region` supplies what group
norms need to know about the rest of the image.
"""

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.nets import blocks
from jaxdiff.nets.attention import attention
from jaxdiff.nets.autoencoder_norms import Region, normalized
from jaxdiff.nets.blocks import Dtype, Resample
from jaxdiff.nets.execution import HOW

LOGVAR = -30.0, 20.0
"""The range of the log-variance of a code."""
LARGEST_LOGITS = 2**24
"""Attention with more logits per image than this computes a part of the queries at a time."""


@dataclass(frozen=True)
class KLBottleneck:
    """Each code is a diagonal Gaussian: the encoder returns means and log-variances."""


@dataclass(frozen=True)
class VQBottleneck:
    """Each code is the nearest of `codes` vectors of `width`."""

    codes: int = 8192
    width: int = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of an autoencoder. The defaults are those of Stable Diffusion: KL, stride 8.

    channels: width of each level, the finest first; each level after the first halves the image. blocks: residual
    blocks of a level in the encoder; the decoder has one more. latent_channels: output channels of the encoder, for KL
    of the mean alone. attention_levels: levels with attention after each residual block. middle_attention: attention
    at the lowest resolution, between two blocks. norm_groups: groups of channels that are normalized together, over the
    entire image; 0: layer norm, of all channels at each pixel by itself, so that a code depends on its surroundings
    alone (not in the published networks). local_encoder: the encoder has 1×1 convolutions, and 2×2 ones where it halves
    the image, so that with layer norm a code depends on its own pixels alone (not in the published networks either).
    quant_conv, post_quant_conv: 1×1 convolutions before and after the bottleneck. spatial_norm: the code scales and
    shifts every norm of the decoder (MoVQ, of Kandinsky).
    dtype: compute type; statistics and outputs are float32. remat: recompute every block in the backward pass.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    bottleneck: KLBottleneck | VQBottleneck = KLBottleneck()
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    norm_groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    spatial_norm: bool = False
    local_encoder: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = field(default=False, metadata=HOW)

    def __post_init__(self):
        if not self.channels:
            raise ValueError("an autoencoder needs at least one level: channels is empty")
        if self.norm_groups < 0:
            raise ValueError(f"norm_groups {self.norm_groups}: at least 0")
        for width in self.channels:
            if self.norm_groups and width % self.norm_groups:
                raise ValueError(f"a level of {width} channels cannot be normalized in {self.norm_groups} groups")
        outside = [level for level in self.attention_levels if not 0 <= level < len(self.channels)]
        if outside:
            raise ValueError(f"attention_levels has {outside[0]}, and there are {len(self.channels)} levels from 0")
        convolved = self.quant_conv and self.post_quant_conv
        if not convolved and self.code_channels != self.latent_channels:
            raise ValueError(
                f"codes of width {self.code_channels} for {self.latent_channels} latent channels need both convolutions"
            )

    def module(self) -> "Autoencoder":
        return Autoencoder(self)

    @property
    def stride(self) -> int:
        """Pixels per code, along each axis. Image sides must be multiples of it."""
        return 2 ** (len(self.channels) - 1)

    @property
    def code_channels(self) -> int:
        """Channels of the codes that the decoder takes."""
        return self.bottleneck.width if isinstance(self.bottleneck, VQBottleneck) else self.latent_channels

    @property
    def coarse_level(self) -> int:
        """The finest level of the coarse part: the finest with attention, or the last level."""
        return min(self.attention_levels, default=len(self.channels) - 1)

    @property
    def encoder_reach(self) -> int:
        """How far, in features of the coarse level, the pixels lie that a feature of the fine part depends on."""
        if self.local_encoder:
            return 0
        pixels = 1 + sum((2 * self.blocks + 2) * 2**level for level in range(self.coarse_level))
        return -(-pixels // 2**self.coarse_level)

    @property
    def decoder_reach(self) -> int:
        """How far, in features of the coarse level, the features lie that a pixel depends on in the fine part."""
        pixels = 1 + sum((2 * self.blocks + 3) * 2**level for level in range(self.coarse_level))
        return -(-pixels // 2**self.coarse_level) + 1  # repetition reaches one further


class Part(enum.Enum):
    """The part of the encoder or decoder to run. The encoder runs the fine part first, the decoder last."""

    ALL = "all"
    FINE = "fine"
    COARSE = "coarse"


class Gaussian(NamedTuple):
    """Means and clamped log-variances of codes."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]


def gaussian(moments: Float[Array, "b h w c2"]) -> Gaussian:
    """The distribution in the encoder's output."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Gaussian(mean, jnp.clip(logvar, *LOGVAR))


def nearest(code: Float[Array, "b h w c"], codebook: Float[Array, "k c"]) -> Int[Array, "b h w"]:
    """The index of the nearest entry for each code, the first of equal ones. No gradient."""
    code, codebook = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (code, codebook))
    lengths = (codebook**2).sum(-1)

    def index(vector: Array) -> Array:
        # In full precision: a matrix product in TF32 or bfloat16 selects other entries.
        return jnp.argmin(lengths - 2.0 * jnp.dot(codebook, vector, precision=jax.lax.Precision.HIGHEST))

    rows = max(1, LARGEST_LOGITS // len(codebook))
    return jax.lax.map(index, code.reshape(-1, code.shape[-1]), batch_size=rows).reshape(code.shape[:-1])


def quantize(
    code: Float[Array, "b h w c"], codebook: Float[Array, "k c"]
) -> tuple[Float[Array, "b h w c"], Int[Array, "b h w"]]:
    """The nearest entries, and their indices."""
    indices = nearest(code, codebook)
    return codebook[indices], indices


def init(config: AutoencoderConfig, key: Key[Array, ""]) -> dict:
    """Initial float32 parameters: `encoder`, `decoder`, `quant`, `post_quant`, and for VQ the `codebook` (k c),
    uniform in ±1/k (taming's)."""
    network_key, code_key = jax.random.split(key)
    image = jnp.zeros((1, config.stride, config.stride, config.image_channels))
    params = dict(config.module().init(network_key, image)["params"])
    if isinstance(config.bottleneck, VQBottleneck):
        codes, width = config.bottleneck.codes, config.bottleneck.width
        params["codebook"] = jax.random.uniform(code_key, (codes, width), minval=-1.0 / codes, maxval=1.0 / codes)
    return params


class ResidualBlock(nn.Module):
    """Twice norm, swish and 3×3 convolution, added to the input, after a 1×1 convolution if the width changes. size: of
    the convolutions."""

    channels: int
    groups: int
    dtype: Dtype
    size: int = 3

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        region: Region | None = None,
        code: Float[Array, "b h3 w3 z"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        y = nn.silu(normalized((self.groups, self.dtype, "norm_1"), x, region, code))
        y = nn.Conv(self.channels, (self.size, self.size), dtype=self.dtype, name="conv_1")(y)
        y = nn.silu(normalized((self.groups, self.dtype, "norm_2"), y, region, code))
        y = nn.Conv(self.channels, (self.size, self.size), dtype=self.dtype, name="conv_2")(y)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """Attention of all pixels to all pixels, with one head, added to the input."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], code: Float[Array, "b h3 w3 z"] | None = None
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = normalized((self.groups, self.dtype, "norm"), x, None, code).reshape(b, h * w, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(y)[:, :, None] for name in "qkv")
        y = nn.Dense(c, dtype=self.dtype, name="out")(_attend(q, k, v)[:, :, 0])
        return x + y.reshape(x.shape)


def _attend(q: Array, k: Array, v: Array) -> Array:
    """Attention with a bounded number of logits at a time."""
    b, count = q.shape[:2]
    pieces = -(-(count**2) // LARGEST_LOGITS)
    pieces = next(number for number in range(pieces, count + 1) if count % number == 0)
    if pieces == 1:
        return attention(q, k, v)
    queries = jnp.moveaxis(q.reshape(b, pieces, count // pieces, *q.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(lambda piece: attention(piece, k, v), queries), 0, 1).reshape(q.shape)


class _Half(nn.Module):
    """Base class of encoder and decoder: blocks built from the settings. Levels are numbered from the finest. code: for
    the decoder's norms, if they read it."""

    config: AutoencoderConfig

    @property
    def size(self) -> int:
        """Of the convolutions."""
        return 3

    def level(
        self, x: Array, level: int, way: str, count: int, region: Region | None = None, code: Array | None = None
    ) -> Array:
        """The blocks of one level. With attention, the level is in the coarse part, which has no region."""
        for i in range(count):
            name = f"{way}_{level}_{i}"
            x = self.block(x, self.config.channels[level], name, region, code)
            if level in self.config.attention_levels:
                x = self.attend(x, f"{name}_attention", code)
        return x

    def middle(self, x: Array, code: Array | None = None) -> Array:
        width = self.config.channels[-1]
        x = self.block(x, width, "middle_0", None, code)
        if self.config.middle_attention:
            x = self.attend(x, "middle_attention", code)
        return self.block(x, width, "middle_1", None, code)

    def head(self, x: Array, channels: int, region: Region | None = None, code: Array | None = None) -> Array:
        x = nn.silu(normalized((self.config.norm_groups, self.config.dtype, "head_norm"), x, region, code))
        self.sow("intermediates", "head_input", x)  # for gradients of the last layer
        return self.conv(x, channels, "head")

    def block(
        self, x: Array, channels: int, name: str, region: Region | None = None, code: Array | None = None
    ) -> Array:
        norm, dtype = self.config.norm_groups, self.config.dtype
        return self._remat(ResidualBlock)(channels, norm, dtype, self.size, name=name)(x, region, code)

    def attend(self, x: Array, name: str, code: Array | None = None) -> Array:
        return self._remat(AttentionBlock)(self.config.norm_groups, self.config.dtype, name=name)(x, code)

    def conv(self, x: Array, channels: int, name: str, size: int | None = None, **options: Any) -> Array:
        sizes = (size or self.size,) * 2
        return nn.Conv(channels, sizes, dtype=self.config.dtype, name=name, **options)(x)

    def _remat(self, module: Any) -> Any:
        return nn.remat(module) if self.config.remat else module


class Encoder(_Half):
    """From images to means and log-variances (KL) or codes (VQ), before the 1×1 convolution."""

    @property
    def size(self) -> int:
        return 1 if self.config.local_encoder else 3

    @nn.compact
    def __call__(self, x: Array, part: Part = Part.ALL, region: Region | None = None) -> Array:
        config, last = self.config, len(self.config.channels) - 1
        if part is not Part.COARSE:
            x = self.conv(x.astype(config.dtype), config.channels[0], "stem")
            for level in range(config.coarse_level):
                x = self.down(self.level(x, level, "down", config.blocks, region), level)
        if part is Part.FINE:
            return x
        for level in range(config.coarse_level, last + 1):
            x = self.level(x, level, "down", config.blocks)
            x = x if level == last else self.down(x, level)
        double = isinstance(config.bottleneck, KLBottleneck)
        return self.head(self.middle(x), config.latent_channels * (2 if double else 1))

    def down(self, x: Array, level: int) -> Array:
        """Halve the image; the published networks pad only its right and lower border."""
        channels, name = self.config.channels[level], f"down_{level}"
        if self.config.local_encoder:
            return self.conv(x, channels, name, 2, strides=2)
        return self.conv(x, channels, name, strides=2, padding=((0, 1), (0, 1)))


class Decoder(_Half):
    """From codes, after the 1×1 convolution, to images. code: before it, for norms that read it."""

    @nn.compact
    def __call__(
        self, x: Array, part: Part = Part.ALL, region: Region | None = None, code: Array | None = None
    ) -> Array:
        config, last = self.config, len(self.config.channels) - 1
        if part is not Part.FINE:
            x = self.middle(self.conv(x.astype(config.dtype), config.channels[-1], "stem"), code)
            for level in range(last, config.coarse_level - 1, -1):
                x = x if level == last else self.up(x, level + 1)
                x = self.level(x, level, "up", config.blocks + 1, None, code)
        if part is Part.COARSE:
            return x
        for level in range(config.coarse_level - 1, -1, -1):
            x = self.level(self.up(x, level + 1), level, "up", config.blocks + 1, region, code)
        return self.head(x, config.image_channels, region, code)

    def up(self, x: Array, level: int) -> Array:
        """Double the image by repetition, then a convolution."""
        return self.conv(blocks.resize(x, Resample.UP), self.config.channels[level], f"up_{level}")


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1×1 convolutions around the bottleneck. Outputs are float32."""

    config: AutoencoderConfig

    def setup(self):
        config = self.config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.quant_conv:
            double = isinstance(config.bottleneck, KLBottleneck)
            self.quant = nn.Conv(config.code_channels * (2 if double else 1), (1, 1), dtype=config.dtype)
        if config.post_quant_conv:
            self.post_quant = nn.Conv(config.latent_channels, (1, 1), dtype=config.dtype)

    def encode(
        self, x: Float[Array, "b h w c"], part: Part = Part.ALL, region: Region | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Images in [-1, 1] → means and log-variances (KL; see `gaussian`) or codes before quantization (VQ).

        part FINE: images → features of the coarse level, in the compute type. COARSE: these features → the result.
        """
        x = self.encoder(x, part, region)
        if part is Part.FINE:
            return x
        return blocks.to_float32(self.quant(x) if self.config.quant_conv else x)

    def decode(
        self, x: Float[Array, "b h w c"], part: Part = Part.ALL, region: Region | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Codes, after quantization → images. part COARSE: codes → features of the coarse level, in the compute type.
        FINE: these features → images. ValueError for a part of a decoder whose norms read the code."""
        code = x if self.config.spatial_norm else None
        if code is not None and part is not Part.ALL:
            raise ValueError("a decoder with spatial_norm reads the code at all levels: it does not run in parts")
        if part is not Part.FINE and self.config.post_quant_conv:
            x = self.post_quant(x.astype(self.config.dtype))
        x = self.decoder(x, part, region, code)
        return x if part is Part.COARSE else blocks.to_float32(x)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The image of the mean (KL) or of the codes without quantization (VQ); creates all parameters."""
        code = self.encode(x)
        return self.decode(gaussian(code).mean if isinstance(self.config.bottleneck, KLBottleneck) else code)

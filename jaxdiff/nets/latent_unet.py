"""The U-Net of latent diffusion (arXiv 2112.10752, SDXL: 2307.01952): residual blocks and spatial transformers.

It takes noised latents, a time and a `Conditioning`, and returns latents. Pixels attend to pixels, then to the tokens.
"""

from dataclasses import dataclass
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets.attention import attention
from jaxdiff.nets.blocks import Dtype, Norm, Resample, TimestepEmbedding, coordinates, resize, to_float32
from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning, add_residuals
from jaxdiff.nets.execution import ExecutionConfig, in_loop


@dataclass(frozen=True)
class LatentUNetConfig:
    """Settings of the latent U-Net. The defaults are those of Stable Diffusion 1.

    channels: width of the first level. multipliers: width of each level relative to it.
    blocks: residual blocks at each level of the down path; the up path has one more.
    transformer_layers: layers of the spatial transformer after each residual block of a level; 0: no attention there.
    middle_layers: layers of the transformer in the middle.
    heads: attention heads at each level; the middle has those of the last level.
    cross_only: levels whose first attention also reads the tokens, so that pixels do not attend to pixels.
    linear_projection: the transformer projects by matrix products, not by 1×1 convolutions: the same function, other
    shapes of the parameters.
    coordinates: add two input channels with the position in the image, as in `UNetConfig`. The public ones have none.
    scale_shift: the embedding of a residual block scales and shifts its second norm (ADM, arXiv 2105.05233, 5.2); off:
    it is added before it.
    level_entries: embed the noise level of the concatenated channels by a table with this many entries; 0: by sines.
    """

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)
    middle_layers: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_only: tuple[bool, ...] = (False, False, False, False)
    linear_projection: bool = False
    norm_groups: int = 32
    level_entries: int = 0
    coordinates: bool = False
    scale_shift: bool = False
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self):
        each = self.multipliers, self.blocks, self.transformer_layers, self.heads, self.cross_only
        if len(set(map(len, each))) != 1:
            raise ValueError(
                "multipliers, blocks, transformer_layers, heads and cross_only must have one entry per level"
            )
        for level, heads in enumerate(self.heads):
            attends = self.transformer_layers[level] or (self.middle_layers and level == len(self.heads) - 1)
            if attends and (heads < 1 or self.width(level) % heads):
                raise ValueError(f"{heads} heads do not divide a width of {self.width(level)} at level {level}")
            if self.norm_groups < 1 or self.width(level) % self.norm_groups:
                raise ValueError(
                    f"{self.norm_groups} groups do not divide a width of {self.width(level)} at level {level}"
                )

    def module(self) -> "LatentUNet":
        return LatentUNet(self)

    def width(self, level: int) -> int:
        return self.channels * self.multipliers[level]

    @property
    def stride(self) -> int:
        """Sides of the latents must be multiples of this."""
        return 2 ** (len(self.blocks) - 1)

    @property
    def reads_text(self) -> bool:
        return self.middle_layers > 0 or any(self.transformer_layers)

    @property
    def reads_padding(self) -> bool:
        """Masks are not read: all tokens are attended to. Those of a masked caption are zero, with values of zero."""
        return False

    @property
    def learned_variance(self) -> bool:
        return False

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (regular expression for the end of a parameter's path, axis to shard), as in
        `UNetConfig.tensor_rules`."""
        rules = [(r"_\d+(_\d+)?/conv_1/kernel", 3), (r"_\d+(_\d+)?/conv_2/kernel", 2)]
        if self.reads_text:
            rules += [("(self|cross)/(q|k|v)/kernel", 1), ("(self|cross)/out/kernel", 0)]
        return tuple(rules)


class LatentDownPath(nn.Module):
    """Conditioning, down path and middle, which the latent U-Net and its ControlNets have in common."""

    config: LatentUNetConfig

    def condition(self, time: Array, conditioning: Conditioning) -> tuple[Array, Array | None]:
        """The conditioning vector (b t) and the tokens."""
        config, dtype = self.config, self.config.execution.dtype
        width = 4 * config.channels
        embedding = TimestepEmbedding(config.channels, width, dtype, name="time")(time)
        if conditioning.aug_level is not None:
            level = 1000.0 * conditioning.aug_level
            if config.level_entries:
                entry = jnp.clip(jnp.round(level), 0, config.level_entries - 1).astype(jnp.int32)
                embedding += nn.Embed(config.level_entries, width, dtype=dtype, name="aug_level")(entry)
            else:
                embedding += TimestepEmbedding(config.channels, width, dtype, name="aug_level")(level)
        if conditioning.interval is not None:
            embedding += TimestepEmbedding(config.channels, width, dtype, name="interval")(1000 * conditioning.interval)
        if conditioning.vector is not None:
            embedding += VectorEmbedding(width, dtype, name="vector")(conditioning.vector)
        if conditioning.tokens is None:
            if config.reads_text:
                raise ValueError("this network reads text: its conditioning needs tokens")
            return embedding, None
        return embedding, conditioning.tokens.astype(dtype)

    def stem(self, x: Array, conditioning: Conditioning) -> Array:
        if conditioning.concat is not None:
            x = jnp.concatenate([x, conditioning.concat], axis=-1)
        if self.config.coordinates:
            x = jnp.concatenate([x, coordinates(x)], axis=-1)
        dtype = self.config.execution.dtype
        return self.split(nn.Conv(self.config.channels, (3, 3), dtype=dtype, name="stem")(x.astype(dtype)))

    def down(self, x: Array, embedding: Array, tokens: Array | None) -> tuple[Array, list[Array]]:
        """The down path: its result, and one skip per block and downsampling, the stem's first."""
        config, skips = self.config, [x]
        for level, count in enumerate(config.blocks):
            for i in range(count):
                x = self.res(x, embedding, level, f"down_{level}_{i}")
                x = self.attend(x, level, f"down_{level}_{i}", tokens)
                skips.append(x)
            if level + 1 < len(config.blocks):
                # The padding is explicit: "SAME" would pad an even side at its end alone.
                layer = nn.Conv(x.shape[-1], (3, 3), 2, 1, dtype=config.execution.dtype, name=f"down_{level}")
                x = self.split(layer(x))
                skips.append(x)
        return x, skips

    def middle(self, x: Array, embedding: Array, tokens: Array | None) -> Array:
        last = len(self.config.blocks) - 1
        x = self.res(x, embedding, last, "middle_0")
        if self.config.middle_layers:
            x = self.transformer(x, last, self.config.middle_layers, False, "middle", tokens)
        return self.res(x, embedding, last, "middle_1")

    def res(self, x: Array, embedding: Array, level: int, name: str) -> Array:
        config = self.config
        block = config.execution.rematerialized(nn.remat, TimeResBlock)
        return self.split(
            block(
                config.width(level),
                config.norm_groups,
                config.execution.dtype,
                scale_shift=config.scale_shift,
                name=name,
            )(x, embedding)
        )

    def attend(self, x: Array, level: int, name: str, tokens: Array | None) -> Array:
        layers = self.config.transformer_layers[level]
        return self.transformer(x, level, layers, self.config.cross_only[level], name, tokens) if layers else x

    def transformer(
        self, x: Array, level: int, layers: int, cross_only: bool, name: str, tokens: Array | None
    ) -> Array:
        config = self.config
        settings = config.heads[level], layers, cross_only, config.linear_projection, config.norm_groups
        return self.split(SpatialTransformer(*settings, config.execution, name=f"{name}_attention")(x, tokens))

    def split(self, x: Array) -> Array:
        return self.config.execution.sharding.images(x)


class LatentUNet(LatentDownPath):
    """The latent U-Net."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w c"]:
        """time: in 0…1000. h, w: multiples of the stride. Residuals: one per skip (stem, each block and downsampling),
        and one for the middle. ValueError if tokens are missing or the number of residuals is wrong."""
        config, channels, dtype = self.config, x.shape[-1], self.config.execution.dtype
        embedding, tokens = self.condition(time, conditioning)
        x, skips = self.down(self.stem(x, conditioning), embedding, tokens)
        x = self.middle(x, embedding, tokens)
        skips, x = add_residuals(skips, x, conditioning)
        for level in reversed(range(len(config.blocks))):
            for i in range(config.blocks[level] + 1):
                x = self.res(jnp.concatenate([x, skips.pop()], axis=-1), embedding, level, f"up_{level}_{i}")
                x = self.attend(x, level, f"up_{level}_{i}", tokens)
            if level:
                x = resize(x, Resample.UP)
                x = self.split(nn.Conv(x.shape[-1], (3, 3), dtype=dtype, name=f"up_{level}")(x))
        x = nn.silu(Norm(dtype, config.norm_groups, name="head_norm")(x))
        head = nn.Conv(channels, (3, 3), dtype=dtype, kernel_init=nn.initializers.zeros, name="head")
        return to_float32(head(x))


class VectorEmbedding(nn.Module):
    """The MLP that maps the conditioning's vector to the width of the time embedding."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, vector: Float[Array, "b v"]) -> Float[Array, "b t"]:
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype)(vector.astype(self.dtype)))
        return nn.Dense(self.features, dtype=self.dtype)(x)


class TimeResBlock(nn.Module):
    """Residual block: twice norm, swish, 3×3 convolution; the embedding, if any, is added between them, or scales and
    shifts the second norm.

    The residual path is a 1×1 convolution if the width changes.
    """

    channels: int
    groups: int = 32
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-5
    scale_shift: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], embedding: Float[Array, "b t"] | None) -> Float[Array, "b h w c2"]:
        y = nn.silu(Norm(self.dtype, self.groups, epsilon=self.epsilon, name="norm_1")(x))
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_1")(y)
        norm = Norm(self.dtype, self.groups, epsilon=self.epsilon, name="norm_2")
        if embedding is None:
            y = norm(y)
        else:
            width = self.channels * (2 if self.scale_shift else 1)
            change = nn.Dense(width, dtype=self.dtype, name="time")(nn.silu(embedding))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(change, 2, axis=-1)
                y = norm(y) * (1.0 + scale) + shift
            else:
                y = norm(y + change)
        y = nn.silu(y)
        init = nn.initializers.lecun_normal() if embedding is None else nn.initializers.zeros
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=init, name="conv_2")(y)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels as tokens, between two projections, added to the input.

    cross_only: the first attention of each layer reads the tokens too.
    """

    heads: int
    layers: int
    cross_only: bool
    linear: bool
    groups: int
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], tokens: Float[Array, "b n d"] | None) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        dtype = self.execution.dtype
        y = self.project(Norm(dtype, self.groups, epsilon=1e-6, name="norm")(x), "in").reshape(b, h * w, c)
        names = [f"block_{i}" for i in range(self.layers)]
        if self.execution.scan and self.layers > 1 and not self.is_initializing():
            block = TransformerBlock(self.heads, self.cross_only, dtype, parent=None)
            params = [self.variables["params"][name] for name in names]
            y = in_loop(self.execution, params, lambda y, p: cast(Array, block.apply({"params": p}, y, tokens)), y)
        else:
            layer = self.execution.rematerialized(nn.remat, TransformerBlock)
            for name in names:
                y = layer(self.heads, self.cross_only, dtype, name=name)(y, tokens)
        return x + self.project(y.reshape(b, h, w, c), "out")

    def project(self, x: Array, name: str) -> Array:
        dtype, width = self.execution.dtype, x.shape[-1]
        init = nn.initializers.zeros if name == "out" else nn.initializers.lecun_normal()
        if self.linear:
            return nn.Dense(width, dtype=dtype, kernel_init=init, name=name)(x)
        return nn.Conv(width, (1, 1), dtype=dtype, kernel_init=init, name=name)(x)


class TransformerBlock(nn.Module):
    """Pre-norm layer: attention of pixels to pixels, of pixels to tokens, and a GEGLU (arXiv 2002.05202)."""

    heads: int
    cross_only: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b p c"], tokens: Float[Array, "b n d"] | None) -> Float[Array, "b p c"]:
        width = x.shape[-1]
        y = self.norm("self_norm", x)
        context = y if tokens is None or not self.cross_only else tokens
        x = x + Attention(self.heads, self.dtype, name="self")(y, context)
        if tokens is not None:
            x = x + Attention(self.heads, self.dtype, name="cross")(self.norm("cross_norm", x), tokens)
        y = nn.Dense(8 * width, dtype=self.dtype, name="up")(self.norm("feed_forward_norm", x))
        y, gate = jnp.split(y, 2, axis=-1)
        return x + nn.Dense(width, dtype=self.dtype, name="down")(y * nn.gelu(gate, approximate=False))

    def norm(self, name: str, x: Array) -> Array:
        return nn.LayerNorm(1e-5, dtype=self.dtype, name=name)(x)


class Attention(nn.Module):
    """Multi-head attention without biases but in its output."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b p c"], context: Float[Array, "b n d"]) -> Float[Array, "b p c"]:
        b, _, width = x.shape
        q, k, v = (
            nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(source).reshape(
                b, -1, self.heads, width // self.heads
            )
            for name, source in (("q", x), ("k", context), ("v", context))
        )
        return nn.Dense(width, dtype=self.dtype, name="out")(attention(q, k, v).reshape(b, -1, width))

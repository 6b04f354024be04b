"""Imagen's two U-Nets: the base (F.1, an ADM U-Net) and the Efficient U-Net of super-resolution (F.2, F.3, B.1).

The first is also DeepFloyd IF's, of both its stages, by its settings (`weights/deepfloyd.py` reads them).

Both take a noised picture, a time, the text and, for super-resolution, the low-resolution picture with its noise
level, and return one picture, or one and its variance. Settings are frozen dataclasses; `settings.module()` is the
network.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.nets import blocks
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.blocks import (
    Activation,
    AttentionBlock,
    AttentionPool,
    Norm,
    Resample,
    ResBlock,
    TextContext,
    TimestepEmbedding,
    WholeTextPool,
)


class Reading(enum.Enum):
    """How a network reads its text.

    MASKED: padding is not seen; the tokens are normalized one by one, and projected before they are pooled (Imagen,
    with a learned token for captions that say nothing). WHOLE: all tokens are seen as they come, padding included; they
    are pooled before they are projected, and normalized in groups of channels over all tokens (DeepFloyd IF).
    """

    MASKED = "masked"
    WHOLE = "whole"


Remat = Literal["none", "outputs", "blocks"]

HOW = {"how": True}
"""Marks settings of how something is computed: no part of what was learned, and not kept with it."""


@dataclass(frozen=True)
class UNetConfig:
    """Settings that both U-Nets share. The defaults are those of Imagen's base model (F.1).

    channels: width of the first level; multipliers: width of each level relative to it.
    blocks: residual blocks at each level, on the way down (and, plus one in the base U-Net, on the way up).
    self_attention: levels where pixels attend to pixels and text together.
    cross_attention: levels where pixels attend to the text alone.
    head_channels: width of one attention head; heads: their number, instead of it, where it is not 0.
    feed_forward: width of the MLP behind attention relative to the level; 0 for none.
    time_width: width of the conditioning vector; text_width: of the embeddings coming in (T5-XXL: 4096);
    context_width: of the text inside the attention layers.
    patch: pixels folded into channels before the first level (1 in the paper; 2 or 4 make the tiny presets fast).
    skip_scale: factor on the skip connections (1/√2 in the Efficient U-Net).
    coordinates: give the first layer two channels that say where in the picture it is, -1…1 (arXiv 1807.03247). The
    paper's networks are deep enough to learn it from the borders; one that draws in tiles must not know it.
    conditioned_head: the conditioning vector scales and shifts the last norm too (as in DiT, arXiv 2212.09748). For
    networks that predict x₀: their outermost skip carries the picture at low noise, at high noise nothing but noise.
    input_skip: add the noised picture, times a factor for each of its channels that the conditioning vector decides, to
    the output. For networks that predict x₀: normalized features do not carry the brightness of what they copy.
    low_res: whether a low-resolution picture and its noise level are inputs.
    learned_variance: the output has twice the channels, the second half of them for the variance of a sampler's noise
    (arXiv 2102.09672, 3.1).
    reading: how the text is read. pool_heads: heads of the attention that pools it; 0: one for 64 channels.
    activation, norm_groups (0: up to 32 of at least four channels), frequencies (sines of an embedding; 0: as many as
    channels, at least 128), residual_scale (a factor on the sum of each residual block): where DeepFloyd IF differs.
    dtype: compute type; parameters stay float32.
    remat: what the backward pass computes again to save memory: `none`; `outputs`: all but what convolutions and
    matrix products of parameters give; `blocks`: every block whole, from what comes into it.
    scan: residual blocks of one shape in a row are one loop, which compiles in less time (Efficient U-Net).
    axes: the mesh axes that activations are split over. These last three change nothing of what is computed.
    """

    channels: int = 512
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    self_attention: tuple[bool, ...] = (False, True, True, True)
    cross_attention: tuple[bool, ...] = (False, False, False, False)
    head_channels: int = 64
    heads: int = 0
    feed_forward: int = 0
    time_width: int = 2048
    text_width: int = 4096
    context_width: int = 2048
    pool_text: bool = True
    patch: int = 1
    skip_scale: float = 1.0
    coordinates: bool = False
    conditioned_head: bool = False
    input_skip: bool = False
    low_res: bool = False
    learned_variance: bool = False
    reading: Reading = Reading.MASKED
    pool_heads: int = 0
    activation: Activation = Activation.SILU
    norm_groups: int = 0
    frequencies: int = 0
    residual_scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = field(default="none", metadata=HOW)
    scan: bool = field(default=False, metadata=HOW)
    axes: ActivationSharding = field(default=ActivationSharding(), metadata=HOW)

    def __post_init__(self):
        levels = {len(self.multipliers), len(self.blocks), len(self.self_attention), len(self.cross_attention)}
        if len(levels) != 1:
            raise ValueError("multipliers, blocks, self_attention and cross_attention must have one entry per level")
        if self.learned_variance and self.input_skip:
            raise ValueError("input_skip is for networks that predict x0, and they learn no variance")

    def module(self) -> "UNet | EfficientUNet":
        return UNet(self)

    @property
    def stride(self) -> int:
        """Picture sides must be multiples of this."""
        return self.patch * 2 ** (len(self.blocks) - 1)

    @property
    def reads_text(self) -> bool:
        return self.pool_text or any(self.self_attention) or any(self.cross_attention)

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (end of a parameter's path, the axis that is split), as a pattern.

        The first layer of each block writes a part of its channels (or heads) on each device and the last one reads
        them, so that a block communicates once, where their sums meet (Megatron-LM, arXiv 1909.08053, 3).
        """
        rules = [(r"_\d+(_\d+)?/Conv_0/kernel", 3), (r"_\d+(_\d+)?/Conv_1/kernel", 2)]
        attention = [("(q|text_k|text_v)", 1), ("out", 0)]
        attention += [("(k|v)", 1)] * any(self.self_attention) + [("up", 1), ("down", 0)] * bool(self.feed_forward)
        if any(self.self_attention) or any(self.cross_attention):
            rules += [(f"_(self|cross)/{layer}/kernel", axis) for layer, axis in attention]
        return tuple(rules)

    def width(self, level: int) -> int:
        return self.channels * self.multipliers[level]

    def heads_at(self, level: int) -> int:
        return self.heads or max(1, self.width(level) // self.head_channels)


@dataclass(frozen=True)
class EfficientUNetConfig(UNetConfig):
    """The same settings with the defaults of the 64→256 model (F.2), and one more.

    outer_blocks: residual blocks behind the last enlargement, where the paper's network has none.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks: tuple[int, ...] = (2, 4, 8, 8)
    self_attention: tuple[bool, ...] = (False, False, False, True)
    heads: int = 8
    feed_forward: int = 2
    skip_scale: float = 2**-0.5
    low_res: bool = True
    outer_blocks: int = 0

    def module(self) -> "EfficientUNet":
        return EfficientUNet(self)

    @property
    def stride(self) -> int:
        return self.patch * 2 ** len(self.blocks)


class _Parts(nn.Module):
    """What the two U-Nets have in common: the stem, the conditioning, and the blocks with the settings filled in."""

    config: UNetConfig

    def condition(self, time, text, text_mask, aug_level):
        """The conditioning vector (b t) and the text as attention sees it (tokens, mask; None where none is read)."""
        config, dtype = self.config, self.config.dtype
        embed = partial(
            TimestepEmbedding,
            config.frequencies or max(128, config.channels),
            config.time_width,
            dtype,
            config.activation,
        )
        embedding = embed(name="time")(time)
        if config.low_res:
            embedding += embed(name="aug_level")(1000.0 * aug_level)
        if not config.reads_text:
            return embedding, None, None
        text = text.astype(dtype)
        if config.reading is Reading.WHOLE:
            if config.pool_text:
                heads = config.pool_heads or max(1, config.text_width // 64)
                embedding += WholeTextPool(heads, config.time_width, dtype, name="pool")(text)
            return embedding, nn.Dense(config.context_width, dtype=dtype, name="text")(text), None
        tokens, mask = TextContext(config.context_width, dtype, name="text")(text, text_mask)
        if config.pool_text:
            heads = config.pool_heads or max(1, config.context_width // 64)
            embedding += AttentionPool(heads, config.time_width, dtype, name="pool")(tokens, mask)
        return embedding, tokens, mask

    def stem(self, x, low_res):
        config = self.config
        if config.low_res:
            x = jnp.concatenate([x, low_res], axis=-1)
        x = blocks.space_to_depth(x.astype(config.dtype), config.patch)
        if config.coordinates:
            x = jnp.concatenate([x, blocks.coordinates(x)], axis=-1)
        return config.axes.images(nn.Conv(config.channels, (3, 3), dtype=config.dtype, name="stem")(x))

    def head(self, x, embedding, noised):
        config, channels = self.config, noised.shape[-1] * (2 if self.config.learned_variance else 1)
        x = Norm(config.dtype, config.norm_groups, name="head_norm")(x)
        if config.conditioned_head:
            x = blocks.scale_shift(x, embedding, config.dtype, "head_condition", config.activation)
        x = config.activation(x)
        zeros = nn.initializers.zeros
        x = nn.Conv(channels * config.patch**2, (3, 3), dtype=config.dtype, kernel_init=zeros, name="head")(x)
        x = blocks.to_float32(blocks.depth_to_space(x, config.patch))
        if config.input_skip:
            factor = nn.Dense(channels, dtype=config.dtype, kernel_init=zeros, name="input_skip")(nn.silu(embedding))
            x += blocks.to_float32(factor)[:, None, None, :] * noised
        return x

    def res(self, x, embedding, width, name, resample=Resample.NONE, project=False):
        block = self._remat(nn.remat, ResBlock)(width, resample, project, *self._style(), name=name)
        return self.config.axes.images(block(x, embedding))

    def repeated(self, x, embedding, width, prefix, count):
        """`count` residual blocks of one shape, one after the other."""
        names = [f"{prefix}_{i}" for i in range(count)]
        if not self.config.scan or count < 2 or self.is_initializing():
            for name in names:
                x = self.res(x, embedding, width, name, project=True)
            return x
        # Their parameters keep their names, so that a checkpoint knows nothing of loops; the loop stacks them.
        params = [self.variables["params"][name] for name in names]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = ResBlock(width, Resample.NONE, True, *self._style(), parent=None)

        def body(x, params):
            return self.config.axes.images(block.apply({"params": params}, x, embedding)), None

        return jax.lax.scan(self._remat(jax.checkpoint, body), x, stacked)[0]

    def attend(self, x, level, name, tokens, mask):
        config = self.config
        block = self._remat(nn.remat, AttentionBlock)
        for wanted, itself, kind in (
            (config.self_attention[level], True, "self"),
            (config.cross_attention[level], False, "cross"),
        ):
            if wanted:
                style = config.norm_groups, config.reading is Reading.WHOLE
                heads = config.heads_at(level)
                layer = block(heads, itself, config.feed_forward, config.dtype, *style, name=f"{name}_{kind}")
                x = config.axes.images(layer(x, tokens, mask))
        return x

    def _style(self):
        """What all residual blocks have in common."""
        config = self.config
        return config.dtype, config.activation, config.norm_groups, config.residual_scale

    def _remat(self, transform: Callable, target: Any) -> Any:
        """A block (class or function) that computes again in the backward pass what the settings say."""
        if self.config.remat == "none":
            return target
        return transform(target, policy=_outputs if self.config.remat == "outputs" else None)


def _outputs(primitive: Any, *inputs: Any, **settings: Any) -> bool:
    """Of what `remat` keeps: convolutions, and matrix products but those of attention, which have batch axes."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **settings)


class UNet(_Parts):
    """The base U-Net (F.1): residual blocks then resampling, one skip per block, attention at the lower levels.

    The way up has one block more than the way down at each level (ADM); up- and down-sampling happen inside
    residual blocks (BigGAN).
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        text: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
        low_res: Float[Array, "b h w c"] | None = None,
        aug_level: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Time in 0…1000, low_res already enlarged to h×w, aug_level in [0, 1]; h, w multiples of the stride."""
        config, noised = self.config, x
        embedding, tokens, mask = self.condition(time, text, text_mask, aug_level)
        x = self.stem(x, low_res)
        skips, last = [x], len(config.blocks) - 1
        for level, count in enumerate(config.blocks):
            for i in range(count):
                x = self.res(x, embedding, config.width(level), f"down_{level}_{i}")
                x = self.attend(x, level, f"down_{level}_{i}", tokens, mask)
                skips.append(x)
            if level != last:
                x = self.res(x, embedding, config.width(level), f"down_{level}", Resample.DOWN)
                skips.append(x)
        x = self.res(x, embedding, config.width(last), "middle_0")
        x = self.attend(x, last, "middle", tokens, mask)
        x = self.res(x, embedding, config.width(last), "middle_1")
        for level in reversed(range(last + 1)):
            for i in range(config.blocks[level] + 1):
                x = jnp.concatenate([x, skips.pop() * config.skip_scale], axis=-1)
                x = self.res(x, embedding, config.width(level), f"up_{level}_{i}")
                x = self.attend(x, level, f"up_{level}_{i}", tokens, mask)
            if level:
                x = self.res(x, embedding, config.width(level), f"up_{level}", Resample.UP)
        return self.head(x, embedding, noised)


class EfficientUNet(_Parts):
    """The Efficient U-Net (B.1): downsampling before the convolutions, upsampling after them, one skip per level.

    Each level, the first included, halves the picture with a strided convolution (A.28) and doubles it again with a
    nearest-neighbour enlargement and a convolution (A.29).
    """

    config: EfficientUNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        text: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
        low_res: Float[Array, "b h w c"] | None = None,
        aug_level: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Arguments as in `UNet`; h and w multiples of the stride."""
        config, noised = self.config, x
        embedding, tokens, mask = self.condition(time, text, text_mask, aug_level)
        x = self.stem(x, low_res)
        skips = []
        for level, count in enumerate(config.blocks):
            skips.append(x)
            x = nn.Conv(config.width(level), (3, 3), strides=2, dtype=config.dtype, name=f"down_{level}")(x)
            x = self.repeated(x, embedding, config.width(level), f"down_{level}", count)
            x = self.attend(x, level, f"down_{level}", tokens, mask)
        for level in reversed(range(len(config.blocks))):
            x = self.repeated(x, embedding, config.width(level), f"up_{level}", config.blocks[level])
            x = self.attend(x, level, f"up_{level}", tokens, mask)
            skip = skips.pop()
            x = blocks.resize(x, Resample.UP)
            x = nn.Conv(skip.shape[-1], (3, 3), dtype=config.dtype, name=f"up_{level}")(x)
            x = x + skip * config.skip_scale
        for i in range(config.outer_blocks):
            x = self.res(x, embedding, config.channels, f"outer_{i}")
        return self.head(x, embedding, noised)

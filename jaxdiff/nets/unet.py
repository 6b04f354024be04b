"""Two U-Nets: Imagen's base (F.1, an ADM U-Net) and the Efficient U-Net of super-resolution (F.2, F.3, B.1).

The first is also DeepFloyd IF's, of both its stages, by its settings (`weights/deepfloyd.py` reads them).

Both take a noised image, a time and a `Conditioning`, and return one image, or one and its variance. Settings are
frozen dataclasses; `settings.module()` is the network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets import blocks
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.blocks import Activation, AttentionBlock, Norm, Resample, ResBlock, TimestepEmbedding
from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning, MaskedText, WholeText

Remat = Literal["none", "outputs", "blocks"]

HOW = {"how": True}
"""Marks settings of how something is computed: no part of what was learned, and not kept with it."""


@dataclass(frozen=True)
class AttentionConfig:
    """Where and how pixels attend. The defaults are those of Imagen's base model (F.1).

    self_attention: levels where pixels attend to pixels and text together.
    cross_attention: levels where pixels attend to the text alone.
    head_channels: width of one attention head; heads: their number, instead of it, where it is not 0.
    feed_forward: width of the MLP behind attention relative to the level; 0 for none.
    group_text: each layer normalizes the text in groups of channels over all tokens (DeepFloyd IF), not token by token.
    """

    self_attention: tuple[bool, ...] = (False, True, True, True)
    cross_attention: tuple[bool, ...] = (False, False, False, False)
    head_channels: int = 64
    heads: int = 0
    feed_forward: int = 0
    group_text: bool = False


@dataclass(frozen=True)
class ConditioningConfig:
    """How the network reads its `Conditioning`.

    width: of the conditioning vector, which is the time embedding and all that is added to it.
    text: how text is read; None: no text at all, or tokens that attention takes as they are.
    frequencies: sines of an embedding; 0: as many as channels, at least 128.
    """

    width: int = 2048
    text: MaskedText | WholeText | None = MaskedText()
    frequencies: int = 0


@dataclass(frozen=True)
class ExecutionConfig:
    """How the network is computed. Only `dtype` changes what comes out.

    dtype: compute type; parameters stay float32.
    remat: what the backward pass computes again to save memory: `none`; `outputs`: all but what convolutions and
    matrix products of parameters give; `blocks`: every block, from its inputs.
    scan: residual blocks of one shape in a row are one loop, which compiles in less time (Efficient U-Net).
    sharding: the mesh axes that activations are split over.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = field(default="none", metadata=HOW)
    scan: bool = field(default=False, metadata=HOW)
    sharding: ActivationSharding = field(default=ActivationSharding(), metadata=HOW)


@dataclass(frozen=True)
class UNetConfig:
    """Settings that both U-Nets share. The defaults are those of Imagen's base model (F.1).

    channels: width of the first level; multipliers: width of each level relative to it.
    blocks: residual blocks at each level, on the way down (and, plus one in the base U-Net, on the way up).
    patch: pixels folded into channels before the first level (1 in the paper; 2 or 4 make the tiny presets fast).
    activation, norm_groups (0: up to 32 of at least four channels), residual_scale (a factor on the sum of each
    residual block): where DeepFloyd IF differs. skip_scale: factor on the skip connections (1/√2 in the Efficient
    U-Net).
    coordinates: give the first layer two channels that say where in the image it is, -1…1 (arXiv 1807.03247). The
    paper's networks are deep enough to learn it from the borders; one that samples in tiles must not know it.
    conditioned_head: the conditioning vector scales and shifts the last norm too (as in DiT, arXiv 2212.09748). For
    networks that predict x₀: their outermost skip carries the image at low noise, at high noise nothing but noise.
    input_skip: add the noised image, times a factor for each of its channels that the conditioning vector decides, to
    the output. For networks that predict x₀: normalized features do not carry the brightness of what they copy.
    learned_variance: the output has twice the channels, the second half of them for the variance of a sampler's noise
    (arXiv 2102.09672, 3.1).
    """

    channels: int = 512
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    attention: AttentionConfig = AttentionConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    patch: int = 1
    activation: Activation = Activation.SILU
    norm_groups: int = 0
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    coordinates: bool = False
    conditioned_head: bool = False
    input_skip: bool = False
    learned_variance: bool = False
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self):
        attention = self.attention.self_attention, self.attention.cross_attention
        levels = {len(self.multipliers), len(self.blocks), *map(len, attention)}
        if len(levels) != 1:
            raise ValueError("multipliers, blocks, self_attention and cross_attention must have one entry per level")
        if self.learned_variance and self.input_skip:
            raise ValueError("input_skip is for networks that predict x0, and they learn no variance")

    def module(self) -> "UNet | EfficientUNet":
        return UNet(self)

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this."""
        return self.patch * 2 ** (len(self.blocks) - 1)

    @property
    def attends(self) -> bool:
        return any(self.attention.self_attention) or any(self.attention.cross_attention)

    @property
    def reads_text(self) -> bool:
        return self.conditioning.text is not None or self.attends

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (end of a parameter's path, the axis that is split), as a pattern.

        The first layer of each block writes a part of its channels (or heads) on each device and the last one reads
        them, so that a block communicates once, where their sums meet (Megatron-LM, arXiv 1909.08053, 3).
        """
        rules = [(r"_\d+(_\d+)?/Conv_0/kernel", 3), (r"_\d+(_\d+)?/Conv_1/kernel", 2)]
        attention, config = [("(q|text_k|text_v)", 1), ("out", 0)], self.attention
        attention += [("(k|v)", 1)] * any(config.self_attention) + [("up", 1), ("down", 0)] * bool(config.feed_forward)
        if self.attends:
            rules += [(f"_(self|cross)/{layer}/kernel", axis) for layer, axis in attention]
        return tuple(rules)

    def width(self, level: int) -> int:
        return self.channels * self.multipliers[level]

    def heads_at(self, level: int) -> int:
        return self.attention.heads or max(1, self.width(level) // self.attention.head_channels)


@dataclass(frozen=True)
class EfficientUNetConfig(UNetConfig):
    """The same settings with the defaults of the 64→256 model (F.2), and one more.

    outer_blocks: residual blocks behind the last enlargement, where the paper's network has none.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks: tuple[int, ...] = (2, 4, 8, 8)
    attention: AttentionConfig = AttentionConfig((False, False, False, True), heads=8, feed_forward=2)
    skip_scale: float = 2**-0.5
    outer_blocks: int = 0

    def module(self) -> "EfficientUNet":
        return EfficientUNet(self)

    @property
    def stride(self) -> int:
        return self.patch * 2 ** len(self.blocks)


_Text = tuple[Array | None, Array | None]
"""Tokens and their mask, as attention sees them; None where no text is read, or no mask needed."""


class _Shared(nn.Module):
    """What the two U-Nets have in common: the stem, the conditioning, and the blocks with the settings filled in."""

    config: UNetConfig

    def condition(self, time: Array, given: Conditioning) -> tuple[Array, _Text]:
        """The conditioning vector (b t) and the text as attention sees it."""
        config, dtype = self.config, self.config.execution.dtype
        width, frequencies = config.conditioning.width, config.conditioning.frequencies or max(128, config.channels)
        embed = partial(TimestepEmbedding, frequencies, width, dtype, config.activation)
        embedding = embed(name="time")(time)
        if given.aug_level is not None:
            embedding += embed(name="aug_level")(1000.0 * given.aug_level)
        if given.interval is not None:
            embedding += embed(name="interval")(1000.0 * given.interval)
        if given.vector is not None:
            embedding += nn.Dense(width, dtype=dtype, name="vector")(given.vector.astype(dtype))
        if given.tokens is None and config.reads_text:
            raise ValueError("this network reads text: its conditioning needs tokens")
        if given.tokens is None or config.conditioning.text is None:
            return embedding, (given.tokens, given.token_mask)
        text = config.conditioning.text.read(given.tokens.astype(dtype), given.token_mask, width, dtype)
        if text.vector is not None:
            embedding += text.vector
        return embedding, (text.tokens, text.mask)

    def stem(self, x: Array, given: Conditioning) -> Array:
        config = self.config
        if given.concat is not None:
            x = jnp.concatenate([x, given.concat], axis=-1)
        x = blocks.space_to_depth(x.astype(config.execution.dtype), config.patch)
        if config.coordinates:
            x = jnp.concatenate([x, blocks.coordinates(x)], axis=-1)
        return self.split(nn.Conv(config.channels, (3, 3), dtype=config.execution.dtype, name="stem")(x))

    def split(self, x: Array) -> Array:
        return self.config.execution.sharding.images(x)

    def head(self, x, embedding, noised):
        config, channels = self.config, noised.shape[-1] * (2 if self.config.learned_variance else 1)
        dtype = config.execution.dtype
        x = Norm(dtype, config.norm_groups, name="head_norm")(x)
        if config.conditioned_head:
            x = blocks.scale_shift(x, embedding, dtype, "head_condition", config.activation)
        x = config.activation(x)
        zeros = nn.initializers.zeros
        x = nn.Conv(channels * config.patch**2, (3, 3), dtype=dtype, kernel_init=zeros, name="head")(x)
        x = blocks.to_float32(blocks.depth_to_space(x, config.patch))
        if config.input_skip:
            factor = nn.Dense(channels, dtype=dtype, kernel_init=zeros, name="input_skip")(nn.silu(embedding))
            x += blocks.to_float32(factor)[:, None, None, :] * noised
        return x

    def res(self, x, embedding, width, name, resample=Resample.NONE, project=False):
        block = self._remat(nn.remat, ResBlock)(width, resample, project, *self._style(), name=name)
        return self.split(block(x, embedding))

    def repeated(self, x, embedding, width, prefix, count):
        """`count` residual blocks of one shape, one after the other."""
        names = [f"{prefix}_{i}" for i in range(count)]
        if not self.config.execution.scan or count < 2 or self.is_initializing():
            for name in names:
                x = self.res(x, embedding, width, name, project=True)
            return x
        # Their parameters keep their names, so that a checkpoint knows nothing of loops; the loop stacks them.
        params = [self.variables["params"][name] for name in names]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = ResBlock(width, Resample.NONE, True, *self._style(), parent=None)

        def body(x, params):
            return self.split(block.apply({"params": params}, x, embedding)), None

        return jax.lax.scan(self._remat(jax.checkpoint, body), x, stacked)[0]

    def attend(self, x: Array, level: int, name: str, text: _Text) -> Array:
        config, attention = self.config, self.config.attention
        block = self._remat(nn.remat, AttentionBlock)
        for wanted, itself, kind in (
            (attention.self_attention[level], True, "self"),
            (attention.cross_attention[level], False, "cross"),
        ):
            if wanted:
                style = config.execution.dtype, config.norm_groups, attention.group_text
                layer = block(config.heads_at(level), itself, attention.feed_forward, *style, name=f"{name}_{kind}")
                x = self.split(layer(x, *text))
        return x

    def _style(self):
        """What all residual blocks have in common."""
        config = self.config
        return config.execution.dtype, config.activation, config.norm_groups, config.residual_scale

    def _remat(self, transform: Callable, target: Any) -> Any:
        """A block (class or function) that computes again in the backward pass what the settings say."""
        remat = self.config.execution.remat
        return target if remat == "none" else transform(target, policy=_outputs if remat == "outputs" else None)


def _with_residuals(skips: list[Array], middle: Array, given: Conditioning) -> tuple[list[Array], Array]:
    """The feature maps of the way down and of the middle with the residuals added, where there are any."""
    if given.residuals is None:
        return skips, middle
    *each, last = given.residuals
    if len(each) != len(skips):
        raise ValueError(f"{len(each) + 1} residuals for {len(skips)} skip connections and the middle")
    added = [skip + residual.astype(skip.dtype) for skip, residual in zip(skips, each)]
    return added, middle + last.astype(middle.dtype)


def _outputs(primitive: Any, *inputs: Any, **settings: Any) -> bool:
    """Of what `remat` keeps: convolutions, and matrix products but those of attention, which have batch axes."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **settings)


class UNet(_Shared):
    """The base U-Net (F.1): residual blocks then resampling, one skip per block, attention at the lower levels.

    The way up has one block more than the way down at each level (ADM); up- and down-sampling happen inside
    residual blocks (BigGAN).
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w o"]:
        """Time in 0…1000; h, w multiples of the stride. Residuals: one for each skip (of the stem, each block and each
        halving), and the middle's. ValueError where the network reads text and has none, or residuals do not fit."""
        config, noised = self.config, x
        embedding, text = self.condition(time, conditioning)
        x = self.stem(x, conditioning)
        skips, last = [x], len(config.blocks) - 1
        for level, count in enumerate(config.blocks):
            for i in range(count):
                x = self.res(x, embedding, config.width(level), f"down_{level}_{i}")
                x = self.attend(x, level, f"down_{level}_{i}", text)
                skips.append(x)
            if level != last:
                x = self.res(x, embedding, config.width(level), f"down_{level}", Resample.DOWN)
                skips.append(x)
        x = self.res(x, embedding, config.width(last), "middle_0")
        x = self.attend(x, last, "middle", text)
        x = self.res(x, embedding, config.width(last), "middle_1")
        skips, x = _with_residuals(skips, x, conditioning)
        for level in reversed(range(last + 1)):
            for i in range(config.blocks[level] + 1):
                x = jnp.concatenate([x, skips.pop() * config.skip_scale], axis=-1)
                x = self.res(x, embedding, config.width(level), f"up_{level}_{i}")
                x = self.attend(x, level, f"up_{level}_{i}", text)
            if level:
                x = self.res(x, embedding, config.width(level), f"up_{level}", Resample.UP)
        return self.head(x, embedding, noised)


class EfficientUNet(_Shared):
    """The Efficient U-Net (B.1): downsampling before the convolutions, upsampling after them, one skip per level.

    Each level, the first included, halves the image with a strided convolution (A.28) and doubles it again with a
    nearest-neighbour enlargement and a convolution (A.29).
    """

    config: EfficientUNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w o"]:
        """Arguments as in `UNet`. Residuals: one for each level's skip, and that of the middle."""
        config, noised = self.config, x
        embedding, text = self.condition(time, conditioning)
        x = self.stem(x, conditioning)
        skips = []
        for level, count in enumerate(config.blocks):
            skips.append(x)
            x = nn.Conv(config.width(level), (3, 3), strides=2, dtype=config.execution.dtype, name=f"down_{level}")(x)
            x = self.repeated(x, embedding, config.width(level), f"down_{level}", count)
            x = self.attend(x, level, f"down_{level}", text)
        skips, x = _with_residuals(skips, x, conditioning)
        for level in reversed(range(len(config.blocks))):
            x = self.repeated(x, embedding, config.width(level), f"up_{level}", config.blocks[level])
            x = self.attend(x, level, f"up_{level}", text)
            skip = skips.pop()
            x = blocks.resize(x, Resample.UP)
            x = nn.Conv(skip.shape[-1], (3, 3), dtype=config.execution.dtype, name=f"up_{level}")(x)
            x = x + skip * config.skip_scale
        for i in range(config.outer_blocks):
            x = self.res(x, embedding, config.channels, f"outer_{i}")
        return self.head(x, embedding, noised)

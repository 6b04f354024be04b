"""Two U-Nets: Imagen's base (F.1, an ADM U-Net) and the Efficient U-Net for super-resolution (F.2, F.3, B.1).

With other settings the first is also DeepFloyd IF's, for both stages (`weights/deepfloyd.py` reads them), and that of
unCLIP's decoders and upsamplers (`weights/unclip_unet.py`).

Both take a noised image, a time and a `Conditioning`, and return an image, optionally with its variance. Settings are
frozen dataclasses; `settings.module()` is the network.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets import blocks
from jaxdiff.nets.blocks import Activation, AttentionBlock, Norm, Resample, ResBlock, TimestepEmbedding
from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning, MaskedText, WholeText, add_residuals
from jaxdiff.nets.execution import ExecutionConfig, in_loop
from jaxdiff.nets.image_readers import ImageTokens, TextWithImage


@dataclass(frozen=True)
class AttentionConfig:
    """Attention layers. The defaults are those of Imagen's base model (F.1).

    self_attention: levels where pixels attend to pixels and text.
    cross_attention: levels where pixels attend to the text only.
    head_channels: width of one attention head. heads: number of heads; if not 0, it replaces head_channels.
    feed_forward: width of the MLP after attention, relative to the level; 0 for none.
    group_text: normalize the text in groups of channels over all tokens (DeepFloyd IF), not per token.
    normalize_text: off, each layer attends to the text as the reader returns it (unCLIP).
    """

    self_attention: tuple[bool, ...] = (False, True, True, True)
    cross_attention: tuple[bool, ...] = (False, False, False, False)
    head_channels: int = 64
    heads: int = 0
    feed_forward: int = 0
    group_text: bool = False
    normalize_text: bool = True


@dataclass(frozen=True)
class ConditioningConfig:
    """How the network reads its `Conditioning`.

    width: width of the conditioning vector (the time embedding and everything added to it).
    text: how text is read; None: no text, or tokens that are attended to unchanged.
    frequencies: width of the sinusoidal embeddings; 0: the number of channels, at least 128.
    vector_tokens: number of tokens that are projected from the `vector` and attended to after the text, beside its
    place in the conditioning vector (four in DALL·E 2, arXiv 2204.06125, 2.1).
    """

    width: int = 2048
    text: MaskedText | WholeText | TextWithImage | ImageTokens | None = MaskedText()
    frequencies: int = 0
    vector_tokens: int = 0


@dataclass(frozen=True)
class UNetConfig:
    """Settings shared by both U-Nets. The defaults are those of Imagen's base model (F.1).

    channels: width of the first level. multipliers: width of each level relative to it.
    blocks: residual blocks at each level of the down path; the up path has the same, in the base U-Net one more.
    patch: pixels folded into channels before the first level (1 in the paper; 2 or 4 make the tiny presets fast).
    activation, norm_groups (0: up to 32 of at least four channels), residual_scale (a factor on the sum of each
    residual block): DeepFloyd IF sets these. skip_scale: factor on the skip connections (1/√2 in the Efficient U-Net).
    scale_shift: the conditioning vector scales and shifts the second norm of a residual block; off: it is added before.
    coordinates: add two input channels with the position in the image, -1…1 (arXiv 1807.03247). The paper's networks
    are deep enough to learn it from the borders; do not use it with tiled sampling.
    conditioned_head: the conditioning vector also scales and shifts the last norm (as in DiT, arXiv 2212.09748). For
    networks that predict x₀: their outermost skip carries the image at low noise, but only noise at high noise.
    input_skip: add the noised image to the output, times a factor per channel from the conditioning vector. For
    networks that predict x₀: normalized features lose the brightness of the image.
    learned_variance: double the output channels; the second half is for the variance of a sampler's noise
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
    scale_shift: bool = True
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
            raise ValueError("input_skip is for networks that predict x0, which do not learn the variance")

    def module(self) -> nn.Module:
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

    @property
    def reads_padding(self) -> bool:
        """Whether padding is attended to as text."""
        return isinstance(self.conditioning.text, WholeText)

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (regular expression for the end of a parameter's path, axis to shard).

        Each device computes a slice of the channels (or heads) in the first layer of a block, and the last layer sums
        over them, so a block communicates once (Megatron-LM, arXiv 1909.08053, 3).
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
    """`UNetConfig` with the defaults of the 64→256 model (F.2).

    outer_blocks: residual blocks after the last upsampling; the paper has none.
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
"""Tokens for attention (None without text) and their mask (None: attend to all)."""


class _Shared(nn.Module):
    """Base class of both U-Nets: stem, conditioning, head, and blocks built from the settings."""

    config: UNetConfig

    def condition(self, time: Array, conditioning: Conditioning) -> tuple[Array, _Text]:
        """The conditioning vector (b t) and the text for attention."""
        config, dtype = self.config, self.config.execution.dtype
        width, frequencies = config.conditioning.width, config.conditioning.frequencies or max(128, config.channels)
        embed = partial(TimestepEmbedding, frequencies, width, dtype, config.activation)
        embedding = embed(name="time")(time)
        if conditioning.aug_level is not None:
            embedding += embed(name="aug_level")(1000.0 * conditioning.aug_level)
        if conditioning.interval is not None:
            embedding += embed(name="interval")(1000.0 * conditioning.interval)
        if conditioning.vector is not None:
            embedding += nn.Dense(width, dtype=dtype, name="vector")(conditioning.vector.astype(dtype))
        if conditioning.tokens is None and config.reads_text:
            raise ValueError("this network reads text: its conditioning needs tokens")
        if conditioning.tokens is None or config.conditioning.text is None:
            return embedding, self.with_vector(conditioning.tokens, conditioning.token_mask, conditioning)
        text = config.conditioning.text.read(conditioning.tokens.astype(dtype), conditioning.token_mask, width, dtype)
        if text.vector is not None:
            embedding += text.vector
        return embedding, self.with_vector(text.tokens, text.mask, conditioning)

    def with_vector(self, tokens: Array | None, mask: Array | None, conditioning: Conditioning) -> _Text:
        """The tokens for attention, with those projected from the vector behind them."""
        config, count = self.config, self.config.conditioning.vector_tokens
        if not count:
            return tokens, mask
        if tokens is None or conditioning.vector is None:
            raise ValueError("vector_tokens: this network needs tokens and a vector")
        dtype, width = config.execution.dtype, tokens.shape[-1]
        added = nn.Dense(count * width, dtype=dtype, name="vector_tokens")(conditioning.vector.astype(dtype))
        added = added.reshape(-1, count, width)
        if mask is not None:
            mask = jnp.concatenate([mask, jnp.ones(added.shape[:2], bool)], axis=1)
        return jnp.concatenate([tokens.astype(dtype), added], axis=1), mask

    def stem(self, x: Array, conditioning: Conditioning) -> Array:
        config = self.config
        if conditioning.concat is not None:
            x = jnp.concatenate([x, conditioning.concat], axis=-1)
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
        block = self.config.execution.rematerialized(nn.remat, ResBlock)(
            width, resample, project, *self._style(), name=name
        )
        return self.split(block(x, embedding))

    def repeated(self, x, embedding, width, prefix, count):
        """A sequence of `count` residual blocks of one shape."""
        names = [f"{prefix}_{i}" for i in range(count)]
        if not self.config.execution.scan or count < 2 or self.is_initializing():
            for name in names:
                x = self.res(x, embedding, width, name, project=True)
            return x
        block = ResBlock(width, Resample.NONE, True, *self._style(), parent=None)

        def apply(x: Array, params: dict) -> Array:
            return self.split(block.apply({"params": params}, x, embedding))

        return in_loop(self.config.execution, [self.variables["params"][name] for name in names], apply, x)

    def attend(self, x: Array, level: int, name: str, text: _Text) -> Array:
        config, attention = self.config, self.config.attention
        block = config.execution.rematerialized(nn.remat, AttentionBlock)
        for enabled, self_attention, kind in (
            (attention.self_attention[level], True, "self"),
            (attention.cross_attention[level], False, "cross"),
        ):
            if enabled:
                options = self_attention, attention.feed_forward, config.execution.dtype, config.norm_groups
                norms = attention.group_text, attention.normalize_text
                layer = block(config.heads_at(level), *options, *norms, name=f"{name}_{kind}")
                x = self.split(layer(x, *text))
        return x

    def _style(self):
        """The arguments shared by all residual blocks."""
        config = self.config
        return config.execution.dtype, config.activation, config.norm_groups, config.residual_scale, config.scale_shift


class UNet(_Shared):
    """The base U-Net (F.1): residual blocks, then resampling; one skip per block; attention at the lower levels.

    The up path has one block more per level than the down path (ADM); residual blocks do the resampling (BigGAN).
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w o"]:
        """time: in 0…1000. h, w: multiples of the stride. Residuals: one per skip (stem, each block and downsampling),
        and one for the middle. ValueError if required text is missing or the number of residuals is wrong."""
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
        skips, x = add_residuals(skips, x, conditioning)
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

    Each level, including the first, halves the image with a strided convolution (A.28) and doubles it again with
    nearest-neighbour upsampling and a convolution (A.29).
    """

    config: EfficientUNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w o"]:
        """Arguments as in `UNet`. Residuals: one per level's skip, and one for the middle."""
        config, noised = self.config, x
        embedding, text = self.condition(time, conditioning)
        x = self.stem(x, conditioning)
        skips = []
        for level, count in enumerate(config.blocks):
            skips.append(x)
            x = nn.Conv(config.width(level), (3, 3), strides=2, dtype=config.execution.dtype, name=f"down_{level}")(x)
            x = self.repeated(x, embedding, config.width(level), f"down_{level}", count)
            x = self.attend(x, level, f"down_{level}", text)
        skips, x = add_residuals(skips, x, conditioning)
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

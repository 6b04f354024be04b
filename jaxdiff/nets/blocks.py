"""Building blocks of the U-Nets.

Embeddings of times and noise levels, residual blocks with scale-shift norm and BigGAN resampling, and attention over
image and text. Shapes: images `b h w c`, text `b n e`, embeddings `b t`.
"""

import enum
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.attention import attention

Dtype = jax.typing.DTypeLike


class Activation(enum.Enum):
    """The nonlinearity of every block."""

    SILU = "silu"
    GELU = "gelu"

    def __call__(self, x: jax.Array) -> jax.Array:
        """GELU is exact, not the tanh approximation."""
        return nn.silu(x) if self is Activation.SILU else nn.gelu(x, approximate=False)


class Resample(enum.Enum):
    """Resampling in a residual block."""

    NONE = "none"
    DOWN = "down"
    UP = "up"


def sinusoidal(position: Float[Array, " b"], width: int, longest: float = 10_000.0) -> Float[Array, "b width"]:
    """Sines and cosines of `position` at `width`/2 geometric frequencies from 1 down to 1/`longest` (float32)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = position.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def space_to_depth(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Fold `patch`×`patch` pixels into channels: (b, h/p, w/p, c·p²)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)


def coordinates(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2"]:
    """Row and column coordinates of `x`, from -1 to 1."""
    b, h, w, _ = x.shape
    rows, columns = jnp.meshgrid(
        jnp.linspace(-1, 1, h, dtype=x.dtype), jnp.linspace(-1, 1, w, dtype=x.dtype), indexing="ij"
    )
    return jnp.broadcast_to(jnp.stack([rows, columns], axis=-1), (b, h, w, 2))


class Norm(nn.Module):
    """GroupNorm; statistics in float32, per sample. groups: 0 means up to 32 groups of at least four channels.

    exact: compute the variance in a second pass, not from the mean of squares. Needed for inputs with small variance
    around a large mean, such as the tokens of an empty caption, which are all padding but one.
    """

    dtype: Dtype = jnp.float32
    groups: int = 0
    exact: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        channels = x.shape[-1]
        groups = self.groups or math.gcd(32, channels)
        while not self.groups and channels // groups < 4 and groups > 1:
            groups //= 2
        return nn.GroupNorm(groups, epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=not self.exact)(x)


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of one scalar per sample (time, log-SNR, noise level; about 0…1000), then an MLP."""

    frequencies: int
    features: int
    dtype: Dtype = jnp.float32
    activation: Activation = Activation.SILU

    @nn.compact
    def __call__(self, position: Float[Array, " b"]) -> Float[Array, "b t"]:
        x = sinusoidal(position, self.frequencies).astype(self.dtype)
        x = self.activation(nn.Dense(self.features, dtype=self.dtype)(x))
        return nn.Dense(self.features, dtype=self.dtype)(x)


def scale_shift(
    x: Float[Array, "b h w c"],
    embedding: Float[Array, "b t"],
    dtype: Dtype,
    name: str | None = None,
    activation: Activation = Activation.SILU,
) -> Float[Array, "b h w c"]:
    """x · (1 + scale) + shift for normalized x; a dense layer computes both from the embedding (A.27)."""
    both = nn.Dense(2 * x.shape[-1], dtype=dtype, name=name)(activation(embedding))
    scale, shift = jnp.split(both[:, None, None, :], 2, axis=-1)
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """Residual block: twice norm, swish, 3×3 convolution (A.27; BigGAN resampling as in F.1).

    The embedding scales and shifts the second norm, or is added before it (`scale_shift` off). The residual path is a
    1×1 convolution if the width changes, or always with `project` (as drawn in A.27). The sum of both paths is
    multiplied by `scale`.
    """

    channels: int
    resample: Resample = Resample.NONE
    project: bool = False
    dtype: Dtype = jnp.float32
    activation: Activation = Activation.SILU
    groups: int = 0
    scale: float = 1.0
    scale_shift: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], embedding: Float[Array, "b t"]) -> Float[Array, "b h2 w2 c2"]:
        y = self.activation(Norm(self.dtype, self.groups)(x))
        x, y = resize(x, self.resample), resize(y, self.resample)
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(y)
        if self.scale_shift:
            y = scale_shift(Norm(self.dtype, self.groups)(y), embedding, self.dtype, activation=self.activation)
        else:
            y += nn.Dense(self.channels, dtype=self.dtype)(self.activation(embedding))[:, None, None]
            y = Norm(self.dtype, self.groups)(y)
        y = self.activation(y)
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros)(y)
        if self.project or x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype)(x)
        return x + y if self.scale == 1.0 else (x + y) * self.scale


def resize(x: Float[Array, "b h w c"], resample: Resample) -> Float[Array, "b h2 w2 c"]:
    """Halve by 2×2 means, double by repetition, or return unchanged."""
    if resample is Resample.DOWN:
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    if resample is Resample.UP:
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x


class AttentionBlock(nn.Module):
    """Attention of pixels to text and, optionally, to pixels.

    self_attention: attend to both; the text is concatenated to keys and values (D.3.1).
    feed_forward: if above 0, add an MLP with this multiple of the width (A.28: "hidden 2×channels").
    group_text: GroupNorm over all tokens of the text (DeepFloyd IF) instead of LayerNorm per token.
    normalize_text: off, the text is not normalized here.
    A mask of None attends to all of the text.
    """

    heads: int
    self_attention: bool = True
    feed_forward: int = 0
    dtype: Dtype = jnp.float32
    groups: int = 0
    group_text: bool = False
    normalize_text: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b n e"], mask: Bool[Array, "b n"] | None
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        split = (b, -1, self.heads, c // self.heads)
        y = Norm(self.dtype, self.groups)(x)
        q = nn.Dense(c, dtype=self.dtype, name="q")(y).reshape(split)
        if not self.normalize_text:
            text = context.astype(self.dtype)
        elif self.group_text:
            text = Norm(self.dtype, self.groups, exact=True, name="text_norm")(context)
        else:
            text = nn.LayerNorm(dtype=self.dtype)(context)
        k = nn.Dense(c, dtype=self.dtype, name="text_k")(text).reshape(split)
        v = nn.Dense(c, dtype=self.dtype, name="text_v")(text).reshape(split)
        if self.self_attention:
            k = jnp.concatenate([k, nn.Dense(c, dtype=self.dtype, name="k")(y).reshape(split)], axis=1)
            v = jnp.concatenate([v, nn.Dense(c, dtype=self.dtype, name="v")(y).reshape(split)], axis=1)
            mask = None if mask is None else jnp.concatenate([mask, jnp.ones((b, h * w), bool)], axis=1)
        y = attention(q, k, v, mask=None if mask is None else mask[:, None, None, :]).reshape(b, h * w, c)
        x = x + nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(y)
        if self.feed_forward:
            y = nn.Dense(self.feed_forward * c, dtype=self.dtype, name="up")(Norm(self.dtype, self.groups)(x))
            x = x + nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="down")(nn.gelu(y))
        return x.reshape(b, h, w, c)


def to_float32(x: jax.Array) -> jax.Array:
    """Cast a network's output, so that the sampler's arithmetic does not run in the network's compute type."""
    return x.astype(jnp.float32)

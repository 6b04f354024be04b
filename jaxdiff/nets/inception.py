"""Inception-v3 as FID defines it: the network of the TensorFlow graph of December 2015 (arXiv 1512.00567, figures 5-7).

It differs from the usual Inception-v3: average pools exclude the padding, and the last block uses max pooling. FID uses
the 2048 features before the classifier; the Inception score uses its 1008 logits without the bias. For metrics on few
images there are spatially averaged features of earlier layers: 64 after the first max pool, 192 after the second, 768
before the last reduction.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = 299
WIDTH = 2048
TAPS = (64, 192, 768, WIDTH)
"""Widths of the available features."""
CLASSES = 1008
ROW, COLUMN = (1, 7), (7, 1)


class InceptionOutputs(NamedTuple):
    """features: for FID. logits: the classifier's, without its bias. early: features of earlier layers by width."""

    features: Float[Array, "b 2048"]
    logits: Float[Array, "b 1008"]
    early: dict[int, Float[Array, "b _"]]


class Inception(nn.Module):
    """Maps images of 299 × 299 in [-1, 1] to features. Parameters are loaded from public weights, never trained."""

    @nn.compact
    def __call__(self, image: Float[Array, "b 299 299 3"]) -> InceptionOutputs:
        x = _Conv(32, 3, stride=2, name="conv_1a")(image)
        x = _Conv(32, 3, padding="VALID", name="conv_2a")(x)
        x = _Conv(64, 3, name="conv_2b")(x)
        x = _max_pool(x, stride=2)
        early = {64: x.mean((1, 2))}
        x = _Conv(80, 1, name="conv_3b")(x)
        x = _Conv(192, 3, padding="VALID", name="conv_4a")(x)
        x = _max_pool(x, stride=2)
        early[192] = x.mean((1, 2))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _Narrow(pooled, name=f"mixed_{name}")(x)
        x = _ToMiddle(name="mixed_6a")(x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _Middle(width, name=f"mixed_{name}")(x)
        early[768] = x.mean((1, 2))
        x = _ToWide(name="mixed_7a")(x)
        x = _Wide(maximum=False, name="mixed_7b")(x)
        x = _Wide(maximum=True, name="mixed_7c")(x)
        features = x.mean((1, 2))
        return InceptionOutputs(features, nn.Dense(CLASSES, use_bias=False, name="classes")(features), early)


class _Conv(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU. Keeps the size unless strided or VALID."""

    width: int
    size: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        padding = self.padding if self.stride == 1 else "VALID"
        x = nn.Conv(self.width, size, self.stride, padding, use_bias=False, name="conv")(x)
        return jax.nn.relu(_Norm(name="norm")(x))


class _Norm(nn.Module):
    """Batch normalisation with its statistics as parameters."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        mean, var = (self.param(name, init, x.shape[-1:]) for name, init in (("mean", zeros), ("var", ones)))
        scale, bias = (self.param(name, init, x.shape[-1:]) for name, init in (("scale", ones), ("bias", zeros)))
        return (x - mean) * (jax.lax.rsqrt(var + 1e-3) * scale) + bias


class _Narrow(nn.Module):
    """35 × 35 (figure 5)."""

    pooled: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        one = _Conv(64, 1, name="one")(x)
        five = _branch(x, "five", (48, 1), (64, 5))
        three = _branch(x, "three", (64, 1), (96, 3), (96, 3))
        pool = _Conv(self.pooled, 1, name="pool")(_average_pool(x))
        return jnp.concatenate([one, five, three, pool], -1)


class _ToMiddle(nn.Module):
    """35 × 35 to 17 × 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        three = _Conv(384, 3, stride=2, name="three")(x)
        twice = _branch(x, "twice", (64, 1), (96, 3), (96, 3), stride=2)
        return jnp.concatenate([three, twice, _max_pool(x, stride=2)], -1)


class _Middle(nn.Module):
    """17 × 17, with kernels of 1 × 7 and 7 × 1 (figure 6)."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        width = self.width
        one = _Conv(192, 1, name="one")(x)
        seven = _branch(x, "seven", (width, 1), (width, ROW), (192, COLUMN))
        twice = _branch(x, "twice", (width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW))
        pool = _Conv(192, 1, name="pool")(_average_pool(x))
        return jnp.concatenate([one, seven, twice, pool], -1)


class _ToWide(nn.Module):
    """17 × 17 to 8 × 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        three = _branch(x, "three", (192, 1), (320, 3), stride=2)
        seven = _branch(x, "seven", (192, 1), (192, ROW), (192, COLUMN), (192, 3), stride=2)
        return jnp.concatenate([three, seven, _max_pool(x, stride=2)], -1)


class _Wide(nn.Module):
    """8 × 8 (figure 7). maximum: max pooling, in the last block."""

    maximum: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2048"]:
        def split(x: Array, name: str) -> list[Array]:
            return [_Conv(384, (1, 3), name=f"{name}a")(x), _Conv(384, (3, 1), name=f"{name}b")(x)]

        one = _Conv(320, 1, name="one")(x)
        three = split(_branch(x, "three", (384, 1)), "three_2")
        twice = split(_branch(x, "twice", (448, 1), (384, 3)), "twice_3")
        pooled = _max_pool(x, stride=1, padding=1) if self.maximum else _average_pool(x)
        return jnp.concatenate([one, *three, *twice, _Conv(192, 1, name="pool")(pooled)], -1)


def _branch(x: Array, name: str, *layers: tuple[int, int | tuple[int, int]], stride: int = 1) -> Array:
    """A sequence of convolutions, each (width, size); the last has the stride."""
    for number, (width, size) in enumerate(layers, 1):
        x = _Conv(width, size, stride if number == len(layers) else 1, name=f"{name}_{number}")(x)
    return x


def _max_pool(x: Array, stride: int, padding: int = 0) -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), [(padding, padding)] * 2)


def _average_pool(x: Array) -> Array:
    """3 × 3 average pool that excludes the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)

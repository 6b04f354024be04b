"""Thresholding of the predicted clean image (Imagen, Sec. 2.3), so that strong guidance does not saturate it.

Each is a frozen dataclass with `apply(x0) -> x0`, which treats every sample separately. Each is a pytree whose numbers
are leaves, so that `jax.jit` can trace them; arrays may hold one number per sample (b,). With plain numbers it is
hashable, and a number out of range raises ValueError.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.numbers import Number, is_plain, pytree_of_numbers


@runtime_checkable
class Thresholding(Protocol):
    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]: ...


@pytree_of_numbers
@dataclasses.dataclass(frozen=True)
class NoThreshold:
    """x₀ unchanged."""

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return x0


@pytree_of_numbers
@dataclasses.dataclass(frozen=True)
class StaticThreshold:
    """x₀ clipped to [-limit, limit]. Images lie in [-1, 1]; the standardized embeddings of Karlo's prior are clipped
    at 5."""

    limit: Number = 1.0

    def __post_init__(self):
        if is_plain(self.limit) and not 0.0 < self.limit < math.inf:
            raise ValueError(f"the thresholding limit must be above 0 and finite, not {self.limit}")

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        limit = jnp.asarray(self.limit, x0.dtype)
        limit = limit.reshape(limit.shape + (1,) * (x0.ndim - limit.ndim)) if limit.ndim else limit
        return jnp.clip(x0, -limit, limit)


@pytree_of_numbers
@dataclasses.dataclass(frozen=True)
class DynamicThreshold:
    """x₀ clipped to [-s, s] and divided by s, where s is a percentile of the sample's |x₀|, at least 1.

    percentile  as a fraction; 0.995 is the paper's (Fig. A.10b).
    cap         the largest s, or None for no limit. s lies between 1 and the cap, so cap = 1 *is* static thresholding;
                it is the default of diffusers (`sample_max_value=1.0`) and of DeepFloyd IF's stage II.
    """

    percentile: Number = 0.995
    cap: Number | None = None

    def __post_init__(self):
        if is_plain(self.percentile) and not 0.0 < self.percentile <= 1.0:
            raise ValueError(f"the thresholding percentile is a fraction in (0, 1], not {self.percentile}")
        if is_plain(self.cap) and not 0.0 < self.cap < math.inf:
            raise ValueError(f"the thresholding cap must be above 0 and finite (or None), not {self.cap}")

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        scale = jnp.maximum(_percentile(jnp.abs(x0).reshape(x0.shape[0], -1), self.percentile), 1.0)
        scale = scale if self.cap is None else jnp.minimum(scale, self.cap)
        scale = scale.reshape((-1,) + (1,) * (x0.ndim - 1)).astype(x0.dtype)
        return jnp.clip(x0, -scale, scale) / scale


def _percentile(values: Float[Array, "b n"], fraction: Number) -> Float[Array, " b"]:
    """A percentile of each row of non-negative numbers, interpolated linearly between order statistics.

    Bisection instead of sorting, which takes seconds for the three million values of a 1024×1024 image: the bit
    patterns of non-negative float32 are ordered like the numbers, so 31 halvings of their range, each with one count,
    find an order statistic exactly.
    """
    values = values.astype(jnp.float32)
    rank, beyond = _rank(fraction, values.shape[1] - 1)
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle[:, None], axis=1) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.zeros(values.shape[:1], jnp.int32), jnp.full(values.shape[:1], jnp.iinfo(jnp.int32).max)
    selected = jax.lax.fori_loop(0, 31, halve, ends)[1]
    here = jax.lax.bitcast_convert_type(selected, jnp.float32)
    above = jnp.min(jnp.where(bits > selected[:, None], values, jnp.inf), axis=1)
    repeated = jnp.sum(bits <= selected[:, None], axis=1) > rank + 1
    following = jnp.where(repeated | jnp.isinf(above), here, above)
    return here + (following - here) * beyond


def _rank(fraction: Number, last: int) -> tuple[Int[Array, "..."] | int, Number]:
    """The order statistic (0 to `last`) at or below a percentile, and the percentile's fractional part in [0, 1)."""
    if is_plain(fraction):
        position = fraction * last
        rank = math.floor(position)
        return rank, position - rank
    # Counted from the top: among millions of values, float32 cannot represent the fractional part of a position.
    down = (1.0 - fraction) * last
    steps = jnp.ceil(down)
    return last - steps.astype(jnp.int32), steps - down

"""Thresholding of the predicted clean picture (Imagen, Sec. 2.3), so that strong guidance does not saturate it.

Each is a frozen dataclass with `apply(x0) -> x0`, of the samples one by one: nothing couples the samples of a batch.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Thresholding(Protocol):
    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]: ...


@dataclasses.dataclass(frozen=True)
class Unthresholded:
    """x₀ as predicted."""

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return x0


@dataclasses.dataclass(frozen=True)
class Static:
    """x₀ clipped to [-1, 1]."""

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return jnp.clip(x0, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """x₀ clipped to [-s, s] and divided by s, where s is a percentile of the sample's |x₀|, at least 1.

    percentile  as a fraction; 0.995 is the one that the paper prints (Fig. A.10b).
    cap         the largest s, or None for no limit. Beware: s lies between 1 and the cap, so cap = 1 *is* static
                thresholding. That is the default of diffusers (`sample_max_value=1.0`) and of DeepFloyd IF's stage II.
    """

    percentile: float = 0.995
    cap: float | None = None

    def __post_init__(self):
        if not 0.0 < self.percentile <= 1.0:
            raise ValueError(f"the thresholding percentile is a fraction in (0, 1], not {self.percentile}")
        if self.cap is not None and not 0.0 < self.cap < math.inf:
            raise ValueError(f"the thresholding cap must be above 0 and finite (or None), not {self.cap}")

    def apply(self, x0: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        scale = jnp.maximum(_percentile(jnp.abs(x0).reshape(x0.shape[0], -1), self.percentile), 1.0)
        scale = scale if self.cap is None else jnp.minimum(scale, self.cap)
        scale = scale.reshape((-1,) + (1,) * (x0.ndim - 1)).astype(x0.dtype)
        return jnp.clip(x0, -scale, scale) / scale


def _percentile(values: Float[Array, "b n"], fraction: float) -> Float[Array, " b"]:
    """Of each row, interpolated linearly between order statistics. Only the top of the row is sorted: a picture of 1024
    pixels a side has three million values, and 0.995 needs the order of the largest 0.5 %."""
    position = fraction * (values.shape[1] - 1)
    below = math.floor(position)
    largest = jax.lax.top_k(values, values.shape[1] - below)[0]
    low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    return low + (high - low) * (position - below)

"""The times at which a sampler stops: k steps are k + 1 points, from noise to picture.

`grid(schedule, steps)` is what most callers want; `grid_at` takes any times, `grid_of` any α and σ (σ = 0 at the end
included), such as the leading spacing of a published discrete sampler.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedules import Schedule, time_of


class Grid(NamedTuple):
    """Points of a schedule, noisiest first: arrays (k + 1,), or scalars for one point."""

    t: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    logsnr: Float[Array, "..."]


@runtime_checkable
class Spacing(Protocol):
    """Where the k + 1 points lie; the last is always t = 0."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]: ...


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """Even steps in t, from 1 to 0. On the EDM schedule these are EDM's own steps."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        return jnp.linspace(1.0, 0.0, steps + 1)


@dataclasses.dataclass(frozen=True)
class UniformLogSNR:
    """k points at even log-SNR between two bounds (within the schedule's range), then the clean end."""

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"the log-SNR spacing needs finite low < high, not {self.low} and {self.high}")

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        return _spread(schedule, steps, self.low, self.high, lambda logsnr: logsnr, lambda position: position)


@dataclasses.dataclass(frozen=True)
class Karras:
    """EDM's spacing on any schedule (arXiv 2206.00364, Eq. 5): k points at even s^(1/ρ), s = σ/α, then clean."""

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        if not (0.0 < self.sigma_min < self.sigma_max < math.inf and 0.0 < self.rho < math.inf):
            raise ValueError(
                "Karras spacing needs 0 < sigma_min < sigma_max and rho > 0, "
                f"not {self.sigma_min}, {self.sigma_max} and {self.rho}"
            )

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        low, high = -2.0 * math.log(self.sigma_max), -2.0 * math.log(self.sigma_min)
        scale = -2.0 * self.rho
        return _spread(schedule, steps, low, high, lambda logsnr: jnp.exp(logsnr / scale), lambda s: scale * jnp.log(s))


def grid(schedule: Schedule, steps: int, spacing: Spacing = UniformTime()) -> Grid:
    """The grid of `steps` steps. Its ends have the schedule's clipped log-SNR: no coefficient is zero or infinite."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return grid_at(schedule, spacing.times(schedule, steps))


def grid_at(schedule: Schedule, t: Float[Array, " n"]) -> Grid:
    """The schedule at these falling times."""
    return Grid(t, schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t))


def grid_of(t: Float[Array, " n"], alpha: Float[Array, " n"], sigma: Float[Array, " n"]) -> Grid:
    """A grid of explicit values: t is what the network is told. The last σ may be zero (log-SNR infinite)."""
    return Grid(t, alpha, sigma, 2.0 * (jnp.log(alpha) - jnp.log(sigma)))


def _spread(
    schedule: Schedule,
    steps: int,
    low: float,
    high: float,
    position: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    logsnr: Callable[[Float[Array, " n"]], Float[Array, " n"]],
) -> Float[Array, " n"]:
    """Times of points at even `position(λ)` from low to high, then the clean end, all within the schedule's range."""
    noisiest, cleanest = schedule.logsnr(1.0), schedule.logsnr(0.0)
    first, last = position(jnp.clip(low, noisiest, cleanest)), position(jnp.clip(high, noisiest, cleanest))
    inside = jnp.append(logsnr(jnp.linspace(first, last, steps)), cleanest)
    # Where the range itself ends at `high`, a further point there would be a step of no length.
    whole = logsnr(jnp.linspace(first, last, steps + 1))
    times = time_of(schedule, jnp.where(high >= cleanest, whole, inside))
    return times.at[-1].set(0.0)

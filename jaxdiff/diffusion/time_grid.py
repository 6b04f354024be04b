"""Time grids of samplers: k steps are k + 1 points, from noise to image.

Use `time_grid(schedule, steps)` in most cases; `time_grid_at` takes any times, `time_grid_of` any α and σ (including
σ = 0 at the end), such as those of a published discrete sampler.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedules import Schedule, TabulatedSchedule, time_of


class TimeGrid(NamedTuple):
    """Points of a schedule, noisiest first: arrays (k + 1,), or scalars for one point."""

    t: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    logsnr: Float[Array, "..."]


@runtime_checkable
class Spacing(Protocol):
    """Positions of the k + 1 points; the last is always t = 0. ValueError if the spacing does not allow k steps."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]: ...


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """Uniform steps in t, from 1 to 0. On the EDM schedule these are EDM's steps."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        return jnp.linspace(1.0, 0.0, steps + 1)


@dataclasses.dataclass(frozen=True)
class UniformLogSNR:
    """k points with uniform log-SNR between two bounds (within the schedule's range), then the clean end."""

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"the log-SNR spacing needs finite low < high, not {self.low} and {self.high}")

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        return _spread(schedule, steps, self.low, self.high, lambda logsnr: logsnr, lambda position: position)


@dataclasses.dataclass(frozen=True)
class Karras:
    """EDM's spacing on any schedule (arXiv 2206.00364, Eq. 5): k points with uniform s^(1/ρ), s = σ/α, then clean."""

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


@dataclasses.dataclass(frozen=True)
class Leading:
    """Every (N // k)-th entry of a discrete schedule, starting at entry `offset`, then the clean end (diffusers'
    "leading" with its `steps_offset`; arXiv 2305.08891, Table 2)."""

    offset: int = 0

    def __post_init__(self):
        if self.offset < 0:
            raise ValueError(f"the leading spacing needs an offset of at least 0, not {self.offset}")

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        table = _table_of(schedule, steps)
        entries = [table.steps // steps * i + self.offset for i in range(steps)]
        if entries[-1] >= table.steps:
            raise ValueError(f"{steps} leading steps with an offset of {self.offset} end beyond {table.steps} entries")
        return _falling(table, entries)


@dataclasses.dataclass(frozen=True)
class Trailing:
    """Every (N / k)-th entry of a discrete schedule, rounded, down from the last one, then the clean end (diffusers'
    "trailing"; arXiv 2305.08891, Table 2)."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        table = _table_of(schedule, steps)
        # diffusers' rounding, without the entry -1 that diffusers gets for some numbers of steps.
        falling = np.arange(table.steps, 0, -table.steps / steps).round()[:steps].astype(int) - 1
        return _falling(table, falling[::-1].tolist())


@dataclasses.dataclass(frozen=True)
class Linspace:
    """Evenly spaced entries of a discrete schedule from first to last, rounded, then the clean end (diffusers'
    "linspace"; arXiv 2305.08891, Table 2). A single step is the first entry."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        table = _table_of(schedule, steps)
        return _falling(table, np.linspace(0, table.steps - 1, steps).round().astype(int).tolist())


@dataclasses.dataclass(frozen=True)
class Respaced:
    """The respacing of improved DDPM and DeepFloyd IF: a discrete schedule is split into len(counts) equal sections,
    cleanest first; counts[i] entries of section i are used, evenly from its first to its last; then the clean end.

    The number of steps is the sum of the counts. offset: subtracted from the noisiest entry (2 in IF's fast27).
    """

    counts: tuple[int, ...]
    offset: int = 0

    def __post_init__(self):
        if not self.counts or min(self.counts) < 1 or self.offset < 0:
            raise ValueError(f"a respacing needs counts of at least 1 and an offset of at least 0, not {self}")

    @property
    def steps(self) -> int:
        return sum(self.counts)

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        if steps != self.steps:
            raise ValueError(f"this respacing has {self.steps} steps, not {steps}")
        table = _table_of(schedule, steps)
        return _falling(table, self.entries(table.steps))

    def entries(self, table: int) -> list[int]:
        """The entries of a table with `table` entries, ascending."""
        size, longer = divmod(table, len(self.counts))
        indices, start = [], 0
        for number, count in enumerate(self.counts):
            length = size + (number < longer)
            if count > length:
                raise ValueError(f"a respacing cannot take {count} entries out of {length}")
            stride = (length - 1) / (count - 1) if count > 1 else 0.0
            # Accumulated as in the published code: a product would round some halves differently.
            indices += [start + round(place) for place in itertools.accumulate([0.0, *[stride] * (count - 1)])]
            start += length
        return [*indices[:-1], indices[-1] - self.offset]


def time_grid(schedule: Schedule, steps: int, spacing: Spacing = UniformTime()) -> TimeGrid:
    """The grid of `steps` steps. Its ends have the clipped log-SNR, so no coefficient is zero or infinite."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return time_grid_at(schedule, spacing.times(schedule, steps))


def time_grid_at(schedule: Schedule, t: Float[Array, "..."]) -> TimeGrid:
    """The grid at these times, which must decrease for a sampler."""
    return TimeGrid(t, schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t))


def time_grid_of(t: Float[Array, " n"], alpha: Float[Array, " n"], sigma: Float[Array, " n"]) -> TimeGrid:
    """A grid of explicit values. t: passed to the network. The last σ may be zero (infinite log-SNR)."""
    return TimeGrid(t, alpha, sigma, 2.0 * (jnp.log(alpha) - jnp.log(sigma)))


def _table_of(schedule: Schedule, steps: int) -> TabulatedSchedule:
    """The schedule; ValueError unless it is a table of at least `steps` entries."""
    if not isinstance(schedule, TabulatedSchedule):
        raise ValueError(f"this spacing steps through the table of a discrete schedule, not {type(schedule).__name__}")
    if steps > schedule.steps:
        raise ValueError(f"{steps} steps, but the schedule has {schedule.steps}")
    return schedule


def _falling(schedule: TabulatedSchedule, entries: list[int]) -> Float[Array, " n"]:
    """Times of ascending entries, noisiest first, then the clean end."""
    return jnp.append(schedule.time(jnp.asarray(entries[::-1], jnp.float32)), 0.0)


def _spread(
    schedule: Schedule,
    steps: int,
    low: float,
    high: float,
    position: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    logsnr: Callable[[Float[Array, " n"]], Float[Array, " n"]],
) -> Float[Array, " n"]:
    """Times of points with uniform `position(λ)` from low to high, then the clean end, within the schedule's range."""
    noisiest, cleanest = schedule.logsnr(1.0), schedule.logsnr(0.0)
    first, last = position(jnp.clip(low, noisiest, cleanest)), position(jnp.clip(high, noisiest, cleanest))
    inside = jnp.append(logsnr(jnp.linspace(first, last, steps)), cleanest)
    # If the schedule's range ends at `high`, a separate clean end would be a step of length 0.
    uniform = logsnr(jnp.linspace(first, last, steps + 1))
    times = time_of(schedule, jnp.where(high >= cleanest, uniform, inside))
    return times.at[-1].set(0.0)

"""The times at which a sampler stops: k steps are k + 1 points, from noise to image.

`time_grid(schedule, steps)` is what most callers want; `time_grid_at` takes any times, `time_grid_of` any α and σ
(σ = 0 at the end included), such as the leading spacing of a published discrete sampler.
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
    """Where the k + 1 points lie; the last is always t = 0. ValueError where it cannot have so many."""

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


@dataclasses.dataclass(frozen=True)
class Leading:
    """Every (N // k)-th entry of a discrete schedule, from entry `offset` up, then the clean end (diffusers' "leading"
    with its `steps_offset`; arXiv 2305.08891, Table 2)."""

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
    """Every (N / k)-th entry of a discrete schedule, rounded, from the last one down, then the clean end (diffusers'
    "trailing"; arXiv 2305.08891, Table 2)."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        table = _table_of(schedule, steps)
        # As diffusers rounds, though not with the entry -1 that this gives it for some numbers of steps.
        falling = np.arange(table.steps, 0, -table.steps / steps).round()[:steps].astype(int) - 1
        return _falling(table, falling[::-1].tolist())


@dataclasses.dataclass(frozen=True)
class Linspace:
    """Entries of a discrete schedule, evenly from its first to its last, rounded, then the clean end (diffusers'
    "linspace"; arXiv 2305.08891, Table 2). One step alone is the first entry."""

    def times(self, schedule: Schedule, steps: int) -> Float[Array, " n"]:
        table = _table_of(schedule, steps)
        return _falling(table, np.linspace(0, table.steps - 1, steps).round().astype(int).tolist())


@dataclasses.dataclass(frozen=True)
class Respaced:
    """Entries of a discrete schedule, cut into as many equal parts as there are `counts`: so many of each part, evenly
    from its first to its last, cleanest part first; then the clean end (improved DDPM's and DeepFloyd IF's respacing).

    Steps are the sum of the counts. `offset` is taken from the noisiest entry (2 in IF's fast27).
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
        """The entries of a table of that length, rising."""
        size, longer = divmod(table, len(self.counts))
        indices, start = [], 0
        for number, count in enumerate(self.counts):
            length = size + (number < longer)
            if count > length:
                raise ValueError(f"a respacing cannot take {count} entries out of {length}")
            stride = (length - 1) / (count - 1) if count > 1 else 0.0
            # Summed up as in the published code: a product would round some halves the other way.
            indices += [start + round(place) for place in itertools.accumulate([0.0, *[stride] * (count - 1)])]
            start += length
        return [*indices[:-1], indices[-1] - self.offset]


def time_grid(schedule: Schedule, steps: int, spacing: Spacing = UniformTime()) -> TimeGrid:
    """The grid of `steps` steps. Its ends have the schedule's clipped log-SNR: no coefficient is zero or infinite."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return time_grid_at(schedule, spacing.times(schedule, steps))


def time_grid_at(schedule: Schedule, t: Float[Array, "..."]) -> TimeGrid:
    """The schedule at these times, which for a sampler fall."""
    return TimeGrid(t, schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t))


def time_grid_of(t: Float[Array, " n"], alpha: Float[Array, " n"], sigma: Float[Array, " n"]) -> TimeGrid:
    """A grid of explicit values: t is what the network is told. The last σ may be zero (log-SNR infinite)."""
    return TimeGrid(t, alpha, sigma, 2.0 * (jnp.log(alpha) - jnp.log(sigma)))


def _table_of(schedule: Schedule, steps: int) -> TabulatedSchedule:
    """The schedule, if it has a table of at least so many entries to step through."""
    if not isinstance(schedule, TabulatedSchedule):
        raise ValueError(f"this spacing steps through the table of a discrete schedule, not {type(schedule).__name__}")
    if steps > schedule.steps:
        raise ValueError(f"{steps} steps, but the schedule has {schedule.steps}")
    return schedule


def _falling(schedule: TabulatedSchedule, entries: list[int]) -> Float[Array, " n"]:
    """Times of these rising entries, noisiest first, and of the clean end."""
    return jnp.append(schedule.time(jnp.asarray(entries[::-1], jnp.float32)), 0.0)


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
    uniform = logsnr(jnp.linspace(first, last, steps + 1))
    times = time_of(schedule, jnp.where(high >= cleanest, uniform, inside))
    return times.at[-1].set(0.0)

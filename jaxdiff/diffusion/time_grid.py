"""Time grids of samplers: k steps are k + 1 points, from noise to image.

Use `time_grid(schedule, steps)` in most cases; `time_grid_at` takes any times, `time_grid_of` any α and σ (including
σ = 0 at the end), such as those of a published discrete sampler.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
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
    """Positions of the k + 1 points."""

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        """The points. α and σ are the schedule's at t, unless the spacing says otherwise. ValueError if it does not
        allow k steps on this schedule."""
        ...


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """Uniform steps in t, from 1 to 0. On the EDM schedule these are EDM's steps."""

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        return time_grid_at(schedule, jnp.linspace(1.0, 0.0, steps + 1))


@dataclasses.dataclass(frozen=True)
class UniformLogSNR:
    """k points with uniform log-SNR between two bounds (within the schedule's range), then the clean end."""

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"the log-SNR spacing needs finite low < high, not {self.low} and {self.high}")

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        times = _spread(schedule, steps, self.low, self.high, lambda logsnr: logsnr, lambda position: position)
        return time_grid_at(schedule, times)


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

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        low, high = -2.0 * math.log(self.sigma_max), -2.0 * math.log(self.sigma_min)
        scale = -2.0 * self.rho
        position, logsnr = lambda logsnr: jnp.exp(logsnr / scale), lambda s: scale * jnp.log(s)
        return time_grid_at(schedule, _spread(schedule, steps, low, high, position, logsnr))


class _Entries(abc.ABC):
    """Base of the spacings through the entries of a table."""

    to_first_entry: bool

    @abc.abstractmethod
    def entries(self, table: int, steps: int) -> np.ndarray:
        """The k entries of a table with `table` entries, cleanest first; they may lie between two."""

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        table = _table_of(schedule, steps)
        return time_grid_at(table, _times(table, self.entries(table.steps, steps), self.to_first_entry))


@dataclasses.dataclass(frozen=True)
class Leading(_Entries):
    """Every (N // k)-th entry of a discrete schedule, starting at entry `offset`, then the clean end (diffusers'
    "leading" with its `steps_offset`; arXiv 2305.08891, Table 2).

    skip_cleanest: k + 1 entries, (N // (k + 1)) apart, without the cleanest (diffusers' DPM-Solver).
    to_first_entry: end at entry 0, whose noise remains in the image, instead of the clean end (diffusers'
    `set_alpha_to_one=False` and `final_sigmas_type="sigma_min"`).

    In diffusers the steps of DDIM, PNDM and DDPM are N // k entries long, whatever the spacing, though the network sees
    the times of the spacing. Here each step ends where the next one begins. The two differ for the other spacings.
    """

    offset: int = 0
    skip_cleanest: bool = False
    to_first_entry: bool = False

    def __post_init__(self):
        if self.offset < 0:
            raise ValueError(f"the leading spacing needs an offset of at least 0, not {self.offset}")

    def entries(self, table: int, steps: int) -> np.ndarray:
        count = steps + self.skip_cleanest
        entries = (table // count * np.arange(count) + self.offset)[self.skip_cleanest :]
        if entries[-1] >= table or (self.skip_cleanest and count > table):
            raise ValueError(f"{steps} leading steps with an offset of {self.offset} end beyond {table} entries")
        return entries


@dataclasses.dataclass(frozen=True)
class Trailing(_Entries):
    """Every (N / k)-th entry of a discrete schedule, rounded, down from the last one, then the clean end (diffusers'
    "trailing"; arXiv 2305.08891, Table 2). to_first_entry: as of `Leading`."""

    to_first_entry: bool = False

    def entries(self, table: int, steps: int) -> np.ndarray:
        # diffusers' rounding, without the entry -1 that diffusers gets for some numbers of steps.
        return np.arange(table, 0, -table / steps).round()[:steps][::-1] - 1


@dataclasses.dataclass(frozen=True)
class Linspace(_Entries):
    """Evenly spaced entries of a discrete schedule from first to last, rounded, then the clean end (diffusers'
    "linspace"; arXiv 2305.08891, Table 2). A single step is the first entry.

    rounded: False for times between the entries, where σ/α is interpolated linearly (diffusers' Euler).
    skip_cleanest, to_first_entry: as of `Leading`.
    """

    rounded: bool = True
    skip_cleanest: bool = False
    to_first_entry: bool = False

    def entries(self, table: int, steps: int) -> np.ndarray:
        entries = np.linspace(0, table - 1, steps + self.skip_cleanest)[self.skip_cleanest :]
        return entries.round() if self.rounded else entries

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        if self.rounded:
            return super().grid(schedule, steps)
        table = _table_of(schedule, steps)
        entries = self.entries(table.steps, steps)
        ratios = np.interp(entries, np.arange(table.steps), _ratios(table))
        return _of_ratios(table, entries, ratios, self.to_first_entry)


@dataclasses.dataclass(frozen=True)
class TabulatedKarras:
    """Karras spacing on a discrete schedule as in k-diffusion and diffusers: k points with uniform s^(1/ρ), s = σ/α,
    between two entries, then the clean end. The network's times are those at which log s, interpolated linearly between
    entries, has these values.

    ends: the spacing whose cleanest and noisiest entry are the ends (diffusers' Euler); None: the first and last entry
    of the table (diffusers' DPM-Solver). rounded: round the network's times to entries, but not α and σ (diffusers'
    DPM-Solver). to_first_entry: as of `Leading`.
    """

    ends: Leading | Trailing | Linspace | None = None
    rho: float = 7.0
    rounded: bool = False
    to_first_entry: bool = False

    def __post_init__(self):
        if not 0.0 < self.rho < math.inf:
            raise ValueError(f"Karras spacing needs a finite rho above 0, not {self.rho}")
        if self.ends is not None and self.ends.to_first_entry:
            raise ValueError("to_first_entry is a setting of TabulatedKarras itself, not of its ends")

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        table = _table_of(schedule, steps)
        numbers, ratios = np.arange(table.steps), _ratios(table)
        ends = numbers if self.ends is None else self.ends.entries(table.steps, steps)
        last, first = np.interp(ends[[0, -1]], numbers, ratios) ** (1.0 / self.rho)
        spread = np.linspace(first, last, steps)[::-1] ** self.rho
        entries = np.interp(np.log(spread), np.log(ratios), numbers)
        return _of_ratios(table, entries.round() if self.rounded else entries, spread, self.to_first_entry)


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

    def grid(self, schedule: Schedule, steps: int) -> TimeGrid:
        if steps != self.steps:
            raise ValueError(f"this respacing has {self.steps} steps, not {steps}")
        table = _table_of(schedule, steps)
        return time_grid_at(table, _times(table, np.asarray(self.entries(table.steps))))

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
    return spacing.grid(schedule, steps)


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


def _times(table: TabulatedSchedule, entries: np.ndarray, to_first_entry: bool = False) -> Float[Array, " n"]:
    """Times of entries, given cleanest first, then the clean end or entry 0."""
    end = table.time(0.0) if to_first_entry else 0.0
    return jnp.append(table.time(jnp.asarray(entries[::-1], jnp.float32)), end)


def _ratios(table: TabulatedSchedule) -> np.ndarray:
    """σ/α at the entries."""
    alpha_bar = np.asarray(table.alpha_bar)
    return np.sqrt((1.0 - alpha_bar) / alpha_bar)


def _of_ratios(table: TabulatedSchedule, entries: np.ndarray, ratios: np.ndarray, to_first_entry: bool) -> TimeGrid:
    """The grid with these σ/α, and times for the network, given cleanest first."""
    t = _times(table, entries, to_first_entry)
    logsnr = jnp.asarray(np.clip(-2.0 * np.log(ratios[::-1]), -table.clip, table.clip), t.dtype)
    logsnr = jnp.append(logsnr, table.logsnr(t[-1]))
    alpha, sigma = (jnp.exp(0.5 * jax.nn.log_sigmoid(sign * logsnr)) for sign in (1.0, -1.0))
    return TimeGrid(t, alpha, sigma, logsnr)


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

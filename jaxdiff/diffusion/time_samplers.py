"""Time samplers: the distribution of training times, from t = 0 (clean) to t = 1 (noise).

A time sampler maps uniform numbers to training times. It is a separate setting from the noise schedule, which defines
the noise at each time. If the schedule is a table, every sampler returns times of its entries.

A sampler is a frozen dataclass of numbers: hashable, and so a static value under `jax.jit`. Times are float32 (float64
if u is), whatever the network's compute type.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedules import Schedule, at_least_float32, time_of


@runtime_checkable
class TimeSampler(Protocol):
    """The interface of time samplers."""

    def times(self, u: Float[Array, "*s"], schedule: Schedule) -> Float[Array, "*s"]:
        """Training times in [0, 1] from u, which is uniform in [0, 1) and may have any shape."""
        ...


@dataclasses.dataclass(frozen=True)
class UniformTimes:
    """t = u (Imagen); on a table, all entries equally often (DDPM)."""

    def times(self, u: Float[Array, "*s"], schedule: Schedule) -> Float[Array, "*s"]:
        return schedule.entry_time(u)


@dataclasses.dataclass(frozen=True)
class LogSNRRange:
    """A fraction of the training at log-SNRs uniform in [low, high], the rest from another sampler.

    The captioned properties of a flat image (position, size, colour) are determined at much lower log-SNRs than those
    of photographs, in a narrow range that a cosine schedule at uniform times rarely samples. rest: may be another
    range; unused if fraction is 1. On a table a log-SNR may lie one entry below the range.
    """

    low: float
    high: float
    fraction: float = 1.0
    rest: TimeSampler = UniformTimes()

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"a range of log-SNRs has low < high, not {self.low} and {self.high}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"the fraction of training in a range of log-SNRs lies in (0, 1], not {self.fraction}")

    def times(self, u: Float[Array, "*s"], schedule: Schedule) -> Float[Array, "*s"]:
        """The log-SNR falls from high to low until u = fraction; larger u are stretched to [0, 1) for the rest."""
        u = at_least_float32(u)
        logsnr = self.high - jnp.minimum(u / self.fraction, 1.0) * (self.high - self.low)
        inside = schedule.entry_time(time_of(schedule, logsnr))
        if self.fraction == 1.0:
            return inside
        rest = self.rest.times(jnp.clip((u - self.fraction) / (1.0 - self.fraction), 0.0, 1.0), schedule)
        return jnp.where(u < self.fraction, inside, rest)


@dataclasses.dataclass(frozen=True)
class LogNormalTimes:
    """Times whose noise is log-normal: log s ~ N(mean, std²), s = σ/α = e^(−λ/2) (EDM, arXiv 2206.00364, Table 1).

    The defaults are EDM's. Noise levels outside the schedule's range are clipped to it.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        _check_normal(self.mean, self.std)

    def times(self, u: Float[Array, "*s"], schedule: Schedule) -> Float[Array, "*s"]:
        return schedule.entry_time(time_of(schedule, -2.0 * _normal(u, self.mean, self.std)))


@dataclasses.dataclass(frozen=True)
class LogitNormalTimes:
    """Times with log(t/(1 − t)) ~ N(mean, std²), mostly in the middle (Stable Diffusion 3, arXiv 2403.03206, Sec. 3.1).

    The density is exp(−(logit t − mean)²/(2 std²)) / (std √(2π) t (1 − t)) (Eq. 19). A mean above 0 shifts training
    towards noise, below 0 towards clean images. The defaults are those of the paper's final models.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        _check_normal(self.mean, self.std)

    def times(self, u: Float[Array, "*s"], schedule: Schedule) -> Float[Array, "*s"]:
        return schedule.entry_time(jax.nn.sigmoid(_normal(u, self.mean, self.std)))


def _normal(u: Float[Array, "*s"], mean: float, std: float) -> Float[Array, "*s"]:
    """Normal numbers by the inverse distribution function, increasing in u; ∓∞ at u = 0 and 1."""
    return mean + std * jax.scipy.special.ndtri(at_least_float32(u))


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0.0 < std < math.inf):
        raise ValueError(f"a normal distribution of times needs a finite mean and std > 0, not {mean} and {std}")

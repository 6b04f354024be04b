"""Noise schedules.

A noised sample is x_t = α(t) x₀ + σ(t) ε, with t = 0 the clean image and t = 1 the noise. A schedule is defined by the
log signal-to-noise ratio λ(t) = log(α²/σ²), which falls with t. Each schedule clips λ (to ±20 by default) and
recomputes α and σ from the clipped value, so that neither is zero and no conversion divides by zero.

A schedule is a frozen dataclass of numbers: hashable, and so a static value under `jax.jit`. Results are float32
(float64 if t is), whatever the network's compute type. The distribution of training times is a separate setting, a
`TimeSampler` (`time_samplers.py`).
"""

import abc
import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_TINY = 1e-30  # keeps a logarithm finite; far outside any clip


@runtime_checkable
class Schedule(Protocol):
    """The schedule interface of samplers, losses and augmentation; t may have any shape."""

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]: ...

    def alpha(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]: ...

    def sigma(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]: ...

    def network_time(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The network's time input at t."""
        ...

    def level_time(self, level: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time of a noise level in [0, 1], for augmentation."""
        ...

    def entry_time(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time of the table's entry that contains t; t itself without a table."""
        ...


class _Continuous:
    """Time is any number in [0, 1], and equals the noise level."""

    def network_time(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """1000 t, the range of the network's sinusoidal embedding."""
        return 1000.0 * at_least_float32(t)

    def level_time(self, level: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return at_least_float32(level)

    def entry_time(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return at_least_float32(t)


class _VariancePreserving(_Continuous, abc.ABC):
    """α² + σ² = 1: α² = sigmoid(λ), σ² = sigmoid(−λ), both through the stable log-sigmoid."""

    @abc.abstractmethod
    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]: ...

    def alpha(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.logsnr(t)))

    def sigma(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.logsnr(t)))


@dataclasses.dataclass(frozen=True)
class CosineSchedule(_VariancePreserving):
    """Imagen's continuous-time schedule: α = cos(πt/2), σ = sin(πt/2), so λ(t) = −2 log tan(πt/2) + shift.

    The shift is that of simple diffusion (arXiv 2301.11093, Eq. 8): 2 log(64/d) for images with a side of d pixels.
    """

    shift: float = 0.0
    clip: float = 20.0

    def __post_init__(self):
        _check_clip(self.clip)
        _check_finite("shift", self.shift)

    @classmethod
    def shifted(cls, resolution: int, reference: int = 64) -> "CosineSchedule":
        """The schedule whose noise at `resolution`, averaged down to `reference`, is that of an unshifted schedule."""
        return cls(shift=2.0 * math.log(reference / resolution))

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        t = at_least_float32(t)
        # cos(πt/2) as a sine, because the float32 cosine of π/2 is negative.
        sine, cosine = jnp.sin(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * (1.0 - t))
        return _clipped(2.0 * (_log(cosine) - _log(sine)) + self.shift, self.clip)


@dataclasses.dataclass(frozen=True)
class LinearBetaSchedule(_VariancePreserving):
    """DDPM's linear β in continuous time (Imagen's 256→1024 stage, F.3).

    Discrete: β_j = β₀ + (β₁ − β₀) j/(N−1), −log ᾱ after n steps = Σ_{j<n} −log(1 − β_j). This schedule expands that sum
    to second order, Σ β_j + Σ β_j²/2; both terms are polynomials in n, so they extend to real n = N t.
    λ = −log(exp(−log ᾱ) − 1). Compared with the N = 1000 table, the error of log ᾱ((i+1)/N) is below 7e-4.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    clip: float = 20.0

    def __post_init__(self):
        _check_clip(self.clip)
        _check_betas(self.steps, self.beta_start, self.beta_end)

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        n = self.steps * at_least_float32(t)
        first, slope = self.beta_start, (self.beta_end - self.beta_start) / (self.steps - 1)
        pairs, pyramid = n * (n - 1.0) / 2.0, (n - 1.0) * n * (2.0 * n - 1.0) / 6.0  # Σ j and Σ j² over j < n
        sum_beta = first * n + slope * pairs
        sum_beta_squared = first**2 * n + 2.0 * first * slope * pairs + slope**2 * pyramid
        return _clipped(_logsnr_of_log_alpha_bar(sum_beta + 0.5 * sum_beta_squared), self.clip)


@dataclasses.dataclass(frozen=True)
class EDM(_VariancePreserving):
    """EDM (arXiv 2206.00364): noise of standard deviation s added to x₀, scaled here to unit variance.

    s(t) = (s_min^(1/ρ) + t (s_max^(1/ρ) − s_min^(1/ρ)))^ρ (Eq. 5), α = 1/√(1+s²), σ = s/√(1+s²), λ = −2 log s. Uniform
    steps in t are therefore EDM's sampling steps. EDM trains with `LogNormalTimes()`. The clean end t = 0 has s_min, a
    thousandth of the image's range, not 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    clip: float = 20.0

    def __post_init__(self):
        _check_clip(self.clip)
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if not 0.0 < self.rho < math.inf:
            raise ValueError(f"EDM needs a finite rho above 0, not {self.rho}")

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        low, high = self.sigma_min ** (1.0 / self.rho), self.sigma_max ** (1.0 / self.rho)
        return _clipped(-2.0 * self.rho * jnp.log(low + at_least_float32(t) * (high - low)), self.clip)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(_Continuous):
    """Straight paths (arXiv 2209.03003): α = 1 − t, σ = t, so λ = 2 log((1−t)/t) + shift, α = sigmoid(λ/2), σ = 1 − α.

    The shift is added to the log-SNR, as for `CosineSchedule`; the factor s of Stable Diffusion 3 is shift = −2 log s.
    """

    shift: float = 0.0
    clip: float = 20.0

    def __post_init__(self):
        _check_clip(self.clip)
        _check_finite("shift", self.shift)

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        t = at_least_float32(t)
        return _clipped(2.0 * (_log(1.0 - t) - _log(t)) + self.shift, self.clip)

    def alpha(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        return jax.nn.sigmoid(0.5 * self.logsnr(t))

    def sigma(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        return jax.nn.sigmoid(-0.5 * self.logsnr(t))


@dataclasses.dataclass(frozen=True)
class TabulatedSchedule(_VariancePreserving):
    """A table ᾱ_0 > ᾱ_1 > … of N steps (DDPM, DeepFloyd IF, Stable Diffusion) mapped to continuous time.

    Table index i (the integer timestep of the network's training) is at t = (i + 1)/N, so that t = 0 is the clean image
    and t = 1 the last entry; `time` and `network_time` convert. Between entries log ᾱ is interpolated linearly.
    """

    alpha_bar: tuple[float, ...] = dataclasses.field(repr=False)
    clip: float = 20.0

    def __post_init__(self):
        _check_clip(self.clip)
        table = np.asarray(self.alpha_bar)
        if table.ndim != 1 or table.size < 1 or not (np.all(table > 0) and np.all(np.diff(table, prepend=1.0) < 0)):
            raise ValueError("a discrete schedule needs decreasing alpha_bar values between 1 and 0")

    @classmethod
    def from_betas(cls, betas: np.ndarray, clip: float = 20.0) -> "TabulatedSchedule":
        """ᾱ_i = Π_{j≤i} (1 − β_j)."""
        return cls(tuple(np.cumprod(1.0 - np.asarray(betas, np.float64)).tolist()), clip)

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "TabulatedSchedule":
        """β evenly spaced (DDPM, arXiv 2006.11239)."""
        _check_betas(steps, beta_start, beta_end)
        return cls.from_betas(np.linspace(beta_start, beta_end, steps))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "TabulatedSchedule":
        """√β evenly spaced (latent diffusion)."""
        _check_betas(steps, beta_start, beta_end)
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> "TabulatedSchedule":
        """β_i = min(1 − f(i+1)/f(i), max_beta), f(i) = cos²(π/2 · (i/N + s)/(1 + s)) (arXiv 2102.09672, Eq. 17)."""
        _check_betas(steps, max_beta, max_beta)
        f = np.cos((np.arange(steps + 1) / steps + offset) / (1.0 + offset) * np.pi / 2.0) ** 2
        return cls.from_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta))

    def zero_terminal_snr(self, last: float = 0.0) -> "TabulatedSchedule":
        """The table with a last entry of pure noise: √ᾱ is shifted and scaled so that the last one is 0 and the first
        one is kept (arXiv 2305.08891, Algorithm 1). For v and x₀ prediction.

        last: ᾱ of the last entry, at least that of the clipped log-SNR (2e-9 by default). diffusers has 0 in DDPM and
        DDIM, 2⁻²⁴ in Euler and DPM-Solver. ValueError if it is not below that of the entry before.
        """
        root = np.sqrt(self.alpha_bar)
        rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        least = 1.0 / (1.0 + math.exp(self.clip))
        return TabulatedSchedule((*rescaled[:-1].tolist(), max(last, least)), self.clip)

    @property
    def steps(self) -> int:
        """N, the number of entries."""
        return len(self.alpha_bar)

    def time(self, timestep: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        """The time t of a table index."""
        return (at_least_float32(timestep) + 1.0) / self.steps

    def network_time(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        """The table index at t (fractional between entries; −1 at t = 0)."""
        entry = at_least_float32(t) * self.steps - 1.0
        # Round to the exact index at an entry: float32 errors in t would be visible in the network's time embedding.
        nearest = jnp.round(entry)
        return jnp.where(jnp.abs(entry - nearest) < 1e-3, nearest, entry)

    def level_time(self, level: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time of table entry `level` · N, so that level 0 is the first entry, not the clean image."""
        return self.time(jnp.clip(jnp.round(at_least_float32(level) * self.steps), 0.0, self.steps - 1.0))

    def entry_time(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The time of entry i if i/N ≤ t < (i + 1)/N, and of the last entry at t = 1."""
        return jnp.minimum(jnp.floor(at_least_float32(t) * self.steps) + 1.0, self.steps) / self.steps

    def logsnr(self, t: Float[Array, "*s"] | float) -> Float[Array, "*s"]:
        t = at_least_float32(t)
        knots, values = _table(self.alpha_bar)
        minus_log = jnp.interp(t * self.steps, jnp.asarray(knots, t.dtype), jnp.asarray(values, t.dtype))
        return _clipped(_logsnr_of_log_alpha_bar(minus_log), self.clip)


def time_of(schedule: Schedule, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The t at which the schedule has this log-SNR (outside its range, the nearer end), by bisection."""
    logsnr = at_least_float32(logsnr)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        cleaner = schedule.logsnr(middle) > logsnr
        return jnp.where(cleaner, middle, low), jnp.where(cleaner, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(logsnr), jnp.ones_like(logsnr)))
    # The log-SNR is flat at the clipped ends: map values at or beyond an end to that end.
    ends = jnp.where(logsnr >= schedule.logsnr(jnp.zeros_like(logsnr)), 0.0, 0.5 * (low + high))
    return jnp.where(logsnr <= schedule.logsnr(jnp.ones_like(logsnr)), 1.0, ends)


def at_least_float32(value) -> Array:
    """`value` as an array of at least float32: schedules never run in the network's bfloat16."""
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


@functools.lru_cache(maxsize=32)
def _table(alpha_bar: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Knots 0…N and −log ᾱ at them, starting with the clean image."""
    return np.arange(len(alpha_bar) + 1.0), np.concatenate([[0.0], -np.log(np.asarray(alpha_bar))])


def _logsnr_of_log_alpha_bar(minus_log: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """λ = log(ᾱ/(1 − ᾱ)) from a = −log ᾱ: −a − log(1 − e^(−a)), exact to rounding for small and large a."""
    return -minus_log - _log(-jnp.expm1(-minus_log))


def _log(value: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.log(jnp.maximum(value, _TINY))


def _clipped(logsnr: Float[Array, "*s"], clip: float) -> Float[Array, "*s"]:
    return jnp.clip(logsnr, -clip, clip)


def _check_clip(clip: float) -> None:
    if not 0.0 < clip <= 40.0:
        raise ValueError(f"clip is a bound on the log-SNR, above 0 and at most 40 (beyond, float32 fails), not {clip}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")


def _check_betas(steps: int, start: float, end: float) -> None:
    if steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, not {steps}")
    if not 0.0 < start <= end < 1.0:
        raise ValueError(f"a schedule needs 0 < beta_start <= beta_end < 1, not {start} and {end}")

"""Training losses: a weighted mean-squared error of the network's prediction.

A weighting is a frozen dataclass whose `weight(logsnr, prediction)` is the factor on the squared error of that
prediction's target, at times from a `TimeSampler`. A weighting is defined for the x₀ or ε error and is independent of
the network's prediction: `parameterization.log_error_ratio` converts it to each target's factor.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.parameterization import Prediction, log_error_ratio, target
from jaxdiff.diffusion.samplers import ancestral_deviation
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.time_grid import TimeGrid, time_grid_at


@runtime_checkable
class Weighting(Protocol):
    def weight(self, logsnr: Float[Array, " b"], prediction: Prediction) -> Float[Array, " b"]: ...


@dataclasses.dataclass(frozen=True)
class UniformWeighting:
    """Factor 1 on the squared error of the prediction (for ε: DDPM's L_simple and Imagen's loss)."""

    def weight(self, logsnr: Float[Array, " b"], prediction: Prediction) -> Float[Array, " b"]:
        return jnp.ones_like(logsnr)


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """min(SNR, γ) on the x₀ error (arXiv 2303.09556, Sec. 3.4), and not below `floor`.

    Factors, with S = e^λ and m = max(min(S, γ), floor): x₀: m; ε: m/S; v: m/(S + 1); velocity: m/(1 + √S)². The paper
    has no floor (0). A floor of 1 is the truncated SNR of progressive distillation (arXiv 2202.00512, Sec. 4): with x₀
    prediction, the loss does not vanish at high noise, where the text matters most.
    """

    gamma: float = 5.0
    floor: float = 0.0

    def __post_init__(self):
        if not 0.0 < self.gamma < math.inf:
            raise ValueError(f"min-SNR needs a finite gamma above 0, not {self.gamma}")
        if not 0.0 <= self.floor <= self.gamma:
            raise ValueError(f"min-SNR's floor must lie between 0 and gamma {self.gamma}, not {self.floor}")

    def weight(self, logsnr: Float[Array, " b"], prediction: Prediction) -> Float[Array, " b"]:
        lowest = math.log(self.floor) if self.floor else -math.inf
        wanted = jnp.clip(logsnr, lowest, math.log(self.gamma))
        return jnp.exp(wanted - log_error_ratio(prediction, logsnr))


@dataclasses.dataclass(frozen=True)
class PowerSNR:
    """SNR^power on the x₀ error, with the log-SNR clipped to [`lowest`, `highest`].

    Factors, with W = e^(power · clip(λ)) and S = e^λ: x₀: W; ε: W/S; v: W/(S + 1); velocity: W/(1 + √S)². Power 0 is
    the plain x₀ error, power 1 (within the limits) the plain ε error. In between lies the power at which all noise
    levels have about the same loss, to which learned weights converge (EDM2, arXiv 2312.02696): about a fifth for flat
    images.
    """

    power: float = 0.5
    lowest: float = -10.0
    highest: float = 4.0

    def __post_init__(self):
        if not math.isfinite(self.power):
            raise ValueError(f"power must be finite, not {self.power}")
        if not -math.inf < self.lowest <= self.highest < math.inf:
            raise ValueError(f"log-SNR cannot be clipped to [{self.lowest}, {self.highest}]")

    def weight(self, logsnr: Float[Array, " b"], prediction: Prediction) -> Float[Array, " b"]:
        wanted = self.power * jnp.clip(logsnr, self.lowest, self.highest)
        return jnp.exp(wanted - log_error_ratio(prediction, logsnr))


@dataclasses.dataclass(frozen=True)
class SigmoidWeighting:
    """sigmoid(b − λ) on the ε error (arXiv 2303.00848; simpler diffusion, arXiv 2410.19324).

    Factors, with S = e^λ: ε: sigmoid(b − λ); x₀: S sigmoid(b − λ) = e^b sigmoid(λ − b); v: S sigmoid(b − λ)/(S + 1);
    velocity: S sigmoid(b − λ)/(1 + √S)². The papers write the loss as an integral over λ; at uniform times this
    weighting lacks their factor −dλ/dt.
    """

    bias: float = -1.0

    def __post_init__(self):
        if not math.isfinite(self.bias):
            raise ValueError(f"the sigmoid weighting needs a finite bias, not {self.bias}")

    def weight(self, logsnr: Float[Array, " b"], prediction: Prediction) -> Float[Array, " b"]:
        return jnp.exp(jax.nn.log_sigmoid(self.bias - logsnr) + logsnr - log_error_ratio(prediction, logsnr))


def variance_loss(
    schedule: TabulatedSchedule,
    gamma: Float[Array, "b *s"],
    x0: Float[Array, "b *s"],
    predicted: Float[Array, "b *s"],
    x: Float[Array, "b *s"],
    t: Float[Array, " b"],
    weight: float = 0.001,
) -> Float[Array, " b"]:
    """The loss of a learned variance: the variational bound of one step of the table, in bits per value, times `weight`
    and N (improved DDPM, arXiv 2102.09672, Eq. 16, where the bound is the sum over all N steps).

    It is the KL divergence of the true step's distribution given x₀ from the sampler's (`DDPM` with this γ).
    predicted: the network's x₀ without its gradient, since the bound trains only γ. At the first entry, whose true step
    has no variance, it is −log of the probability that the sampler assigns to the interval of 1/255 around x₀.
    """
    step = 1.0 / schedule.steps
    wide = (-1,) + (1,) * (x.ndim - 1)
    here, before = (time_grid_at(schedule, jnp.maximum(time, 0.0).reshape(wide)) for time in (t, t - step))
    # The lower bound of the variance is 0 at the first entry; use that of the second.
    second = time_grid_at(schedule, jnp.asarray([2.0 * step, step]))
    least = 2.0 * jnp.log(ancestral_deviation(_point(second, 0), _point(second, 1), 0.0))
    first = (t < 1.5 * step).reshape(wide)
    low = jnp.where(first, least, 2.0 * jnp.log(ancestral_deviation(here, before, 0.0)))
    high = 2.0 * jnp.log(ancestral_deviation(here, before, 1.0))
    log_variance = (1.0 - gamma) * low + gamma * high
    fresh = -jnp.expm1(here.logsnr - before.logsnr)
    difference = fresh * before.alpha * (x0 - predicted)  # of the means: the x terms cancel
    divergence = 0.5 * (log_variance - low + jnp.expm1(low - log_variance) + difference**2 * jnp.exp(-log_variance))
    likelihood = -_log_density(x0, predicted, 0.5 * log_variance)
    bits = jnp.where(first, likelihood, divergence) / math.log(2.0)
    return weight * schedule.steps * jnp.mean(bits, axis=tuple(range(1, x.ndim)))


def _log_density(x0: Float[Array, "b *s"], mean: Float[Array, "b *s"], log_deviation: Float[Array, "b *s"]) -> Array:
    """log of a normal distribution's mass within 1/255 of x₀; the outermost of the 256 levels extend to infinity."""
    scale = jnp.exp(-log_deviation)
    above = jax.scipy.special.ndtr(scale * (x0 + 1.0 / 255.0 - mean))
    below = jax.scipy.special.ndtr(scale * (x0 - 1.0 / 255.0 - mean))
    probability = jnp.where(x0 > 0.999, 1.0 - below, jnp.where(x0 < -0.999, above, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _point(grid: TimeGrid, i: int) -> TimeGrid:
    return TimeGrid(*(values[i] for values in grid))


def diffusion_loss(
    network_output: Float[Array, "b *s"],
    prediction: Prediction,
    x0: Float[Array, "b *s"],
    eps: Float[Array, "b *s"],
    alpha: Float[Array, " b"],
    sigma: Float[Array, " b"],
    weighting: Weighting,
) -> Float[Array, " b"]:
    """The weighted mean-squared error of each sample, over its own axes, in float32."""
    expected = target(prediction, x0, eps, alpha, sigma)
    error = jnp.square(network_output.astype(expected.dtype) - expected)
    logsnr = 2.0 * (jnp.log(alpha) - jnp.log(sigma))
    return weighting.weight(logsnr, prediction) * jnp.mean(error, axis=tuple(range(1, error.ndim)))

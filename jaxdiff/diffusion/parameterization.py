"""Parameterizations of the network's prediction, and their conversion to the clean image and the noise.

With x = α x₀ + σ ε and r = √(α² + σ²) (1 for variance-preserving schedules):

    ε          the noise                                 x₀ = (x − σ ε)/α
    x₀         the clean image                         ε  = (x − α x₀)/σ
    v          (α ε − σ x₀)/r      (arXiv 2202.00512)    x₀ = (α x/r − σ v)/r,   ε = (σ x/r + α v)/r
    velocity   ε − x₀              (rectified flow)      x₀ = (x − σ u)/(α + σ), ε = (x + α u)/(α + σ)

Schedules keep α and σ above zero, so nothing here divides by zero. The arithmetic is in at least float32. Samplers see
only x₀ and ε. All shapes are (b, …); α and σ are (b,), one per sample, or scalars.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Coefficient = Float[Array, "..."] | float  # α or σ


class Prediction(enum.Enum):
    """The meaning of the network's output."""

    EPSILON = "epsilon"
    X0 = "x0"
    V = "v"
    VELOCITY = "velocity"


class Denoised(NamedTuple):
    """A prediction for samplers; x = α x0 + σ eps, unless x0 was thresholded and eps kept."""

    x0: Float[Array, "b *s"]
    eps: Float[Array, "b *s"]


class DenoisedWithVariance(NamedTuple):
    """`Denoised` with a learned variance: gamma interpolates the log variance of a step between its bounds
    (`samplers.DDPM`)."""

    x0: Float[Array, "b *s"]
    eps: Float[Array, "b *s"]
    gamma: Float[Array, "b *s"]


def noised(
    x0: Float[Array, "b *s"], eps: Float[Array, "b *s"], alpha: Coefficient, sigma: Coefficient
) -> Float[Array, "b *s"]:
    """x = α x₀ + σ ε."""
    x0, eps, alpha, sigma = _align(x0, eps, alpha, sigma)
    return alpha * x0 + sigma * eps


def denoised(
    prediction: Prediction,
    output: Float[Array, "b *s"],
    x: Float[Array, "b *s"],
    alpha: Coefficient,
    sigma: Coefficient,
) -> Denoised:
    """Convert the network's output at x to x₀ and ε."""
    return _FORMS[prediction].denoise(*_align(output, x, alpha, sigma))


def target(
    prediction: Prediction,
    x0: Float[Array, "b *s"],
    eps: Float[Array, "b *s"],
    alpha: Coefficient,
    sigma: Coefficient,
) -> Float[Array, "b *s"]:
    """The network's target at x = α x₀ + σ ε."""
    return _FORMS[prediction].target(*_align(x0, eps, alpha, sigma))


def from_x0(x0: Float[Array, "b *s"], x: Float[Array, "b *s"], alpha: Coefficient, sigma: Coefficient) -> Denoised:
    """x₀ with the ε implied by x, for samplers after x₀ was thresholded."""
    return denoised(Prediction.X0, x0, x, alpha, sigma)


def log_error_ratio(prediction: Prediction, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log of |error of the target|² / |error of x₀|² at the same x, to convert loss weights between targets.

    With λ the log-SNR: ε: λ; x₀: 0; v: log(1 + e^λ); velocity: 2 log(1 + e^(λ/2)).
    """
    return _FORMS[prediction].log_error_ratio(logsnr)


class _Form(NamedTuple):
    denoise: Callable[[Array, Array, Array, Array], Denoised]  # output, x, α, σ
    target: Callable[[Array, Array, Array, Array], Array]  # x₀, ε, α, σ
    log_error_ratio: Callable[[Array], Array]  # λ


def _denoise_v(v: Array, x: Array, alpha: Array, sigma: Array) -> Denoised:
    radius = jnp.sqrt(alpha**2 + sigma**2)
    x, alpha, sigma = x / radius, alpha / radius, sigma / radius
    return Denoised(alpha * x - sigma * v, sigma * x + alpha * v)


def _denoise_velocity(u: Array, x: Array, alpha: Array, sigma: Array) -> Denoised:
    total = alpha + sigma
    return Denoised((x - sigma * u) / total, (x + alpha * u) / total)


_FORMS = {
    Prediction.EPSILON: _Form(
        denoise=lambda eps, x, alpha, sigma: Denoised((x - sigma * eps) / alpha, eps),
        target=lambda x0, eps, alpha, sigma: eps,
        log_error_ratio=lambda logsnr: logsnr,
    ),
    Prediction.X0: _Form(
        denoise=lambda x0, x, alpha, sigma: Denoised(x0, (x - alpha * x0) / sigma),
        target=lambda x0, eps, alpha, sigma: x0,
        log_error_ratio=jnp.zeros_like,
    ),
    Prediction.V: _Form(
        denoise=_denoise_v,
        target=lambda x0, eps, alpha, sigma: (alpha * eps - sigma * x0) / jnp.sqrt(alpha**2 + sigma**2),
        log_error_ratio=jax.nn.softplus,
    ),
    Prediction.VELOCITY: _Form(
        denoise=_denoise_velocity,
        target=lambda x0, eps, alpha, sigma: eps - x0,
        log_error_ratio=lambda logsnr: 2.0 * jax.nn.softplus(0.5 * logsnr),
    ),
}


def _align(first: Array, second: Array, alpha: Coefficient, sigma: Coefficient) -> tuple[Array, Array, Array, Array]:
    """All four in one precision (at least float32), α and σ with axes of size 1 after the batch axis."""
    dtype = jnp.promote_types(jnp.result_type(first, second), jnp.float32)

    def coefficient(value):
        value = jnp.asarray(value, dtype)
        return value.reshape(value.shape + (1,) * (first.ndim - value.ndim)) if value.ndim else value

    return first.astype(dtype), second.astype(dtype), coefficient(alpha), coefficient(sigma)

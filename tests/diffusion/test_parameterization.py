"""Predictions: every one turns back into the x₀ and ε it was made from, on every schedule, at its clipped ends too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.parameterization import Prediction, denoised, from_x0, log_error_ratio, noised, target
from jaxdiff.diffusion.schedules import EDM, CosineSchedule, LinearBetaSchedule, RectifiedFlow, TabulatedSchedule

SCHEDULES = [CosineSchedule(), LinearBetaSchedule(), EDM(), RectifiedFlow(), TabulatedSchedule.cosine()]
TIMES = jnp.array([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])


def _pair(b):
    x0, eps = jax.random.normal(jax.random.key(0), (2, b, 4, 4, 3))
    return jnp.clip(x0, -1, 1), eps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", Prediction)
def test_round_trip(prediction, schedule):
    x0, eps = _pair(len(TIMES))
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    x = noised(x0, eps, alpha, sigma)
    found = denoised(prediction, target(prediction, x0, eps, alpha, sigma), x, alpha, sigma)
    # What float32 allows: ε predictions lose x₀ where α is small, x₀ predictions ε where σ is.
    x0_error = {Prediction.EPSILON: 3e-7 / alpha}.get(prediction, jnp.zeros_like(alpha)) + 3e-6
    eps_error = {Prediction.X0: 3e-7 / sigma}.get(prediction, jnp.zeros_like(sigma)) + 3e-6
    assert np.all(jnp.max(jnp.abs(found.x0 - x0), axis=(1, 2, 3)) < x0_error)
    assert np.all(jnp.max(jnp.abs(found.eps - eps), axis=(1, 2, 3)) < eps_error)


@pytest.mark.parametrize("a,b", list(itertools.permutations(Prediction, 2)))
def test_one_prediction_into_another_and_back(a, b):
    """Any output, not only a true target: through x₀ and ε into b's terms, and back."""
    t = jnp.array([0.2, 0.5, 0.8])
    alpha, sigma = CosineSchedule().alpha(t), CosineSchedule().sigma(t)
    x, output = _pair(3)
    there = denoised(a, output, x, alpha, sigma)
    np.testing.assert_allclose(noised(*there, alpha, sigma), x, atol=3e-6)
    back = denoised(b, target(b, *there, alpha, sigma), x, alpha, sigma)
    np.testing.assert_allclose(target(a, *back, alpha, sigma), output, atol=1e-5)


def test_v_and_velocity_are_derivatives_along_the_path():
    """v = dx/dφ for α = cos φ, σ = sin φ; the velocity is dx/dt for α = 1 − t, σ = t."""
    x0, eps = _pair(1)
    t, one = jnp.array([0.3]), jnp.ones(1)
    turn = lambda phi: noised(x0, eps, jnp.cos(phi), jnp.sin(phi))  # noqa: E731
    v = target(Prediction.V, x0, eps, jnp.cos(t), jnp.sin(t))
    np.testing.assert_allclose(jax.jvp(turn, (t,), (one,))[1], v, atol=1e-5)
    straight = lambda t: noised(x0, eps, 1 - t, t)  # noqa: E731
    velocity = target(Prediction.VELOCITY, x0, eps, 1 - t, t)
    np.testing.assert_allclose(jax.jvp(straight, (t,), (one,))[1], velocity, atol=1e-5)


@pytest.mark.parametrize("prediction", Prediction)
def test_error_ratio_is_the_ratio_of_errors(prediction):
    """|error of the target|² / |error of x₀|² when a network errs in x₀ at a given x."""
    t = jnp.array([0.05, 0.4, 0.7, 0.97])
    x0, eps = _pair(4)
    alpha, sigma = CosineSchedule().alpha(t), CosineSchedule().sigma(t)
    x, wrong = noised(x0, eps, alpha, sigma), x0 + 0.1 * eps[::-1]
    error = target(prediction, *from_x0(wrong, x, alpha, sigma), alpha, sigma) - target(
        prediction, x0, eps, alpha, sigma
    )
    ratio = jnp.sum(error**2, axis=(1, 2, 3)) / jnp.sum((wrong - x0) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(jnp.log(ratio), log_error_ratio(prediction, CosineSchedule().logsnr(t)), atol=2e-3)


@pytest.mark.parametrize("prediction", Prediction)
def test_computed_in_float32(prediction):
    x, output = (v.astype(jnp.bfloat16) for v in _pair(2))
    alpha = sigma = jnp.full((2,), 0.5**0.5)
    assert {v.dtype for v in denoised(prediction, output, x, alpha, sigma)} <= {jnp.dtype("float32")}
    assert target(prediction, x, output, alpha, sigma).dtype == jnp.float32
    assert noised(x, output, alpha, sigma).dtype == jnp.float32

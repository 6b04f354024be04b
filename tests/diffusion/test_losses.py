"""Loss weights: their closed forms, and that a weighting means the same whatever the network predicts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.losses import (
    MinSNR,
    PowerSNR,
    SigmoidWeighting,
    UniformWeighting,
    Weighting,
    diffusion_loss,
    variance_loss,
)
from jaxdiff.diffusion.parameterization import Prediction, from_x0, noised, target
from jaxdiff.diffusion.schedules import CosineSchedule, RectifiedFlow, TabulatedSchedule

LOGSNR = jnp.linspace(-20.0, 20.0, 41)
SNR = np.exp(np.asarray(LOGSNR, np.float64))


def test_min_snr_closed_forms():
    """arXiv 2303.09556: ε min(S, γ)/S, x₀ min(S, γ), v min(S, γ)/(S + 1); and for the velocity, min(S, γ)/(1 + √S)²."""
    capped = np.minimum(SNR, 5.0)
    expected = {
        Prediction.EPSILON: capped / SNR,
        Prediction.X0: capped,
        Prediction.V: capped / (SNR + 1),
        Prediction.VELOCITY: capped / (1 + np.sqrt(SNR)) ** 2,
    }
    for prediction in Prediction:
        np.testing.assert_allclose(MinSNR(5.0).weight(LOGSNR, prediction), expected[prediction], rtol=1e-4)


def test_min_snr_floor():
    """Truncated SNR, max(min(S, 5), 1) on the x₀ error; in ε's terms it grows as 1/S at high noise."""
    weight = np.clip(SNR, 1.0, 5.0)
    np.testing.assert_allclose(MinSNR(5.0, floor=1.0).weight(LOGSNR, Prediction.X0), weight, rtol=1e-4)
    np.testing.assert_allclose(MinSNR(5.0, floor=1.0).weight(LOGSNR, Prediction.EPSILON), weight / SNR, rtol=1e-4)


def test_sigmoid_closed_forms():
    gate = 1 / (1 + np.exp(np.asarray(LOGSNR, np.float64) + 2.0))  # sigmoid(b − λ) with b = −2
    np.testing.assert_allclose(SigmoidWeighting(-2.0).weight(LOGSNR, Prediction.EPSILON), gate, rtol=1e-4)
    flipped = np.exp(-2.0) / (1 + np.exp(-2.0 - np.asarray(LOGSNR, np.float64)))  # e^b sigmoid(λ − b)
    np.testing.assert_allclose(SigmoidWeighting(-2.0).weight(LOGSNR, Prediction.X0), flipped, rtol=1e-4)


def test_power_snr_lies_between_the_plain_errors():
    """√S on the x₀ error within its limits; power 0 is the plain x₀ error, power 1 the plain ε error."""
    root = np.sqrt(np.clip(SNR, np.exp(-10.0), np.exp(4.0)))
    np.testing.assert_allclose(PowerSNR(0.5).weight(LOGSNR, Prediction.X0), root, rtol=1e-4)
    np.testing.assert_allclose(PowerSNR(0.5).weight(LOGSNR, Prediction.EPSILON), root / SNR, rtol=1e-4)
    np.testing.assert_allclose(PowerSNR(0.0).weight(LOGSNR, Prediction.X0), 1.0)
    np.testing.assert_allclose(PowerSNR(1.0, -20.0, 20.0).weight(LOGSNR, Prediction.EPSILON), 1.0, rtol=1e-4)


@pytest.mark.parametrize("weighting", [UniformWeighting(), MinSNR(), PowerSNR(), SigmoidWeighting()], ids=str)
def test_finite_at_the_clipped_ends(weighting):
    assert isinstance(weighting, Weighting)
    for prediction in Prediction:
        weight = weighting.weight(LOGSNR, prediction)
        assert np.all(np.isfinite(weight)) and np.all(weight > 0) and weight.dtype == jnp.float32


def _losses(weighting, schedule):
    """The loss of one and the same wrong guess of x₀, told in terms of each prediction."""
    t = jnp.array([0.05, 0.3, 0.6, 0.95])
    x0, eps, wrong = jax.random.normal(jax.random.key(0), (3, 4, 4, 4, 3))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    guess = from_x0(x0 + 0.1 * wrong, noised(x0, eps, alpha, sigma), alpha, sigma)
    return {p: diffusion_loss(target(p, *guess, alpha, sigma), p, x0, eps, alpha, sigma, weighting) for p in Prediction}


@pytest.mark.parametrize("weighting", [MinSNR(), PowerSNR(), SigmoidWeighting()], ids=str)
@pytest.mark.parametrize("schedule", [CosineSchedule(), RectifiedFlow()], ids=str)
def test_same_loss_whatever_is_predicted(weighting, schedule):
    losses = _losses(weighting, schedule)
    for prediction in Prediction:
        np.testing.assert_allclose(losses[prediction], losses[Prediction.X0], rtol=2e-3)


def test_simple_is_not_the_same_for_all():
    losses = _losses(UniformWeighting(), CosineSchedule())
    assert np.all(np.abs(losses[Prediction.EPSILON] / losses[Prediction.X0] - 1) > 0.1)


def test_loss_is_the_mean_of_squares_of_each_sample():
    x0, eps = jnp.zeros((2, 4, 4, 3)), jnp.stack([jnp.ones((4, 4, 3)), 2 * jnp.ones((4, 4, 3))])
    half = jnp.full((2,), 0.5**0.5)
    output = jnp.zeros((2, 4, 4, 3), jnp.bfloat16)
    loss = diffusion_loss(output, Prediction.EPSILON, x0, eps, half, half, UniformWeighting())
    np.testing.assert_allclose(loss, [1.0, 4.0])
    assert loss.dtype == jnp.float32


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="gamma"):
        MinSNR(0.0)
    with pytest.raises(ValueError, match="floor"):
        MinSNR(1.0, floor=2.0)
    with pytest.raises(ValueError, match="bias"):
        SigmoidWeighting(float("inf"))
    with pytest.raises(ValueError, match="power"):
        PowerSNR(float("nan"))
    with pytest.raises(ValueError, match="log-SNR"):
        PowerSNR(lowest=3.0, highest=-3.0)


# The variance


TABLE = TabulatedSchedule.cosine()


def _variance_loss(entry, gamma, x0, predicted, schedule=TABLE):
    """Of one sample; x itself is in both steps alike."""
    x0, predicted, gamma = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), (1, 4, 4, 3)) for a in (x0, predicted, gamma))
    t = schedule.time(jnp.full(1, entry, jnp.float32))
    return variance_loss(schedule, gamma, x0, predicted, jnp.zeros_like(x0), t)[0]


def _steps(entry, schedule=TABLE):
    """Of DDPM's Eq. 6 and 7, in float64: the true step's variance, β, and the factor of x₀ in the mean."""
    after, before = schedule.alpha_bar[entry], schedule.alpha_bar[entry - 1] if entry else 1.0
    beta = 1 - after / before
    return beta * (1 - before) / (1 - after), beta, np.sqrt(before) * beta / (1 - after)


@pytest.mark.parametrize("entry", [1, 2, 37, 500, 731, 998, 999])
def test_variance_loss_is_the_divergence_of_two_steps(entry):
    """KL(N(m, v) ‖ N(m', v')) in bits, averaged over values, times 0.001 and the number of steps that an image has."""
    rng = np.random.default_rng(entry)
    gamma, x0, wrong = rng.uniform(size=(4, 4, 3)), rng.uniform(-1, 1, (4, 4, 3)), 0.3 * rng.normal(size=(4, 4, 3))
    for schedule in (TABLE, TabulatedSchedule.cosine(4000)):
        small, beta, factor = _steps(entry, schedule)
        variance = small ** (1 - gamma) * beta**gamma
        bits = (np.log(variance / small) + (small + (factor * wrong) ** 2) / variance - 1) / (2 * np.log(2))
        wanted = 0.001 * schedule.steps * bits.mean()
        found = _variance_loss(entry, gamma, x0, x0 + wrong, schedule)
        np.testing.assert_allclose(found, wanted, rtol=3e-3, atol=1e-6)


def test_variance_loss_of_the_first_entry_is_a_likelihood():
    """−log of the share of a normal distribution in the 256th of the range around x₀; the outermost ones are open."""
    first, second = _steps(0), _steps(1)
    deviation = np.exp(0.5 * (0.7 * np.log(second[0]) + 0.3 * np.log(first[1])))

    def below(x):
        return 0.5 * (1 + math.erf(x / deviation / math.sqrt(2)))

    half = 1 / 255
    for x0, lower, upper in ((0.2, 0.2 - half, 0.2 + half), (1.0, 1.0 - half, np.inf), (-1.0, -np.inf, half - 1.0)):
        share = below(upper - x0 - 0.01) - below(lower - x0 - 0.01)
        found = _variance_loss(0, 0.3, x0, x0 + 0.01)
        np.testing.assert_allclose(found, -np.log2(share), rtol=2e-3)
    for far in (0.0, 3.0):  # however wrong, no share is so small that its logarithm is infinite
        assert np.isfinite(_variance_loss(0, 0.5, 0.0, far))
    # A tighter distribution around what is right has the greater share.
    assert _variance_loss(0, 0.0, 0.2, 0.2) < _variance_loss(0, 1.0, 0.2, 0.2)


@pytest.mark.parametrize("entry", [1, 30, 500])
def test_the_variance_that_is_learned(entry):
    """Where x₀ is exact the true step's own variance is best, which is γ = 0; a wrong x₀ asks for more."""
    exact = [_variance_loss(entry, gamma, 0.3, 0.3) for gamma in (0.0, 0.1, 0.5, 1.0)]
    assert abs(exact[0]) < 1e-6 and np.all(np.diff(exact) > 0)
    # The best variance is β̃ + d², where d is the mean's error; in the middle of the bounds for this one.
    small, beta, factor = _steps(entry)
    error = np.sqrt(np.sqrt(small * beta) - small) / factor
    slope = jax.grad(lambda gamma: _variance_loss(entry, gamma, 0.0, error))
    curvature = slope(0.6) - slope(0.4)
    assert slope(0.4) < 0 < slope(0.6) and abs(slope(0.5)) < 0.02 * curvature


def test_the_bound_teaches_the_variance_alone():
    """As `Stage.loss` calls it: what it says of x₀ is not moved by it."""

    def loss(predicted, gamma):
        return _variance_loss(300, gamma, 0.1, jax.lax.stop_gradient(predicted))

    of_x0, of_gamma = jax.grad(loss, (0, 1))(0.4, 0.2)
    assert of_x0 == 0.0 and of_gamma != 0.0

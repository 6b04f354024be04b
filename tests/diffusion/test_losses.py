"""Loss weights: their closed forms, and that a weighting means the same whatever the network predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.losses import MinSNR, PowerSNR, Sigmoid, Simple, Weighting, diffusion_loss
from jaxdiff.diffusion.parameterization import Prediction, from_x0, noised, target
from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow

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
    np.testing.assert_allclose(Sigmoid(-2.0).weight(LOGSNR, Prediction.EPSILON), gate, rtol=1e-4)
    flipped = np.exp(-2.0) / (1 + np.exp(-2.0 - np.asarray(LOGSNR, np.float64)))  # e^b sigmoid(λ − b)
    np.testing.assert_allclose(Sigmoid(-2.0).weight(LOGSNR, Prediction.X0), flipped, rtol=1e-4)


def test_power_snr_lies_between_the_plain_errors():
    """√S on the x₀ error within its limits; power 0 is the plain x₀ error, power 1 the plain ε error."""
    root = np.sqrt(np.clip(SNR, np.exp(-10.0), np.exp(4.0)))
    np.testing.assert_allclose(PowerSNR(0.5).weight(LOGSNR, Prediction.X0), root, rtol=1e-4)
    np.testing.assert_allclose(PowerSNR(0.5).weight(LOGSNR, Prediction.EPSILON), root / SNR, rtol=1e-4)
    np.testing.assert_allclose(PowerSNR(0.0).weight(LOGSNR, Prediction.X0), 1.0)
    np.testing.assert_allclose(PowerSNR(1.0, -20.0, 20.0).weight(LOGSNR, Prediction.EPSILON), 1.0, rtol=1e-4)


@pytest.mark.parametrize("weighting", [Simple(), MinSNR(), PowerSNR(), Sigmoid()], ids=str)
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


@pytest.mark.parametrize("weighting", [MinSNR(), PowerSNR(), Sigmoid()], ids=str)
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=str)
def test_same_loss_whatever_is_predicted(weighting, schedule):
    losses = _losses(weighting, schedule)
    for prediction in Prediction:
        np.testing.assert_allclose(losses[prediction], losses[Prediction.X0], rtol=2e-3)


def test_simple_is_not_the_same_for_all():
    losses = _losses(Simple(), Cosine())
    assert np.all(np.abs(losses[Prediction.EPSILON] / losses[Prediction.X0] - 1) > 0.1)


def test_loss_is_the_mean_of_squares_of_each_sample():
    x0, eps = jnp.zeros((2, 4, 4, 3)), jnp.stack([jnp.ones((4, 4, 3)), 2 * jnp.ones((4, 4, 3))])
    half = jnp.full((2,), 0.5**0.5)
    output = jnp.zeros((2, 4, 4, 3), jnp.bfloat16)
    loss = diffusion_loss(output, Prediction.EPSILON, x0, eps, half, half, Simple())
    np.testing.assert_allclose(loss, [1.0, 4.0])
    assert loss.dtype == jnp.float32


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="gamma"):
        MinSNR(0.0)
    with pytest.raises(ValueError, match="floor"):
        MinSNR(1.0, floor=2.0)
    with pytest.raises(ValueError, match="bias"):
        Sigmoid(float("inf"))
    with pytest.raises(ValueError, match="power"):
        PowerSNR(float("nan"))
    with pytest.raises(ValueError, match="log-SNR"):
        PowerSNR(lowest=3.0, highest=-3.0)

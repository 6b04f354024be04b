"""Guidance algebra, in Imagen's convention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.guidance import Guidance, guide
from jaxdiff.diffusion.parameterization import Prediction, denoised
from jaxdiff.diffusion.schedules import CosineSchedule

COND, UNCOND = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))
AT = jnp.array([-3.0, 0.0, 4.0])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_is_exactly_conditional(rescale):
    np.testing.assert_array_equal(Guidance(1.0, rescale=rescale).apply(COND, UNCOND, AT), COND)
    assert not Guidance(1.0).on and Guidance(0.0).on and Guidance(3.0).on


def test_zero_is_exactly_unconditional():
    np.testing.assert_array_equal(Guidance(0.0).apply(COND, UNCOND, AT), UNCOND)


def test_extrapolates_from_the_unconditional():
    """ε̃ = w ε(c) + (1 − w) ε = ε + w (ε(c) − ε), affine in w."""
    np.testing.assert_allclose(guide(COND, UNCOND, 7.5), UNCOND + 7.5 * (COND - UNCOND), atol=1e-5)
    np.testing.assert_allclose(guide(COND, COND, 7.5), COND, atol=1e-5)


def test_a_weight_for_each_sample():
    weights = jnp.array([0.0, 1.0, 4.0])
    got = guide(COND, UNCOND, weights)
    np.testing.assert_array_equal(got[0], UNCOND[0])
    np.testing.assert_array_equal(got[1], COND[1])
    np.testing.assert_array_equal(got[2], guide(COND, UNCOND, 4.0)[2])


def test_the_same_in_every_parameterization():
    """Guiding ε, x₀, v or velocity at the same x is one and the same."""
    t = jnp.array([0.2, 0.5, 0.8])
    alpha, sigma = CosineSchedule().alpha(t), CosineSchedule().sigma(t)
    x = jax.random.normal(jax.random.key(1), COND.shape)
    outer = denoised(Prediction.V, guide(COND, UNCOND, 5.0), x, alpha, sigma)
    branches = (denoised(Prediction.V, branch, x, alpha, sigma) for branch in (COND, UNCOND))
    for inner, expected in zip(zip(*branches), outer):
        np.testing.assert_allclose(guide(*inner, 5.0), expected, atol=1e-5)


def test_outside_the_interval_exactly_conditional():
    guided = Guidance(5.0, interval=(-1.0, 4.0), rescale=0.5).apply(COND, UNCOND, AT)
    np.testing.assert_array_equal(guided[0], COND[0])
    everywhere = Guidance(5.0, rescale=0.5).apply(COND, UNCOND, AT)
    np.testing.assert_array_equal(guided[1:], everywhere[1:])  # the ends belong to it


def test_one_level_for_the_whole_batch():
    np.testing.assert_array_equal(
        Guidance(5.0, interval=(-1.0, 1.0)).apply(COND, UNCOND, jnp.asarray(0.5)), guide(COND, UNCOND, 5.0)
    )


def test_full_rescale_restores_each_samples_deviation():
    guided = Guidance(9.0, rescale=1.0).apply(COND, UNCOND, AT)
    np.testing.assert_allclose(guided.std(axis=(1, 2, 3)), COND.std(axis=(1, 2, 3)), rtol=1e-5)
    plain = guide(COND, UNCOND, 9.0)
    half = Guidance(9.0, rescale=0.5).apply(COND, UNCOND, AT)
    np.testing.assert_allclose(half, 0.5 * (plain + guided), atol=1e-5)


def test_rescale_leaves_the_other_samples_alone():
    guidance = Guidance(9.0, rescale=0.7)
    whole, loud = guidance.apply(COND, UNCOND, AT), guidance.apply(COND.at[1].multiply(100.0), UNCOND, AT)
    np.testing.assert_array_equal(whole[::2], loud[::2])
    np.testing.assert_allclose(guidance.apply(COND[1:2], UNCOND[1:2], AT[1:2])[0], whole[1], atol=1e-5)


def test_a_constant_prediction_does_not_divide_by_zero():
    flat = jnp.ones((1, 4, 4, 3))
    assert np.all(np.isfinite(Guidance(3.0, rescale=1.0).apply(flat, flat, jnp.zeros(1))))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_weight_must_be_finite(weight):
    with pytest.raises(ValueError, match="guidance weight must be finite"):
        Guidance(weight)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, interval=(1.0, -1.0))
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, interval=(float("nan"), 1.0))
    with pytest.raises(ValueError, match="rescale"):
        Guidance(2.0, rescale=1.5)

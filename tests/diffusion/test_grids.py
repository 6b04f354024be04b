"""Grids: ends, spacing, and what the clipped ends do to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.grids import Karras, UniformLogSNR, UniformTime, grid, grid_of
from jaxdiff.diffusion.schedules import EDM, Cosine, Discrete, RectifiedFlow

SPACINGS = [UniformTime(), UniformLogSNR(), Karras()]


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("schedule", [Cosine(), EDM(), RectifiedFlow(), Discrete.scaled_linear()], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_steps_fall_strictly_to_the_clean_end(schedule, spacing, steps):
    points = grid(schedule, steps, spacing)
    assert all(values.shape == (steps + 1,) for values in points)
    assert np.all(np.diff(points.logsnr) > 0) and np.all(np.diff(points.t) < 0)
    assert points.t[-1] == 0.0 and points.logsnr[-1] == schedule.logsnr(0.0)
    assert np.all(np.isfinite(points.logsnr)) and np.all(points.alpha > 0) and np.all(points.sigma > 0)
    np.testing.assert_allclose(points.alpha, schedule.alpha(points.t))


def test_even_times():
    np.testing.assert_allclose(grid(Cosine(), 4).t, [1.0, 0.75, 0.5, 0.25, 0.0])


def test_even_log_snr():
    points = grid(Cosine(), 5, UniformLogSNR(-8.0, 8.0))
    np.testing.assert_allclose(points.logsnr, [-8.0, -4.0, 0.0, 4.0, 8.0, 20.0], atol=1e-4)


def test_karras_levels_on_another_schedule():
    points = grid(Cosine(), 10, Karras())
    levels = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10) ** 7
    np.testing.assert_allclose((points.sigma / points.alpha)[:-1], levels, rtol=1e-3)


def test_karras_on_edm_is_edm():
    np.testing.assert_allclose(grid(EDM(), 10, Karras()).t, grid(EDM(), 10).t, atol=1e-5)


def test_explicit_values_may_end_without_noise():
    points = grid_of(jnp.array([1.0, 0.0]), jnp.array([0.6, 1.0]), jnp.array([0.8, 0.0]))
    np.testing.assert_allclose(points.logsnr, [2 * np.log(0.75), np.inf], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, not {steps}"):
        grid(Cosine(), steps)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="low < high"):
        UniformLogSNR(3.0, -3.0)
    with pytest.raises(ValueError, match="rho"):
        Karras(rho=0.0)

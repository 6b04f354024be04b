"""Thresholding: exact percentiles, the cap, and that no sample sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold, Thresholding

X0 = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)) * jnp.array([0.1, 1.0, 3.0, 50.0]).reshape(4, 1, 1, 1)


def test_percentile_is_exact_on_a_known_array():
    """|x₀| = 0, 1, …, 200 shuffled: the 0.995 quantile is 199, the 0.9925 one 198.5."""
    values = np.random.default_rng(0).permutation(np.arange(201.0)) * np.where(np.arange(201) % 2, 1, -1)
    x0 = jnp.asarray(values.reshape(1, 201), jnp.float32)
    for percentile, scale in ((0.995, 199.0), (0.9925, 198.5), (1.0, 200.0), (0.5, 100.0)):
        expected = np.clip(values, -scale, scale) / scale
        np.testing.assert_allclose(DynamicThreshold(percentile).apply(x0)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("percentile", [0.3, 0.9, 0.995, 0.9999, 1.0])
def test_percentile_is_numpys(percentile):
    scale = np.maximum(np.quantile(np.abs(np.asarray(X0)).reshape(4, -1), percentile, axis=1), 1.0)
    expected = np.clip(X0, -scale[:, None, None, None], scale[:, None, None, None]) / scale[:, None, None, None]
    np.testing.assert_allclose(DynamicThreshold(percentile).apply(X0), expected, rtol=2e-5, atol=1e-6)


def test_percentile_among_equal_values():
    x0 = jnp.concatenate([jnp.zeros((1, 50)), jnp.full((1, 50), 2.0), jnp.full((1, 1), -8.0)], axis=1)
    np.testing.assert_allclose(jnp.max(DynamicThreshold(0.9).apply(x0)), 1.0)
    np.testing.assert_allclose(DynamicThreshold(0.995).apply(x0)[0, 50], 2.0 / 5.0)  # halfway between 2 and 8
    np.testing.assert_allclose(
        DynamicThreshold(0.985).apply(x0)[0, 50], 1.0
    )  # halfway between the last two of the twos


def test_all_in_range_stays():
    small = X0[:1]
    for thresholding in (NoThreshold(), StaticThreshold(), DynamicThreshold()):
        assert isinstance(thresholding, Thresholding)
        np.testing.assert_array_equal(thresholding.apply(small), small)
    np.testing.assert_array_equal(NoThreshold().apply(X0), X0)


@pytest.mark.parametrize("percentile", [0.5, 0.995])
def test_a_cap_of_one_is_static(percentile):
    np.testing.assert_array_equal(DynamicThreshold(percentile, cap=1.0).apply(X0), StaticThreshold().apply(X0))


def test_a_static_limit():
    """One for all samples, or one of each."""
    np.testing.assert_array_equal(StaticThreshold(5.0).apply(X0), np.clip(X0, -5.0, 5.0))
    limits = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    found = jax.jit(lambda limit: StaticThreshold(limit).apply(X0))(limits)
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(found[row], np.clip(X0[row], -limit, limit))
    with pytest.raises(ValueError, match="limit must be above 0 and finite, not 0"):
        StaticThreshold(0.0)


def test_in_range_and_less_saturated_than_static():
    dynamic, static = DynamicThreshold().apply(X0), StaticThreshold().apply(X0)
    assert np.all(np.abs(dynamic) <= 1.0)
    saturated = lambda x: np.mean(np.abs(x) >= 1.0, axis=(1, 2, 3))  # noqa: E731
    assert np.all(saturated(dynamic)[1:] < 0.01) and saturated(static)[3] > 0.9


def test_cap_limits_the_scale():
    np.testing.assert_allclose(DynamicThreshold(cap=1.5).apply(X0)[3], np.clip(X0[3], -1.5, 1.5) / 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    "thresholding", [StaticThreshold(), DynamicThreshold(), DynamicThreshold(0.9, cap=1.5)], ids=str
)
def test_samples_do_not_see_each_other(thresholding):
    whole = jax.jit(thresholding.apply)(X0)
    for i in range(4):
        np.testing.assert_array_equal(jax.jit(thresholding.apply)(X0[i : i + 1])[0], whole[i])


def test_keeps_the_precision_it_is_given():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert DynamicThreshold().apply(X0.astype(dtype)).dtype == dtype


def test_settings_out_of_range_are_named():
    for percentile in (0.0, 99.5, float("nan")):
        with pytest.raises(ValueError, match=r"percentile is a fraction in \(0, 1\]"):
            DynamicThreshold(percentile)
    for cap in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="cap"):
            DynamicThreshold(cap=cap)

"""Noise-conditioning augmentation: it noises, by example, by key, and not at all at level 0."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.noise import sample_keys
from jaxdiff.diffusion.schedules import CosineSchedule

LOW = jnp.clip(jax.random.normal(jax.random.key(1), (4, 32, 32, 3)), -1, 1)
LEVEL = jnp.array([0.0, 0.1, 0.5, 1.0])


def _keys(seed=0):
    return sample_keys(jax.random.key(seed), jnp.arange(4))


def test_level_zero_is_exactly_the_input():
    np.testing.assert_array_equal(augment(LOW, jnp.zeros(4), _keys(), CosineSchedule()), LOW)


def test_each_example_has_its_own_level():
    noisy = augment(LOW, LEVEL, _keys(), CosineSchedule())
    np.testing.assert_array_equal(noisy[0], LOW[0])
    added = noisy - CosineSchedule().alpha(LEVEL).reshape(4, 1, 1, 1) * LOW
    np.testing.assert_allclose(added[1:].std(axis=(1, 2, 3)), CosineSchedule().sigma(LEVEL)[1:], rtol=0.05)
    np.testing.assert_allclose(augment(LOW[2:3], LEVEL[2:3], _keys()[2:3], CosineSchedule())[0], noisy[2], atol=1e-6)


def test_the_key_changes_the_noise():
    """A no-op augmentation (the clean input read by mistake) would not notice the key."""
    first, second = (augment(LOW, LEVEL, _keys(seed), CosineSchedule()) for seed in (0, 1))
    assert np.all(np.abs(first - second).max(axis=(1, 2, 3))[1:] > 0.1)


def test_keeps_the_precision_of_the_picture():
    assert augment(LOW.astype(jnp.bfloat16), LEVEL, _keys(), CosineSchedule()).dtype == jnp.bfloat16

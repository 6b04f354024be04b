"""Per-sample randomness: bit-equal noise for any batch size and any mesh, and normal all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.diffusion import noise

SHAPE = (9, 7, 3)  # no multiple of a vector register


def _keys(indices):
    return noise.sample_keys(jax.random.key(7), jnp.asarray(indices))


@pytest.mark.parametrize("indices", [[3], [0, 3], [3, 1, 2], range(16)], ids=str)
def test_bit_equal_whatever_the_batch(indices):
    indices = list(indices)
    draw = jax.jit(noise.normal_like, static_argnums=1)
    alone = draw(noise.fold(_keys([3]), 5), SHAPE)[0]
    np.testing.assert_array_equal(draw(noise.fold(_keys(indices), 5), SHAPE)[indices.index(3)], alone)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_bit_equal_on_a_mesh(axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    spread = NamedSharding(mesh, PartitionSpec("data"))

    def draw(key):
        return noise.normal_like(noise.fold(noise.sample_keys(key, jnp.arange(8)), 5), SHAPE)

    sharded = jax.jit(draw, out_shardings=spread)(jax.random.key(7))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, jax.jit(draw)(jax.random.key(7)))


def test_keys_differ_by_seed_sample_and_use():
    draws = [
        noise.normal_like(noise.fold(noise.sample_keys(jax.random.key(seed), jnp.array([sample])), use), (4,))
        for seed, sample, use in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    ]
    assert len({tuple(np.asarray(draw).ravel()) for draw in draws}) == len(draws)


def test_moments_over_the_batch():
    x = np.asarray(noise.normal_like(_keys(range(64)), (32, 32)))
    assert abs(x.mean()) < 4 / x.size**0.5
    assert x.var() == pytest.approx(1.0, abs=4 * (2 / x.size) ** 0.5)
    between = x.mean(axis=(1, 2)) * 32  # the samples' means, scaled to unit variance: samples are independent
    assert between.var() == pytest.approx(1.0, abs=4 * (2 / 64) ** 0.5)


def test_uniform_draws():
    u = np.asarray(noise.uniform(_keys(range(4000))))
    assert u.shape == (4000,) and u.min() >= 0 and u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)


def test_cast_after_drawing():
    low, full = (noise.normal_like(_keys([0, 1]), (5,), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))

"""The codebook of averages: numpy's formula, and entries that nothing is assigned to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import codebook
from jaxdiff.models.codebook import EMACodebook

K, C = 6, 3
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
CODES = [jnp.asarray(RNG.normal(size=(2, 4, 5, C)), jnp.float32) for _ in range(3)]
INDICES = [jnp.asarray(RNG.integers(0, K - 2, (2, 4, 5))) for _ in range(3)]
START = jnp.asarray(RNG.normal(size=(K, C)), jnp.float32)


def run(config, steps=3):
    averages = codebook.initial(START)
    for code, indices in zip(CODES[:steps], INDICES):
        averages = codebook.updated(config, averages, code, indices, KEY)
    return averages


def test_averages():
    """Sums and counts entry by entry, in double precision."""
    averages = run(EMACodebook(decay=0.8, restart=0.0))
    usage, sums = np.full(K, 1 / K), np.asarray(START, "f8") / K
    for code, indices in zip(CODES, INDICES):
        flat, chosen = np.asarray(code, "f8").reshape(-1, C), np.asarray(indices).reshape(-1)
        for entry in range(K):
            mine = flat[chosen == entry]
            usage[entry] = 0.8 * usage[entry] + 0.2 * len(mine) / len(flat)
            sums[entry] = 0.8 * sums[entry] + 0.2 * mine.sum(0) / len(flat)
    np.testing.assert_allclose(averages.usage, usage, rtol=1e-5)
    np.testing.assert_allclose(averages.sums, sums, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(averages.codebook, sums / usage[:, None], rtol=1e-4)
    np.testing.assert_allclose(averages.codebook[K - 2 :], START[K - 2 :], rtol=1e-5)  # nothing assigned: they stay


def test_dead_entries_restart():
    """Below a fraction of the mean usage an entry becomes a code of the batch, and counts as used; others stay."""
    config = EMACodebook(decay=0.2, restart=0.05)
    once, twice, kept = run(config, 1), run(config, 2), run(EMACodebook(decay=0.2, restart=0.0), 2)
    assert (once.usage[K - 2 :] > 0.05 / K).all()  # 0.2 / K
    flat = np.asarray(CODES[1]).reshape(-1, C)
    for entry in (K - 2, K - 1):  # 0.04 / K
        assert (flat == np.asarray(twice.codebook[entry])).all(1).any()
        assert np.isclose(twice.usage[entry], 1 / K)
        np.testing.assert_allclose(twice.sums[entry], twice.codebook[entry] / K, rtol=1e-6)
    for ours, theirs in zip(twice, kept):
        np.testing.assert_array_equal(ours[: K - 2], theirs[: K - 2])
    assert not np.array_equal(twice.codebook[K - 2], twice.codebook[K - 1])


def test_entries_that_are_never_used_stay_finite():
    """Until the usage is no longer a number above 0."""
    averages = codebook.initial(START)._replace(usage=jnp.full(K, 1e-30), sums=START * 1e-30)
    averages = codebook.updated(EMACodebook(restart=0.0), averages, CODES[0], jnp.zeros_like(INDICES[0]), KEY)
    np.testing.assert_array_equal(averages.codebook[1:], START[1:])
    np.testing.assert_allclose(averages.codebook[0], CODES[0].reshape(-1, C).mean(0), rtol=1e-4)


def test_usage():
    usage = codebook.usage_of(jnp.array([[[0, 2], [2, 2]]]), 4)
    np.testing.assert_allclose(usage, [0.25, 0, 0.75, 0])


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"restart": 1.0}])
def test_settings(wrong):
    with pytest.raises(ValueError, match=r"decay and restart lie in \[0, 1\)"):
        EMACodebook(**wrong)

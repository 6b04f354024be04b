"""The Fréchet distance against closed forms and against scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from jaxdiff.evaluation.frechet import frechet

D = 24
RNG = np.random.default_rng(0)
MEAN, OTHER = RNG.normal(size=(2, D))


def covariance(rank=D, seed=0):
    features = np.random.default_rng(seed).normal(size=(rank + 1, D))
    return np.cov(features, rowvar=False)


def test_equal_covariances_leave_the_means():
    for rank in (D, 5):
        assert frechet(MEAN, covariance(rank), OTHER, covariance(rank)) == pytest.approx(((MEAN - OTHER) ** 2).sum())
    assert frechet(MEAN, covariance(), MEAN, covariance()) == pytest.approx(0, abs=1e-9)


def test_covariances_that_commute():
    """Of one basis: the squared differences of standard deviations."""
    basis = np.linalg.qr(RNG.normal(size=(D, D)))[0]
    a, b = RNG.uniform(0, 4, (2, D))
    found = frechet(MEAN, basis * a @ basis.T, OTHER, basis * b @ basis.T)
    assert found == pytest.approx(((MEAN - OTHER) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


@pytest.mark.parametrize("rank", [D + 10, D, 7, 1])
def test_scipys_root(rank):
    a, b = covariance(rank, 1), covariance(rank, 2)
    ridge = 1e-10 * np.eye(D) if rank < D else 0
    root = scipy.linalg.sqrtm((a + ridge) @ (b + ridge)).real
    wanted = ((MEAN - OTHER) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root)
    found = frechet(MEAN, a, OTHER, b)
    assert found == pytest.approx(wanted, rel=1e-5 if rank < D else 1e-9)
    assert found == pytest.approx(frechet(OTHER, b, MEAN, a), rel=1e-7)  # symmetric


def test_disjoint_supports():
    """Where one varies the other does not: nothing is taken off."""
    a, b = np.diag(np.r_[np.ones(4), np.zeros(D - 4)]), np.diag(np.r_[np.zeros(D - 3), np.full(3, 2.0)])
    assert frechet(MEAN, a, MEAN, b) == pytest.approx(4 + 6)

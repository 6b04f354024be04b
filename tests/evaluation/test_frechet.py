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


def nuclear(x, y):
    """The trace of the root from the features themselves: the singular values of X Yᵀ, without a covariance."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))


@pytest.mark.parametrize("n, m, d", [(20, 30, 256), (2, 2, 64), (100, 20, 128), (200, 300, 128)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_ranks_that_are_deficient_lose_nothing(n, m, d, scale):
    """Roots of eigenvalues that are 0 but for rounding would add up."""
    rng = np.random.default_rng(n)
    x, y = scale * rng.normal(size=(n, d)), scale * (1.2 * rng.normal(size=(m, d)) + 0.3)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * nuclear(x, y)
    assert frechet(x.mean(0), a, y.mean(0), b) == pytest.approx(wanted, rel=1e-12)


def test_one_sets_rank_may_be_full():
    a = covariance(5, 3)
    found = frechet(MEAN, a, MEAN, np.eye(D))
    assert found == pytest.approx(np.trace(a) + D - 2 * np.sqrt(np.maximum(np.linalg.eigvalsh(a), 0))[-5:].sum())


def test_sets_without_variance():
    zero = np.zeros((D, D))
    assert frechet(MEAN, zero, OTHER, zero) == pytest.approx(((MEAN - OTHER) ** 2).sum())
    assert frechet(MEAN, zero, MEAN, np.eye(D)) == pytest.approx(D)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(4))
def test_moments_that_are_not_finite_are_refused(value, place):
    moments = [MEAN.copy(), covariance(), OTHER.copy(), covariance(seed=1)]
    moments[place].flat[3] = value
    with pytest.raises(ValueError, match="not finite"):
        frechet(*moments)


def test_disjoint_supports():
    """Where one varies the other does not: nothing is taken off."""
    a, b = np.diag(np.r_[np.ones(4), np.zeros(D - 4)]), np.diag(np.r_[np.zeros(D - 3), np.full(3, 2.0)])
    assert frechet(MEAN, a, MEAN, b) == pytest.approx(4 + 6)

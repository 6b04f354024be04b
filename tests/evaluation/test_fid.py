"""FID refuses what says nothing, and its limit for many images is what few of them show."""

import numpy as np
import pytest

from jaxdiff.evaluation.fid import distance, limit
from jaxdiff.evaluation.statistics import Moments, add, empty

D = 12
RNG = np.random.default_rng(0)


def of(features):
    return add(empty(D), features)


def test_fewer_pictures_than_features_are_refused_unless_forced():
    many, few = of(RNG.normal(size=(100, D))), of(RNG.normal(size=(D, D)))
    for pair in ((many, few), (few, many)):
        with pytest.raises(ValueError, match="12 images for 12 features"):
            distance(*pair)
        assert distance(*pair, force=True) > 0
    assert distance(many, of(RNG.normal(size=(D + 1, D)))) > 0
    with pytest.raises(ValueError, match="width 3 and 12"):
        distance(many, add(empty(3), RNG.normal(size=(100, 3))))


def test_the_limit_is_nearer_to_the_truth_than_all_pictures_are():
    """The truth: the distance of the Gaussians themselves, here of equal covariance and means one apart."""
    reference = of(RNG.normal(size=(400_000, D)))
    shift = np.zeros(D)
    shift[0] = 1
    errors, biased = [], []
    for seed in range(8):
        features = np.random.default_rng(seed + 1).normal(size=(600, D)) + shift
        found = limit(features, reference, seed=seed)
        errors.append(found.value - 1)
        biased.append(distance(of(features), reference) - 1)
        assert found.sizes[-1] == 600 and found.distances[-1] == pytest.approx(biased[-1] + 1)
    assert abs(np.mean(errors)) < 0.5 * np.mean(biased)


def test_few_pictures_have_no_limit_unless_forced():
    """From little more than d on, distances lie on no line: through them, that of two equal sets would be below 0 by
    more than half of what it is for all images."""
    reference = of(RNG.normal(size=(400_000, D)))
    with pytest.raises(ValueError, match="take 48 or more"):
        limit(RNG.normal(size=(47, D)), reference)
    assert limit(RNG.normal(size=(48, D)), reference).sizes[0] == 2 * D
    assert limit(RNG.normal(size=(2000, D)), reference).sizes[0] == 200
    pairs = [(limit(x, reference, seed=3).value, distance(of(x), reference)) for x in RNG.normal(size=(20, 100, D))]
    limits, whole = np.mean(pairs, 0)
    assert abs(limits) < 0.25 * whole
    assert limit(RNG.normal(size=(D, D)), reference, force=True).sizes[0] == 2


@pytest.mark.parametrize("mean", [0, 1e5, 1e7])
def test_a_small_distance_beside_a_large_mean(mean):
    """Variances of 1 and 1.0025² in one direction, on a mean of many standard deviations: exactly 0.0025²."""
    x = np.random.default_rng(4).normal(size=(200, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # of unit covariance
    y = x * [1.0025, 1, 1]
    found = distance(add(empty(3), x + mean), add(empty(3), y + mean))
    assert found == pytest.approx(0.0025**2, rel=1e-2 if mean > 1e6 else 1e-4)


def test_a_number_that_is_not_known_is_enough():
    many = of(RNG.normal(size=(100, D)))
    other = Moments(many.mean + 1, many.covariance)
    assert distance(many, other) == distance(other, many) == pytest.approx(D)
    assert distance(other, other) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        distance(many, Moments(np.full(D, np.nan), other.covariance))

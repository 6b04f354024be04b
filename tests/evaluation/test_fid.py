"""FID refuses what says nothing, and its limit for many pictures is what few of them show."""

import numpy as np
import pytest

from jaxdiff.evaluation.fid import distance, limit
from jaxdiff.evaluation.statistics import add, empty

D = 12
RNG = np.random.default_rng(0)


def of(features):
    return add(empty(D), features)


def test_fewer_pictures_than_features_are_refused_unless_forced():
    many, few = of(RNG.normal(size=(100, D))), of(RNG.normal(size=(D, D)))
    for pair in ((many, few), (few, many)):
        with pytest.raises(ValueError, match="12 pictures for 12 features"):
            distance(*pair)
        assert distance(*pair, force=True) > 0
    assert distance(many, of(RNG.normal(size=(D + 1, D)))) > 0
    with pytest.raises(ValueError, match="width 12 and 3"):
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
    more than half of what it is for all pictures."""
    reference = of(RNG.normal(size=(400_000, D)))
    with pytest.raises(ValueError, match="take 48 or more"):
        limit(RNG.normal(size=(47, D)), reference)
    assert limit(RNG.normal(size=(48, D)), reference).sizes[0] == 2 * D
    assert limit(RNG.normal(size=(2000, D)), reference).sizes[0] == 200
    pairs = [(limit(x, reference, seed=3).value, distance(of(x), reference)) for x in RNG.normal(size=(20, 100, D))]
    limits, whole = np.mean(pairs, 0)
    assert abs(limits) < 0.25 * whole
    assert limit(RNG.normal(size=(D, D)), reference, force=True).sizes[0] == 2

"""KID, CMMD, precision and recall against direct sums over pairs."""

import numpy as np
import pytest

from jaxdiff.evaluation.cmmd import cmmd
from jaxdiff.evaluation.kid import kid, mmd
from jaxdiff.evaluation.precision_recall import precision_recall

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(23, 6)).astype(np.float32), (RNG.normal(size=(31, 6)) * 1.3 + 0.4).astype(np.float32)


def pairs(kernel, x, y, same=False):
    return [kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)]


def test_mmd_is_its_double_sum():
    kernel = lambda p, q: (float(p.astype(float) @ q) / 6 + 1) ** 3  # noqa: E731
    wanted = np.mean(pairs(kernel, A, A, True)) + np.mean(pairs(kernel, B, B, True)) - 2 * np.mean(pairs(kernel, A, B))
    assert mmd(A.astype(float), B.astype(float)) == pytest.approx(wanted)


def test_kid_of_whole_sets_is_mmd_and_of_subsets_unbiased():
    whole = kid(A, B[:23], subsets=3, size=23)
    assert whole.value == pytest.approx(mmd(A.astype(float), B[:23].astype(float)))
    assert whole.error is None and kid(A, B, subsets=1, size=10).error is None
    many = RNG.normal(size=(4000, 6))
    rng = np.random.default_rng(7)
    pick = lambda x: x[rng.choice(len(x), 10, replace=False)].astype(float)  # noqa: E731
    values = [mmd(pick(A), pick(B)) for _ in range(6)]
    found = kid(A, B, 6, 10, seed=7)
    assert (found.value, found.deviation) == pytest.approx((np.mean(values), np.std(values)))
    assert kid(A, B, 1, 10).deviation == 0
    same = kid(many[:2000], many[2000:], subsets=200, size=50)
    assert abs(same.value) < 4 * same.error  # of one distribution: 0 on average
    assert kid(A, B, 10, 10, seed=1) == kid(A, B, 10, 10, seed=1) != kid(A, B, 10, 10, seed=2)
    for size in (24, 1):
        with pytest.raises(ValueError, match=f"KID of 100 subsets of {size}"):
            kid(A, B, size=size)
    with pytest.raises(ValueError, match="KID of 0 subsets"):
        kid(A, B, subsets=0, size=10)


@pytest.mark.parametrize("subsets", [30, 300])
def test_the_error_of_kid_is_what_other_pictures_would_change(subsets):
    """However many subsets are drawn."""

    def of(seed):
        rng = np.random.default_rng(seed)
        return kid(rng.normal(size=(120, 4)), 1.3 * rng.normal(size=(120, 4)) + 0.5, subsets, 60)

    found = [of(seed) for seed in range(40)]
    apart = np.std([each.value for each in found], ddof=1)
    assert 0.6 * apart < np.mean([each.error for each in found]) < 1.7 * apart


@pytest.mark.parametrize("chunk", [4, 1000])
def test_cmmd_is_its_double_sum(chunk):
    unit = lambda x: x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)  # noqa: E731
    kernel = lambda p, q: np.exp(-((p - q) ** 2).sum() / (2 * 10**2))  # noqa: E731
    a, b = unit(A), unit(B)
    wanted = np.mean(pairs(kernel, a, a)) + np.mean(pairs(kernel, b, b)) - 2 * np.mean(pairs(kernel, a, b))
    assert cmmd(A, 3 * B, chunk) == pytest.approx(1000 * wanted)
    assert cmmd(A, A, chunk) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k, chunk):
    def share(points, of):
        distance = lambda p, q: np.linalg.norm(p.astype(float) - q)  # noqa: E731
        radii = [sorted(distance(p, q) for q in of)[k] for p in of]
        return np.mean([any(distance(p, q) <= radius for q, radius in zip(of, radii)) for p in points])

    found = precision_recall(A, B, k, chunk)
    assert found == pytest.approx((share(B, A), share(A, B)))
    assert 0 < found.precision < 1
    assert precision_recall(A, A, k) == (1, 1) and precision_recall(A, A + 100, k) == (0, 0)


def test_too_few_neighbours():
    with pytest.raises(ValueError, match="3 neighbours, but there are 3 and 31"):
        precision_recall(A[:3], B)

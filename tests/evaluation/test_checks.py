"""What no metric takes: numbers that are not finite, no rows, widths that differ, embeddings without a direction."""

import numpy as np
import pytest

from jaxdiff.evaluation import fid
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.cmmd import cmmd
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kid import kid, mmd
from jaxdiff.evaluation.precision_recall import precision_recall
from jaxdiff.evaluation.retrieval import retrieval, zero_shot
from jaxdiff.evaluation.statistics import add, empty

RNG = np.random.default_rng(0)


def frechet_distance(a, b):
    return fid.distance(add(empty(a.shape[1]), a), add(empty(b.shape[1]), b))


def limit(a, b):
    return fid.limit(a, add(empty(b.shape[1]), b))


TWO = {
    "distance": frechet_distance,
    "limit": limit,
    "KID": lambda a, b: kid(a, b, 2, 10),
    "MMD": mmd,
    "CMMD": cmmd,
    "precision and recall": precision_recall,
    "CLIP score": clip_score,
    "retrieval": retrieval,
    "zero-shot": lambda a, b: zero_shot(a, b[:, None]),
}


def sets():
    return [RNG.normal(size=(40, 6)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("metric", TWO.values(), ids=TWO)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(metric, place, value):
    both = sets()
    metric(*both)
    both[place][17, 3] = value
    with pytest.raises(ValueError, match=r"not finite: 1 rows, the first is row 17"):
        metric(*both)


@pytest.mark.parametrize("metric", TWO.values(), ids=TWO)
def test_no_rows(metric):
    for place in (0, 1):
        both = sets()
        both[place] = both[place][:0]
        with pytest.raises(ValueError, match=r"no images|no pairs|0 captions|40 captions and 0|0 images"):
            metric(*both)


@pytest.mark.parametrize("metric", TWO.values(), ids=TWO)
def test_widths_that_differ(metric):
    a, b = sets()
    for both in ((a, b[:, :5]), (a[:, :5], b), (a, b[:, :1])):
        with pytest.raises(ValueError, match=r"width \d and \d"):
            metric(*both)


@pytest.mark.parametrize("name", ["CMMD", "CLIP score", "retrieval", "zero-shot"])
def test_embeddings_without_a_direction(name):
    for place in (0, 1):
        both = sets()
        both[place][4] = 0
        with pytest.raises(ValueError, match="1 embeddings of length 0"):
            TWO[name](*both)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value):
    logits = sets()[0]
    logits[3, 1] = value
    with pytest.raises(ValueError, match="an Inception score of features that are not finite: 1 rows"):
        inception_score(logits)
    with pytest.raises(ValueError, match="no images"):
        inception_score(logits[:0])


def test_a_single_picture_has_no_discrepancy():
    a, b = sets()
    with pytest.raises(ValueError, match="MMD of 1 and 40 images"):
        mmd(a[:1], b)

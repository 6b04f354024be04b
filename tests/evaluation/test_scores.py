"""CLIP score and Inception score in cases that one can work out."""

import numpy as np
import pytest

from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.inception_score import inception_score


def test_cosines_of_pairs():
    text = np.array([[2.0, 0], [0, 3], [1, 0]], np.float32)
    image = np.array([[5.0, 0], [4, 4], [-1, 0]], np.float32)  # cosines 1, √½, -1
    found = clip_score(text, image)
    assert found.score == pytest.approx(2.5 * (1 + 0.5**0.5 + 0) / 3)
    assert found.cosine == pytest.approx(0.5**0.5 / 3)
    with pytest.raises(ValueError, match="no pairs"):
        clip_score(text[:0], image[:0])


def test_sure_pictures_of_all_classes_score_their_number_and_those_of_one_class_one():
    sure = np.repeat(50 * np.eye(8), 25, 0).astype(np.float32)
    assert inception_score(sure, splits=1).value == pytest.approx(8)
    assert inception_score(sure[:25], splits=5) == pytest.approx((1, 0))
    assert inception_score(np.zeros((20, 8), np.float32)).value == pytest.approx(1)  # sure of nothing
    in_order = inception_score(sure, splits=4, seed=None)
    assert in_order == pytest.approx((2, 0))
    shuffled = inception_score(sure, splits=4)  # as drawn, each split would hold two classes alone
    assert 7 < shuffled.value < 8 and shuffled.deviation > 0


@pytest.mark.parametrize("count, splits", [(60, 10), (67, 10), (13, 4), (11, 10), (7, 7)])
@pytest.mark.parametrize("seed", [2020, 0, None])
def test_splits_are_torch_fidelitys(count, splits, seed):
    """Split i holds i n // s to (i + 1) n // s of what RandomState(seed) shuffles, its own seed being 2020."""
    logits = np.random.default_rng(count).normal(0, 3, size=(count, 5)).astype(np.float32)
    shuffled = logits if seed is None else logits[np.random.RandomState(seed).permutation(count)]
    p = np.exp(shuffled.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    values = []
    for i in range(splits):
        part = p[(i * count) // splits : ((i + 1) * count) // splits]
        values.append(np.exp((part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    found = inception_score(logits, splits, seed)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert seed != 2020 or inception_score(logits, splits) == found


def test_classes_that_no_picture_has():
    """Probabilities that underflow count for nothing."""
    logits = np.zeros((8, 3), np.float32)
    logits[:, 2] = -2000
    assert inception_score(logits, splits=2).value == pytest.approx(1)


def test_it_is_its_definition():
    logits = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, p.mean(0))) for row in p]))
    assert inception_score(logits, splits=1).value == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="61 splits, but there are 60 images"):
        inception_score(logits, splits=61)

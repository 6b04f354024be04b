"""Recall in cases that one can count, and classes by their prompts."""

import numpy as np
import pytest

from jaxdiff.data.shapes_caption import caption, describes, distinct_examples
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.retrieval import retrieval, zero_shot


def test_recall_by_counting():
    angles = np.array([0.0, 0.1, 0.25, 3.0])
    image = 7 * np.stack([np.cos(angles), np.sin(angles)], 1)
    turned = angles + np.array([0.0, 0.12, 0.0, 0.0])  # the second caption lies nearer to the third image
    text = np.stack([np.cos(turned), np.sin(turned)], 1)
    found = retrieval(text, image, (1, 2, 4), chunk=3)
    assert found.image == {1: 0.75, 2: 1.0, 4: 1.0}
    assert found.text == {1: 0.75, 2: 1.0, 4: 1.0}


def test_as_near_is_not_found():
    """Embeddings that are all the same find nothing but by luck, and luck does not count."""
    same = np.ones((10, 3))
    assert retrieval(same, same).image == {1: 0.0, 5: 0.0, 10: 1.0}


def test_it_is_the_argument_of_the_maximum():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(200, 16)).astype(np.float32)
    image = text + rng.normal(size=text.shape).astype(np.float32)
    cosines = (text / np.linalg.norm(text, axis=1)[:, None]) @ (image / np.linalg.norm(image, axis=1)[:, None]).T
    found = retrieval(text, image, (1,), chunk=64)
    assert found.image[1] == np.mean(cosines.argmax(1) == np.arange(200))
    assert found.text[1] == np.mean(cosines.argmax(0) == np.arange(200))


@pytest.mark.parametrize(("n", "m", "ks"), [(0, 0, (1,)), (3, 3, (0, 1))])
def test_what_cannot_be_retrieved(n, m, ks):
    with pytest.raises(ValueError, match="retrieval of"):
        retrieval(np.ones((n, 2)), np.ones((m, 2)), ks)


def test_classes_by_the_mean_of_their_prompts():
    classes = np.array([[[2.0, 0], [0, 1]], [[-1, 0], [-1, 0.1]]])  # the first class's mean is at 45 degrees
    image = np.array([[1.0, 1.2], [-3, 0.2], [0.2, 9]])
    assert list(zero_shot(image, classes)) == [0, 1, 0]


def test_distinct_examples_describe_only_themselves():
    examples = distinct_examples(40)
    for i, (_, said) in enumerate(examples):
        assert [describes(said.stated, s) for s, _ in examples] == [i == j for j in range(40)]


def test_every_caption_describes_its_scene():
    for i in range(300):
        s = scene("held_out", i)
        assert describes(caption(s, "held_out", i).stated, s)
    found = [describes(caption(scene("train", i), "train", i).stated, scene("train", i + 1)) for i in range(300)]
    assert np.mean(found) < 0.05

"""The reader of `rainbow`: exact on true images, equal rotations, noise, and what is none of the set's images."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.data.images import to_float
from jaxdiff.data.rainbow import EVERY, Attributes, draw
from jaxdiff.evaluation.rainbow import NAMES, read


@pytest.mark.slow
def test_every_true_picture_is_read_right():
    found = read(np.stack([draw(attributes) for attributes in EVERY]))
    assert all(each.right(attributes) for each, attributes in zip(found, EVERY))
    assert min(each.explained for each in found) > 1 - 1e-5


def test_noise_is_forgiven():
    rng = np.random.default_rng(0)
    asked = [EVERY[i] for i in rng.choice(len(EVERY), 300, replace=False)]
    noisy = np.stack([to_float(draw(attributes)) for attributes in asked])
    found = read((noisy + rng.normal(0, 0.05, noisy.shape)).astype(np.float32))
    assert np.mean([each.right(attributes) for each, attributes in zip(found, asked)]) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_each_wrong_attribute_is_seen(name):
    asked = Attributes("large", "filled", "plain", "red", "arrow", 0)
    other = next(a for a in EVERY if [n for n in NAMES if getattr(a, n) != getattr(asked, n)] == [name])
    (found,) = read(draw(other)[None])
    assert not found.right(asked) and found.right(other)
    wrong = {n for n, ok in found.attributes(asked).items() if not ok}
    assert wrong == ({"shape", "rotation"} if name == "shape" else {name})  # a rotation is one of a shape


def test_a_rotation_that_changes_nothing_counts_as_equal():
    circle = Attributes("small", "filled", "plain", "blue", "circle", 0)
    (found,) = read(draw(circle)[None])
    for angle in (0, 90, 180, 270):
        assert found.right(dataclasses.replace(circle, rotation=angle))
    (bar,) = read(draw(Attributes("small", "filled", "plain", "blue", "bar", 90))[None])
    assert {a.rotation for a in bar.found} == {90, 270}


def test_what_is_no_picture_of_the_set():
    rng = np.random.default_rng(0)
    asked = EVERY[0]
    for picture in (rng.uniform(-1, 1, (32, 32, 3)), np.ones((32, 32, 3)), -np.ones((32, 32, 3))):
        (found,) = read(picture.astype(np.float32)[None])
        assert not found.found and not found.right(asked) and not any(found.attributes(asked).values())

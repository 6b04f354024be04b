"""The composition benchmark: its counts, what looks alike, what is held out, its TFDS set."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxdiff.data import images, rainbow, sources
from jaxdiff.data.rainbow import EVERY, Attributes


@pytest.fixture(scope="module")
def drawn():
    return [rainbow.draw(attributes) for attributes in EVERY]


def test_the_counts_of_the_notebook(drawn):
    assert len(EVERY) == len(set(EVERY)) == 4 * 2 * 3 * 12 * 8 * 4 == 9216
    assert len({attributes.caption for attributes in EVERY}) == 9216
    assert drawn[0].shape == (32, 32, 3) and drawn[0].dtype == np.uint8


def test_only_rotations_make_equal_pictures(drawn):
    """Circles, squares and crosses have one image, bars two, the others four."""
    alike = {}
    for attributes, picture in zip(EVERY, drawn):
        alike.setdefault(picture.tobytes(), []).append(attributes)
    for group in alike.values():
        assert len({(a.scale, a.fill, a.shading, a.colour, a.shape) for a in group}) == 1
        expected = {"circle": 4, "square": 4, "cross": 4, "bar": 2}.get(group[0].shape, 1)
        assert len(group) == expected
    assert len(alike) == 4 * 2 * 3 * 12 * (3 * 1 + 2 + 4 * 4)


def test_no_picture_touches_the_border(drawn):
    frame = np.ones((32, 32), bool)
    frame[1:-1, 1:-1] = False
    assert all((picture[frame] == 255).all() for picture in drawn)


def test_a_picture_is_what_its_words_say():
    red = Attributes("large", "filled", "plain", "red", "square", 0)
    picture = rainbow.draw(red)
    assert {tuple(rgb) for rgb in picture.reshape(-1, 3)} == {(215, 35, 40), (255, 255, 255)}
    painted = (picture != 255).any(-1)
    assert painted.sum() == painted.any(0).sum() * painted.any(1).sum() == 22 * 22
    hollow = (rainbow.draw(Attributes("large", "outlined", "plain", "red", "square", 0)) != 255).any(-1)
    assert hollow.sum() < painted.sum() / 2 and not hollow[16, 16] and (painted | hollow == painted).all()
    striped = (rainbow.draw(Attributes("large", "filled", "striped", "red", "square", 0)) != 255).any(-1)
    assert not striped[1::2].any() and (striped[::2] == painted[::2]).all()
    dotted = (rainbow.draw(Attributes("large", "filled", "dotted", "red", "square", 0)) != 255).any(-1)
    assert dotted.sum() == painted.sum() / 2
    bands = rainbow.draw(Attributes("large", "filled", "plain", "rainbow", "square", 0))
    assert len({tuple(rgb) for rgb in bands[:, 16]} - {(255, 255, 255)}) == 7


def test_rotations_turn_to_the_left():
    up, left, down, right = (
        (rainbow.draw(Attributes("large", "filled", "plain", "red", "arrow", angle)) != 255).any(-1)
        for angle in (0, 90, 180, 270)
    )
    assert up[:16].sum() > up[16:].sum() and (np.rot90(up) == left).all() and (np.rot90(left) == down).all()
    assert left[:, :16].sum() > left[:, 16:].sum() and (np.rot90(down) == right).all()


def test_captions():
    assert Attributes("tiny", "outlined", "dotted", "red", "arrow", 90).caption == (
        "a tiny outlined dotted red arrow rotated 90 degrees"
    )
    assert Attributes("large", "filled", "plain", "rainbow", "bar", 0).caption == "a large filled rainbow bar"


def test_what_is_held_out_was_never_seen(drawn):
    train, test = rainbow.split("train"), rainbow.split("test")
    assert len(train) == len(set(train)) == 2765 and len(set(test)) == len(test)
    assert not set(train) & set(test)
    seen = {drawn[i].tobytes() for i in train}
    assert not any(drawn[i].tobytes() in seen for i in test)
    left_out = set(range(9216)) - set(train) - set(test)
    assert all(drawn[i].tobytes() in seen for i in left_out)
    assert rainbow.split("train", seed=1) != train


def test_every_word_is_trained_on():
    for name in ("scale", "fill", "shading", "colour", "shape", "rotation"):
        assert {getattr(EVERY[i], name) for i in rainbow.split("train")} == {getattr(a, name) for a in EVERY}


def test_the_set_is_read_as_it_was_drawn(tmp_path):
    builder = rainbow.prepare(tmp_path)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 2765,
        "test": len(rainbow.split("test")),
    }
    place = rainbow.split("test")[7]
    source = sources.open(sources.parse("rainbow"), 32, "test", tmp_path)
    assert source[7]["caption"] == EVERY[place].caption
    assert (images.decode(source[7]["image"]) == rainbow.draw(EVERY[place])).all()
    decoded = builder.as_data_source("test")[7]
    labels = builder.info.features
    assert decoded["index"] == place and isinstance(labels["shape"], tfds.features.ClassLabel)
    assert labels["shape"].int2str(decoded["shape"]) == EVERY[place].shape
    assert labels["rotation"].int2str(decoded["rotation"]) == str(EVERY[place].rotation)

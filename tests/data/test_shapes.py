"""The TFDS builder: what it writes is what is drawn, once, whole or not at all."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.data import shapes
from jaxdiff.data.shapes_caption import Stated, caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return shapes.prepare(72, tmp_path_factory.mktemp("shapes"), train=12, held_out=5, progress=False)


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("held_out", 5)])
def test_records_are_the_drawings_in_order(builder, split, count):
    source = builder.as_data_source(split)
    assert len(source) == count
    for i in range(count):
        example, s = source[i], scene(split, i)
        c = caption(s, split, i)
        np.testing.assert_array_equal(example["image"], draw(s, 72))
        assert example["caption"].decode() == c.text
        assert example["index"] == i and example["objects"] == len(s.objects)
        assert example["background"].decode() == s.background
        assert json.loads(example["scene"]) == json.loads(json.dumps(s.as_dict()))
        assert Stated.from_dict(json.loads(example["stated"])) == c.stated


def test_tensorflow_is_needed_neither_to_write_nor_to_read(tmp_path):
    program = f"""
import sys
from jaxdiff.data import shapes
source = shapes.prepare(64, {str(tmp_path)!r}, train=2, held_out=1, progress=False).as_data_source("train")
assert source[1]["image"].shape == (64, 64, 3)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_prepared_set_is_reused(builder, monkeypatch):
    monkeypatch.setattr(shapes, "example", None)  # drawing again would fail
    again = shapes.prepare(72, builder.data_dir.split("/shapes/")[0], train=12, held_out=5, progress=False)
    assert len(again.as_data_source("train")) == 12


def test_a_broken_preparation_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    real = shapes.example

    def full_disk(split, index, resolution):
        if index == 3:
            raise OSError("No space left on device")
        return real(split, index, resolution)

    monkeypatch.setattr(shapes, "example", full_disk)
    with pytest.raises(OSError, match="No space"):
        shapes.prepare(64, tmp_path, train=6, held_out=2, progress=False)
    assert not list(tmp_path.rglob("*.array_record*"))
    monkeypatch.setattr(shapes, "example", real)
    assert len(shapes.prepare(64, tmp_path, train=6, held_out=2, progress=False).as_data_source("train")) == 6


def test_the_default_size_is_drawn_like_any_other(tmp_path, monkeypatch, capsys):
    """TFDS knows this one by name; reaching the first drawing without a bar is all that is looked at."""

    def stop(*_):
        raise OSError("reached")

    monkeypatch.setattr(shapes, "example", stop)
    with pytest.raises(OSError, match="reached"):
        shapes.prepare(64, tmp_path, progress=False)
    assert "image" not in capsys.readouterr().err


def test_bad_settings_name_the_culprit(tmp_path):
    with pytest.raises(ValueError, match="resolution 16"):
        shapes.prepare(16, tmp_path)
    with pytest.raises(ValueError, match="held_out"):
        shapes.prepare(64, tmp_path, held_out=0)
    assert not list(tmp_path.iterdir())

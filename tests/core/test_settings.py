"""Settings as JSON: a closed table for files, any class for comparison and for hashes."""

import enum
import json
from dataclasses import dataclass, field, make_dataclass, replace

import jax
import numpy as np
import pytest

from jaxdiff.core.settings import Table, canonical, difference, flatten
from jaxdiff.diffusion import losses
from jaxdiff.models import clip


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Inner:
    table: tuple[float, ...]
    colour: Colour = Colour.RED
    threads: int = field(default=1, metadata={"how": True})


@dataclass(frozen=True)
class Outer:
    inner: Inner
    dtype: object = np.float32
    array: object = None


TABLE = Table({"a.Inner": Inner, "a.Outer": Outer, "a.Colour": Colour})
SETTINGS = Outer(Inner((0.1, 0.2), Colour.BLUE, threads=8), dtype=None)


def test_there_and_back():
    told = json.loads(json.dumps(TABLE.to_json(SETTINGS)))
    inner = {"class": "a.Inner", "table": [0.1, 0.2], "colour": {"class": "a.Colour", "member": "BLUE"}}
    assert told == {"class": "a.Outer", "inner": inner, "dtype": None, "array": None}
    assert TABLE.from_json(told, "x") == replace(SETTINGS, inner=replace(SETTINGS.inner, threads=1))
    assert TABLE.from_json(inner | {"threads": 5}, "x").threads == 1  # how it is computed is the reader's own


def test_a_tag_outlives_a_name():
    renamed = make_dataclass("Renamed", [("table", tuple), ("colour", Colour, Colour.RED)], frozen=True)
    found = Table({"a.Inner": renamed, "a.Colour": Colour}).from_json(TABLE.to_json(SETTINGS.inner), "x")
    assert found == renamed((0.1, 0.2), Colour.BLUE)


def test_namesakes_have_tags_of_their_own():
    other = make_dataclass("Inner", [("table", tuple, ())], frozen=True)
    both = Table({"a.Inner": Inner, "b.Inner": other, "a.Colour": Colour})
    assert both.to_json(other())["class"] == "b.Inner" and both.to_json(SETTINGS.inner)["class"] == "a.Inner"
    with pytest.raises(ValueError, match="class Inner cannot be written"):
        TABLE.to_json(other())
    with pytest.raises(ValueError, match="two tags"):
        Table({"a.Inner": Inner, "b.Inner": Inner})


@pytest.mark.parametrize("value", [np.float32, np.ones(2), {"a": 1}, {1}, len, np.float64(1)], ids=str)
def test_what_no_file_can_hold(value):
    with pytest.raises(ValueError, match="cannot be written"):
        TABLE.to_json(Outer(Inner(()), value))


def test_every_field_and_every_whole_is_checked():
    seen = []
    fields, wholes = (lambda *given: seen.append(given)), (lambda *given: seen.append(given))
    Table(TABLE.classes, fields, wholes).from_json(TABLE.to_json(SETTINGS.inner), "x")
    inner = replace(SETTINGS.inner, threads=1)
    assert seen == [
        (Colour, "member", "BLUE", "x"),
        (Colour.BLUE, "x"),
        (Inner, "table", (0.1, 0.2), "x"),
        (Inner, "colour", Colour.BLUE, "x"),
        (inner, "x"),
    ]


def test_flat_settings_are_compared_by_name():
    settings = Outer(Inner((0.1, 0.2)), array=np.arange(3))
    flat = flatten({"stage": settings})
    assert flat["stage"] == "Outer"
    assert flat["stage.inner.table.1"] == 0.2
    assert flat["stage.inner.colour"] == "Colour.RED"
    assert flat["stage.dtype"] == "float32" and "stage.inner.threads" not in flat
    assert flatten([np.dtype("float32"), jax.numpy.float32, Inner]) == {
        "": "3 values",
        "0": "float32",
        "1": "float32",
        "2": "Inner",
    }
    assert difference(flat, flatten({"stage": Outer(Inner((0.1, 0.2)), array=np.arange(3))})) is None
    assert "stage.array" in difference(flat, flatten({"stage": replace(settings, array=np.arange(1, 4))}))
    assert "stage.inner.table.1 was 0.2" in difference(flat, flatten({"stage": Outer(Inner((0.1, 0.3)))}))
    long = tuple(float(i) for i in range(1000))
    saved, given = flatten(Inner(long)), flatten(Inner((*long[:-1], 0.5)))
    assert len(saved) < 10 and difference(saved, given).startswith("table was ")
    assert difference({"a": 1}, {}) == "a was 1 and is not a setting here"
    assert difference({}, {"a": 1}) == "a is 1 here and not among the saved settings"


def test_namesakes_of_ours_differ():
    assert difference(flatten({"a": losses.SigmoidWeighting()}), flatten({"a": clip.SigmoidLoss()})).startswith(
        "a was 'jaxdiff.diffusion.losses.SigmoidWeighting'"
    )


def test_a_class_of_a_script_is_the_same_when_it_is_imported():
    imported = make_dataclass("Inner", [("table", tuple), ("colour", Colour, Colour.RED)], frozen=True)
    imported.__module__ = "__main__"
    assert difference(flatten({"a": Inner(())}), flatten({"a": imported(())})) is None


def test_hashed_settings_do_not_depend_on_order_or_on_how():
    assert canonical({"b": 1, "a": (1.5, None)}) == b'{"a":[1.5,null],"b":1}' == canonical({"a": [1.5, None], "b": 1})
    assert canonical(Inner((1.0,), threads=4)) == canonical(Inner((1.0,)))
    assert len({canonical(each) for each in (Inner((1.0,)), Inner((2.0,)), Inner((1.0,), Colour.BLUE))}) == 3

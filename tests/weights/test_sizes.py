"""Sizes that settings ask for: out of bounds, they are refused by name before anything is built."""

import dataclasses
import json
import time
import typing

import jax
import jax.numpy as jnp
import pytest
import small

from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.classifier import ClassifierConfig
from jaxdiff.nets.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.nets.t5 import T5Config
from jaxdiff.systems.imagen import BASE_64_2B, IF_II_L
from jaxdiff.weights import classifier, sizes
from jaxdiff.weights.imagen import load_model
from jaxdiff.weights.settings import TABLE, VERSION, from_json, to_json

CLASSES = [*TABLE.classes.values(), T5Config, TextTowerConfig, ImageTowerConfig, CLIPConfig]


def test_every_whole_number_has_bounds():
    """A field that is added later without bounds fails here."""
    for cls in filter(dataclasses.is_dataclass, CLASSES):
        hints = typing.get_type_hints(cls)
        whole = {
            field.name
            for field in dataclasses.fields(cls)
            if hints[field.name] in (int, int | None, tuple[int, ...]) and not field.metadata.get("how")
        }
        assert sizes.BOUNDS.get(cls, {}).keys() == whole, cls


@pytest.mark.parametrize("stage", [BASE_64_2B, IF_II_L, small.BASE, small.SR], ids=["2b", "IF-II-L", "base", "sr"])
def test_networks_that_are_good(stage):
    sizes.check_network(stage.unet, "here")
    assert from_json(to_json(stage), "here") == stage


def changed(part, **changes):
    """The settings of a small stage with one that is wrong, in the stage or in its network."""
    stage = to_json(small.SR)
    (stage if part == "stage" else stage["unet"]).update(changes)
    return stage


HOURS = 10**6
BAD = [
    *[(name, value) for name in ("channels", "time_width", "text_width", "head_channels") for value in (0, -4, 2**30)],
    *[("patch", value) for value in (0, -1, True, 65, 1e30, 2.0)],
    *[("blocks", value) for value in ([HOURS], [-1], [True], [1.5], [0] * HOURS, [256, 1])],
    *[("outer_blocks", value) for value in (HOURS, -1)],
    *[("multipliers", value) for value in ([0], [-2], [2**20], [1, "x"], [1, None], ["1"])],
    *[("heads", value) for value in (3, -1, 2**40, False)],
    *[("pool_heads", value) for value in (3, -1, HOURS)],
    *[("norm_groups", value) for value in (-1, 3, 10**30)],
    *[("feed_forward", value) for value in (-1, HOURS)],
    *[("skip_scale", value) for value in (float("nan"), float("inf"), 1e999, 10**400, True, "1")],
    *[("dtype", value) for value in ("float16", "x" * 10**6, 1)],
    *[("self_attention", value) for value in ([1], ["yes"], [True] * HOURS)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:30])
def test_networks_of_ours(name, value, tmp_path):
    assert_refused(changed("unet", **{name: value}), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("resolution", value) for value in (0, -16, 2**30, True, 16.0)],
        *[("low_resolution", value) for value in (0, -4, True)],
        *[("text_length", value) for value in (0, -1, 2**40)],
        *[("text_dropout", value) for value in (float("nan"), True, -1.0)],
        ("schedule", {"class": "diffusion.LinearBetaSchedule", "steps": HOURS}),
        ("schedule", {"class": "diffusion.LinearBetaSchedule", "steps": 1}),
        ("schedule", {"class": "diffusion.TabulatedSchedule", "alpha_bar": [0.5] * HOURS}),
        ("schedule", {"class": "diffusion.TabulatedSchedule", "alpha_bar": [0.5, "a"]}),
        ("schedule", {"class": "diffusion.CosineSchedule", "shift": 1e999}),
        ("schedule", {"class": "\x1b[2J" * 10**5}),
        ("schedule", {"class": "diffusion.CosineSchedule", "\x1b[2J" * 10**5: 1}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_stages_of_ours(name, value, tmp_path):
    assert_refused(changed("stage", **{name: value}), tmp_path)


def assert_refused(stage, folder):
    """Of a stage's folder, in a moment, in one line that names the file."""
    path = folder / "stage.json"
    path.write_text(json.dumps({"version": VERSION, "stage": stage, "sampling": to_json(SamplingConfig())}))
    (folder / "model.safetensors").write_bytes(b"")
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}") and message.isprintable() and len(message) < 900, message
    assert "model.safetensors" not in message
    assert time.monotonic() - start < 5


def test_settings_nested_deeply(tmp_path):
    """Lists, objects, and classes of ours in one another."""
    ranges = '{"class": "diffusion.LogSNRRange", "low": -5.0, "high": 0.0, "rest": '
    for stage in ("[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, ranges * 500 + "1" + "}" * 500):
        (tmp_path / "stage.json").write_text(f'{{"stage": {stage}, "sampling": 1}}')
        with pytest.raises(ValueError, match=r"stage\.json is not JSON with settings: it is nested"):
            load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"side": 0},
        {"side": True},
        {"channels": [6]},  # groups of four
        {"channels": [0]},
        {"channels": [8] * 1000},
        {"features": -1},
        {"features": 2**40},
        {"classes": [0, 3]},
        {"classes": [2, 2**30]},
        {"names": ["a", "a"]},
        {"names": ["a", "b/c"]},
        {"names": ["a", "\x1b[2J"]},
        {"names": ["a", "x" * 10**6]},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_classifiers(changes, tmp_path):
    config = ClassifierConfig(side=8, channels=(8,), features=4, names=("a", "b"), classes=(2, 3))
    told = {"version": VERSION, "name": "shapes", "config": to_json(config) | changes}
    (tmp_path / "classifier.json").write_text(json.dumps(told))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"classifier\.json") as error:
        classifier.load(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 900


@pytest.mark.parametrize("name", ["", 3, None, "a\nb", "\x1b[2J", "x" * 10**6], ids=range(6))
def test_names_of_classifiers(name, tmp_path):
    config = to_json(ClassifierConfig(side=8, channels=(8,), names=("a",), classes=(2,)))
    (tmp_path / "classifier.json").write_text(json.dumps({"version": VERSION, "name": name, "config": config}))
    if name == "":
        with pytest.raises(FileNotFoundError, match="no weights"):
            classifier.load(tmp_path)
        return
    with pytest.raises(ValueError, match=r"classifier\.json: (not the settings|name is )") as error:
        classifier.load(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_shapes_of_too_many_parameters():
    huge = {"a": jax.ShapeDtypeStruct((2**30, 2**11), jnp.float32)}
    with pytest.raises(ValueError, match=r"here: these settings make a network of 2\.2e\+12 parameters: 1\.1e\+12 at"):
        sizes.shapes(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), huge), "here")
    with pytest.raises(ValueError, match="here: these settings make no network: one line"):
        sizes.shapes(lambda: fail("one\nline"), "here")
    assert sizes.shapes(lambda: {"a": jnp.zeros(3)}, "here")["a"].shape == (3,)


def fail(text):
    raise TypeError(text)


def test_nothing_is_allocated():
    """The largest images that a CLIP may be of are 3 GB: as shapes they are nothing."""
    from jaxdiff.weights import clip

    config = CLIPConfig(None, ImageTowerConfig(width=8, layers=1, heads=1, resolution=2**14, patch=2**7), width=None)
    before = sum(array.nbytes for array in jax.live_arrays())
    assert clip._shapes(config)["image"]["positions"].shape == (2**14 + 1, 8)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20

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
from jaxdiff.systems.deepfloyd import IF_II_L
from jaxdiff.systems.imagen import BASE_64_2B
from jaxdiff.systems.imagen_tiny import SR_256_TINY
from jaxdiff.weights import classifier, sizes
from jaxdiff.weights.settings import TABLE, VERSION, from_json, to_json
from jaxdiff.weights.stages import load_model

CLASSES = [*TABLE.classes.values(), T5Config, TextTowerConfig, ImageTowerConfig, CLIPConfig]


def is_whole(hint):
    """Whether a field of this type holds whole numbers; those of `Number` may be traced or fractions."""
    inner = typing.get_args(hint)
    return hint in (int, tuple[int, ...]) or (
        int in inner and float not in inner and tuple not in map(typing.get_origin, inner)
    )


def test_every_whole_number_has_bounds():
    """A field that is added later without bounds fails here."""
    for cls in filter(dataclasses.is_dataclass, CLASSES):
        hints = typing.get_type_hints(cls)
        whole = {
            field.name
            for field in dataclasses.fields(cls)
            if is_whole(hints[field.name]) and not field.metadata.get("how")
        }
        assert sizes.BOUNDS.get(cls, {}).keys() == whole, cls


GOOD = {"2b": BASE_64_2B, "IF-II-L": IF_II_L, "sr-tiny": SR_256_TINY, "base": small.BASE, "sr": small.SR}


@pytest.mark.parametrize("model", GOOD.values(), ids=GOOD)
def test_networks_that_are_good(model):
    sizes.check_network(model.unet, "here")
    sizes.check_model(model, "here")
    assert from_json(to_json(model), "here") == model


def changed(setting, value):
    """The settings of a small model with one that is wrong, by its path."""
    found = model = to_json(small.SR)
    *path, name = setting.split(".")
    for part in path:
        found = found[int(part) if part.isdigit() else part]
    assert name in found, setting
    found[name] = value
    return model


HOURS = 10**6
BAD = [
    *[
        (name, value)
        for name in ("channels", "attention.head_channels", "conditioning.width", "conditioning.text.width")
        for value in (0, -4, 2**30)
    ],
    *[("patch", value) for value in (0, -1, True, 65, 1e30, 2.0)],
    *[("blocks", value) for value in ([HOURS], [-1], [True], [1.5], [0] * HOURS, [256, 1])],
    *[("outer_blocks", value) for value in (HOURS, -1)],
    *[("multipliers", value) for value in ([0], [-2], [2**20], [1, "x"], [1, None], ["1"])],
    *[("attention.heads", value) for value in (3, -1, 2**40, False)],
    *[("conditioning.text.pool_heads", value) for value in (3, -1, HOURS)],
    *[("conditioning.text.pool", value) for value in (None, 1, "yes")],
    *[
        ("conditioning.text", value)
        for value in ({}, [], {"class": "core.Image"}, {"class": "nets.MaskedText", "pool": 0})
    ],
    *[("conditioning.frequencies", value) for value in (-1, 2**30, True, None, 1.5)],
    *[
        ("conditioning", value)
        for value in (None, {}, [], {"class": "nets.Attention"}, {"class": "nets.Conditioning", "a": 1})
    ],
    *[("norm_groups", value) for value in (-1, 3, 10**30)],
    *[("attention.feed_forward", value) for value in (-1, HOURS)],
    *[("attention.group_text", value) for value in (1, None)],
    *[("attention", value) for value in (None, {}, [True], {"class": "nets.Execution"}, {"class": "nets.Attention"})],
    *[("skip_scale", value) for value in (float("nan"), float("inf"), 1e999, 10**400, True, "1")],
    *[("execution.dtype", value) for value in ("float16", "x" * 10**6, 1)],
    *[("execution", value) for value in (None, {}, "bfloat16", {"class": "nets.Execution", "dtype": None})],
    *[("attention.self_attention", value) for value in ([1], ["yes"], [True] * HOURS)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:30])
def test_networks_of_ours(name, value, tmp_path):
    assert_refused(changed(f"unet.{name}", value), tmp_path)


def test_heads_that_pool_a_text_as_it_comes():
    """They divide the width of the text encoder, which only the whole model knows; of the reader's width nothing."""
    for heads, width, good in ((4, 24, True), (5, 24, False), (0, 4096, True), (0, 200, False), (5, None, True)):
        text = {"class": "models.TextConditioner", "width": width, "length": 77}
        settings = to_json(IF_II_L) | {"conditioners": [text, to_json(IF_II_L)["conditioners"][1]]}
        settings["unet"]["conditioning"]["text"]["pool_heads"] = heads
        if good:
            assert from_json(settings, "here").text.width == width
            continue
        with pytest.raises(
            ValueError, match=f"^here: pool_heads: {heads or 3} heads do not divide a width of {width}$"
        ):
            from_json(settings, "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("side", value) for value in (0, -16, 2**30, True, 16.0, None)],
        *[("product", value) for value in (None, {}, [], 3, {"class": "core.Token"}, {"class": "models.Tiles"})],
        *[("product.channels", value) for value in (0, -3, True, 2**30, 3.0, None)],
        *[("product.stride", value) for value in (0, -1, 2**20, "8")],
        *[("conditioners", value) for value in (None, {}, 3, [], [None], [3], [[]], [{}], [{"class": "core.Image"}])],
        *[("conditioners", [to_json(part)] * 2) for part in small.SR.conditioners],
        ("conditioners", [to_json(small.TEXT)] * 70_000),
        *[("conditioners.0.width", value) for value in (0, -1, 2**40, True, None)],
        *[("conditioners.0.length", value) for value in (0, -1, 2**40, 4.0, None)],
        *[("conditioners.0.dropout", value) for value in (float("nan"), True, -1.0)],
        *[
            ("conditioners.0.null", value)
            for value in (None, "ZEROS", {"class": "models.Enlargement", "member": "CUBIC"})
        ],
        *[("conditioners.1.factor", value) for value in (0, -4, True, 3, 2**20, None)],
        *[("conditioners.1.channels", value) for value in (0, -4, True, 2**30)],
        *[("conditioners.1.max_level", value) for value in (float("nan"), True, -0.1, 1.1, None)],
        *[
            ("conditioners.1.enlargement", value)
            for value in (None, 2, {"class": "models.NullText", "member": "ZEROS"})
        ],
        *[("conditioners.1.augmentation", value) for value in (3, {}, {"class": "diffusion.UniformTimes"})],
        ("conditioners.1.augmentation", {"class": "diffusion.LinearBetaSchedule", "steps": HOURS}),
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
    assert_refused(changed(name, value), tmp_path)


def assert_refused(stage, folder):
    """Of a stage's folder, in a moment, in one line that names the file."""
    path = folder / "stage.json"
    path.write_text(json.dumps({"version": VERSION, "stage": stage, "sampling": to_json(SamplingConfig())}))
    (folder / "model.safetensors").write_bytes(b"")
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}") and message.isprintable() and len(message) < 900, message
    assert "model.safetensors" not in message
    assert time.process_time() - start < 5


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
        sizes.shapes(lambda _: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), huge), None, "here")
    with pytest.raises(ValueError, match="here: these settings are invalid: one line"):
        sizes.shapes(fail, "one\nline", "here")
    assert sizes.shapes(lambda n: {"a": jnp.zeros(n)}, 3, "here")["a"].shape == (3,)


def fail(text):
    raise TypeError(text)


def test_nothing_is_allocated():
    """The largest images that a CLIP may be of are 3 GB: as shapes they are nothing."""
    from jaxdiff.weights import clip

    config = CLIPConfig(None, ImageTowerConfig(width=8, layers=1, heads=1, resolution=2**14, patch=2**7), width=None)
    before = sum(array.nbytes for array in jax.live_arrays())
    assert clip._shapes(config)["image"]["positions"].shape == (2**14 + 1, 8)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20

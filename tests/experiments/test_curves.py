"""The curves on very small networks: what is trained, drawn and kept, what is not made again, the figures.

Grids are slow tests; the ordinary run has the settings that are refused, and CLIP as a text encoder.
"""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from small_cascade import BASE, SR_256, T5
from small_judges import write_judges

from experiments.cli import run
from experiments.recipes import curves, curves_models
from experiments.recipes.curves_models import Training, text_of
from experiments.table import TASKS
from jaxdiff.weights import clip


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    return write_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True, scope="module")
def small():
    stage = dataclasses.replace(BASE, side=32)
    twofold = dataclasses.replace(SR_256, side=64, conditioners=(dataclasses.replace(SR_256.low_res, factor=2),))
    with pytest.MonkeyPatch.context() as patch:
        presets = TASKS["imagen.base32"].presets
        for name in ("small", "medium", "tiny"):
            patch.setitem(presets, name, dataclasses.replace(presets[name], model=stage))
        patch.setitem(TASKS["t5"].presets, "micro", T5)
        patch.setitem(TASKS["t5"].presets, "mini", T5)
        patch.setattr(curves_models, "SIZES", ("micro", "mini"))
        patch.setitem(curves_models.ENLARGING, 32, twofold)
        yield


@pytest.fixture(scope="module")
def settings(judges, data_dir, tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts") / "texts.txt"
    texts.write_text("".join(f"a definition of the thing number {i}\n" for i in range(60)))
    return (
        "--data-dir", data_dir, "--clip", judges["clip"], "--classifier", judges["classifier"], "--texts", texts,
        "--encoder", "mini", "--unets", "small", "medium", "--guidance", 1, 4, "--n", 10, "--sample-batch", 8,
        "--sampling-steps", 2, "--steps", 2, "--batch", 8, "--t5-steps", 2, "--t5-batch", 8, "--vocab", 400,
        "--examples", 40, "--held-out", 20, "--sr-steps", 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def grid(settings, tmp_path_factory):
    """The folder of a grid, which the tests may add to."""
    out = tmp_path_factory.mktemp("grid") / "out"
    figures = "--figures", "unets", "thresholding", "--seeds", 0
    with pytest.raises(SystemExit) as stop:
        run(curves.main, [str(argument) for argument in ("--out", out, *settings, *figures)])
    assert stop.value.code == 0
    shutil.copyfile(out / "curves.csv", out / "first.csv")
    return out


@pytest.fixture
def drawn(command, settings):
    return lambda out, *more: command(curves.main, "--out", out, *settings, *more)


def rows_of(file):
    return list(csv.DictReader(file.open()))


@pytest.mark.slow
def test_a_grid(grid):
    for figure in ("unets", "thresholding"):
        assert (grid / f"{figure}.png").stat().st_size > 10_000
    with Image.open(grid / "unets-images.png") as sheet:
        assert sheet.width == pytest.approx(2 * 128, abs=40)  # a column for each weight, four images in a tile
    rows = rows_of(grid / "first.csv")
    assert len(rows) == 2 * (2 + 3)  # weights × (U-Nets, thresholdings)
    assert all(np.isfinite(float(row["fd"])) and float(row["fd"]) > 0 for row in rows)
    models = {path.name for path in (grid / "models").iterdir()}
    assert models >= {"mini-medium-s0", "mini-small-s0"}
    cell = json.loads((grid / "cells" / "mini-small-dynamic-s0-w4.json").read_text())
    assert cell["made_by"]["n"] == 10 and cell["made_by"]["steps"] == 2


@pytest.mark.slow
def test_a_grid_goes_on(drawn, grid):
    """A seed more, and a cell again; what is there already stays as it is."""
    file = grid / "cells" / "mini-small-dynamic-s0-w4.json"
    cell = json.loads(file.read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (grid / "cells").iterdir() if path.stem != file.stem}
    file.unlink()
    assert drawn(grid, "--figures", "unets", "--unets", "small", "--seeds", 0, 1).code == 0
    assert json.loads(file.read_text()) == cell
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    rows = rows_of(grid / "curves.csv")
    assert [(row["weight"], row["seed"]) for row in rows] == [("1.0", "0"), ("1.0", "1"), ("4.0", "0"), ("4.0", "1")]


@pytest.mark.slow
def test_other_settings_want_another_grid(drawn, grid):
    other = drawn(grid, "--figures", "unets", "--n", 9)
    assert other.code == 2 and "made with n 10, not 9" in other.err
    other = drawn(grid, "--figures", "unets", "--guidance", 3, "--steps", 3)  # no cell yet, but the models are there
    assert other.code == 2 and "training.json: made with steps 2, not 3" in other.err


@pytest.mark.slow
def test_encoders(drawn, grid):
    done = drawn(grid, "--figures", "encoders", "--encoders", "untrained", "clip", "--seeds", 0)
    assert done.code == 0, done.err
    assert {row["curve"] for row in rows_of(grid / "curves.csv")} == {"T5 untrained", "CLIP text"}
    assert (grid / "models" / "clip-small-s0").is_dir() and (grid / "encoders.png").stat().st_size > 10_000


@pytest.mark.slow
def test_augmentation(drawn, grid):
    done = drawn(grid, "--figures", "augmentation", "--aug-levels", 0, 0.5, "--seeds", 0, "--guidance", 2)
    assert done.code == 0, done.err
    rows = rows_of(grid / "curves.csv")
    assert [row["curve"] for row in rows] == ["level 0", "level 0.5"]
    assert rows[0]["fd"] != rows[1]["fd"]
    assert (grid / "models" / "sr64" / "model" / "stage.json").is_file()


@pytest.mark.parametrize(
    "more, culprit",
    [
        (("--n", 1), "n 1"),
        (("--n", 6), "n 6: the Fréchet distance of 6 features"),
        (("--n", 21), "n 21: there are 20 held-out captions"),
        (("--unets", "small", "large"), "U-Net large: choose from micro, small, medium, tiny"),
        (("--interval", 3, -3), "guidance interval"),
        (("--steps", 0), "steps 0"),
        (("--resolution", 48), "resolution 48"),
        (("--texts", "/nowhere"), "experiments.recipes.glosses"),
        (("--encoders", "/nowhere/t5"), "/nowhere/t5"),
        (("--clip", "None"), "name both networks"),
        (("--figures", "weather"), "weather"),
        (("--aug-levels", 2), "--aug-levels"),
    ],
)
def test_bad_settings(drawn, more, culprit, tmp_path):
    done = drawn(tmp_path / "out", *more)
    assert done.code == 2 and culprit in done.err, done.err
    assert not list(tmp_path.glob("out/models/*"))  # nothing was trained before


def test_clips_text_tower_stands_in_for_a_t5(judges, tmp_path, data_dir):
    text = text_of("clip", tmp_path, Training(), judges["clip"], None, data_dir)
    assert (text.width, text.length) == (8, 24)
    captions = ["a red star", "a large red star on a black background"]
    found = text.encode(captions)
    assert found.tokens.shape == (2, 24, 8)
    counts = np.asarray(found.mask).sum(1)
    assert 0 < counts[0] < counts[1] < 24
    assert not np.asarray(found.tokens)[~np.asarray(found.mask)].any()
    states = clip.load_text_encoder(judges["clip"]).encode(captions).tokens[:, :24]
    np.testing.assert_allclose(found.tokens, np.where(found.mask[..., None], states, 0.0), atol=1e-5)

"""The recipe that compares systems: equal costs, and a page."""

import json

import pytest
from PIL import Image

from experiments.recipes import compare
from experiments.recipes.comparison import count_of, nearest
from experiments.table import TASKS
from jaxdiff.models.dvae import DVAEModel
from jaxdiff.nets.dvae import DVAEConfig


def dvae(width):
    return DVAEModel(DVAEConfig(codes=8, hidden=width, multipliers=(1,), blocks=1, code_width=4), side=8)


def test_the_nearest_width():
    counts = [count_of(dvae(width)) for width in range(4, 17, 4)]
    for wanted, width in ((0, 4), (counts[1] + 1, 8), (counts[2] - 1, 12), (10 * counts[3], 16)):
        assert nearest(dvae, range(4, 17, 4), wanted) == dvae(width)


def test_bad_settings(command):
    done = command(compare.main, "--systems", "sd", "gan")
    assert done.code == 2 and "--systems gan: choose from sd, imagen, dalle, unclip" in done.err
    assert "--frechet 80: more than 128, the number of features" in command(compare.main, "--frechet", 80).err
    assert "--tflop 0: must be above 0" in command(compare.main, "--tflop", 0).err
    assert "--trained runs/sd: NAME=RUN" in command(compare.main, "--trained", "runs/sd").err


@pytest.mark.usefixtures("small_presets")
def test_the_sheet_of_trained_systems(standin, tmp_path, command):
    """A cascade's base images."""
    done = command(compare.main, "--trained", f"imagen={standin}", f"again={standin}", "--out", tmp_path)
    assert done.code == 0, done.err
    assert [file.name for file in tmp_path.iterdir()] == ["images.png"]
    with Image.open(tmp_path / "images.png") as sheet:
        assert sheet.width > 8 * 128 and 256 < sheet.height < 512


@pytest.mark.parametrize(
    "name", ["dalle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("imagen", "unclip"))]
)
def test_parameters_and_operations_are_equal(name):
    settings = compare.Settings(tflop=40.0)
    wanted = sum(count_of(compare._model(TASKS[part.task], compare._preset(part))) for part in compare.SYSTEMS["sd"])
    costs = compare.costs_of(name, compare.fitted(compare.SYSTEMS[name], wanted, settings), wanted, settings)
    assert costs["parameters"] == pytest.approx(wanted, rel=0.05)
    assert costs["flops"] == pytest.approx(40e12, rel=0.01)
    with pytest.raises(ValueError, match=f"parameters of {name}: .*, of the others"):
        compare.costs_of(name, compare.fitted(compare.SYSTEMS[name], wanted, settings), 2 * wanted, settings)


@pytest.mark.slow
def test_the_page(command, tmp_path):
    small = "--tflop", 0.4, "--batch", 4, "--n", 4, "--frechet", 140, "--examples", 100
    done = command(compare.main, *small, "--out", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert done.code == 0, done.err
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| | sd | imagen | dalle | unclip |" in page and (tmp_path / "out" / "images.png").is_file()
    scores = json.loads((tmp_path / "out" / "dalle" / "scores.json").read_text())
    assert scores["images"].keys() == {"sd.autoencoder", "dalle.transformer"} and 0 <= scores["one_object"] <= 1

"""A training run is sampled from as it is, finished or not; any other folder says what it is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from experiments import export, sample, train
from jaxdiff.core.files import write_json
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.weights import runs
from jaxdiff.weights.kinds import describe
from jaxdiff.weights.stages import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(folder, standin, command, small_presets):
    """Two runs of two steps, base64 and sr256, trained once."""
    if not (folder / "sr256").is_dir():
        short = "--steps", 2, "--batch", 8, "--sample-every", 0, "--examples", 16, "--held-out", 2
        short = *short, "--data-dir", folder / "data", "--save-every", 1, "--evaluate-every", 0, "--ema-decay", 0.995
        text = "--text", standin / "text", "--text-length", 16
        done = command(train, "imagen.base64", *short, *text, "--out", folder / "base64")
        assert done.code == 0, done.err
        done = command(train, "imagen.sr256", *short, "--crop", 64, "--out", folder / "sr256")
        assert done.code == 0, done.err
    return folder


def test_finished_and_not(trained, command, tmp_path):
    base, options = trained / "base64", SampleOptions(seed=3, last=0)
    expected = jaxdiff.from_pretrained(base).sample(["a red circle"], options)[0]
    # Without the end of the run: its newest checkpoint has the same averaged parameters.
    unfinished = tmp_path / "base64"
    shutil.copytree(base, unfinished)
    (unfinished / "model" / "model.safetensors").unlink()
    (found,) = jaxdiff.from_pretrained(str(unfinished)).sample(["a red circle"], options)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # An older checkpoint is what there is, where the newest is gone.
    shutil.rmtree(unfinished / "checkpoints" / "2")
    (older,) = jaxdiff.from_pretrained(unfinished).sample(["a red circle"], options)
    assert np.abs(older - expected).max() > 1e-5
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has saved no checkpoint yet"):
        jaxdiff.from_pretrained(unfinished)


def test_from_the_command_line(trained, command, tmp_path):
    weights = "--weights", trained / "base64", "--sr", trained / "sr256"
    done = command(sample, "a red circle", *weights, "--out", tmp_path / "images")
    assert done.code == 0 and "1 images at 256 pixels" in done.out, done.err
    assert Image.open(tmp_path / "images" / "0000-a-red-circle.png").size == (256, 256)
    assert ": step " not in done.err
    # A run that is not finished says so, and one stage in the place of another is named.
    unfinished = tmp_path / "base64"
    shutil.copytree(trained / "base64", unfinished)
    shutil.rmtree(unfinished / "checkpoints" / "2")
    done = command(sample, "a red circle", "--weights", unfinished, "--out", tmp_path / "early")
    assert done.code == 0 and f"{unfinished}: step 1 of 2" in done.err
    done = command(sample, "a red circle", *weights[:2], "--sr", trained / "base64", "--out", tmp_path / "twice")
    last = done.err.splitlines()[-1]
    assert done.code == 2 and f"{trained / 'base64'}: the 64 stage samples from text" in last
    # A folder of runs is a cascade, too.
    both = jaxdiff.from_pretrained(trained)
    assert both.sides == (64, 256)
    done = command(
        export, "imagen", "--base64", trained / "base64", "--sr256", trained / "sr256", "--out", tmp_path / "c"
    )
    assert done.code == 0, done.err
    exported = jaxdiff.from_pretrained(tmp_path / "c")
    for a, b in zip(both.sample(["a star"]), exported.sample(["a star"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_saved_and_read_again(trained, tmp_path):
    pipeline = jaxdiff.from_pretrained(trained)
    jaxdiff.save_pretrained(pipeline, tmp_path / "saved")
    again = jaxdiff.from_pretrained(tmp_path / "saved")
    for a, b in zip(pipeline.sample(["a star"]), again.sample(["a star"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="holds sr256 of another cascade"):
        jaxdiff.save_pretrained(jaxdiff.from_pretrained(trained / "base64"), tmp_path / "saved")


def test_the_text_encoder_of_a_run(trained, standin, command, tmp_path):
    source = runs.read_text_source(trained / "base64")
    assert source.source == str((standin / "text").resolve()) and source.length == 16
    assert source.fingerprint == load_model(trained / "base64" / "model").text_fingerprint
    moved = tmp_path / "base64"
    shutil.copytree(trained / "base64", moved)
    told = json.loads((moved / "text_encoder.json").read_text())
    write_json(moved / "text_encoder.json", told | {"source": str(tmp_path / "gone")})
    done = command(sample, "a red circle", "--weights", moved, "--up-to", 64, "--out", tmp_path / "images")
    assert done.code == 2 and "is no longer there; name it with --text" in done.err
    named = "--text", standin / "text"
    done = command(sample, "a red circle", "--weights", moved, *named, "--up-to", 64, "--out", tmp_path / "images")
    assert done.code == 0, done.err
    write_json(moved / "text_encoder.json", {"source": 1})
    done = command(sample, "a red circle", "--weights", moved, "--up-to", 64, "--out", tmp_path / "other")
    assert done.code == 2 and "does not say where a text encoder is" in done.err


def test_what_a_folder_is(trained, standin, command, tmp_path):
    """Each of these is near what was meant, and says how it is used."""
    for name in ("t5", "clip", "gone"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        write_json(tmp_path / name / "settings.json", {"version": 1, "command": name, "settings": {}})
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "embeddings.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    shutil.copytree(trained / "sr256", tmp_path / "many" / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for place, said in {
        standin / "text": "a T5 in the transformers layout",
        tmp_path / "t5": "is for --text of experiments.train",
        tmp_path / "clip": "is for --clip of experiments.evaluate",
        tmp_path / "gone": "a run of 'gone'",
        tmp_path / "old": "a run without model/",
        tmp_path / "stored": "--embeddings of experiments.train",
        tmp_path / "data": "records:",
        tmp_path / "empty": "an empty folder",
        tmp_path / "many": "holds the runs mine",
        tmp_path / "other": "python -m experiments.export imagen",
    }.items():
        assert said in describe(place), place
        done = command(sample, "a red circle", "--weights", place, "--out", tmp_path / "images")
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err


def test_super_resolution_alone_says_what_is_missing(trained, command, tmp_path):
    done = command(sample, "a red circle", "--weights", trained / "sr256", "--out", tmp_path / "images")
    assert done.code == 2 and "it must come after a stage" in done.err and not (tmp_path / "images").exists()

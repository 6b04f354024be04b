"""The main job: 16 captions on one sheet with a report, captions of one's own, and a cascade trained from scratch."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import quickstart
from experiments.quickstart_train import BaseTraining, SuperResolutionTraining, T5Training, train_cascade
from jaxdiff.data import png_metadata
from jaxdiff.data.images import to_uint8
from jaxdiff.weights.imagen import load
from jaxdiff.weights.t5 import load_text_encoder
from jaxdiff.weights.tree import load_tree

ROOT = Path(__file__).parents[2]
ACCURACIES = [f"{kind}_accuracy_{resolution}" for kind in ("attribute", "colour") for resolution in (64, 256, 1024)]
OF_TWO = [f"{kind}_accuracy_{resolution}_two_objects" for kind in ("attribute", "colour") for resolution in (64, 256)]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_sixteen_held_out_captions(standin, tmp_path, command):
    done = command(quickstart.main, "--weights", standin, "--out", tmp_path)
    assert done.code == 0, done.err
    report = report_of(tmp_path)
    assert all(0 <= report[name] <= 1 for name in ACCURACIES + OF_TWO)
    assert {name for name in report if "accuracy" in name} == {*ACCURACIES, *OF_TWO}  # none of two is drawn at 1024
    assert all(name in done.out for name in ACCURACIES + OF_TWO)
    assert {"load", "64", "256", "1024", "total"} == report["seconds"].keys()
    assert len(report["captions"]) == len(set(report["captions"])) == 16
    captions = quickstart.chosen_captions()
    assert [len(caption.stated.objects) for caption in captions] == [1] * 12 + [2] * 4
    assert report["captions"] == [caption.text for caption in captions]
    sizes = [Image.open(path).size[0] for path in (tmp_path / "images").glob("*.png")]
    assert sorted(sizes) == [64] * 16 + [256] * 16 + [1024] * 2
    assert Image.open(tmp_path / "grid.png").size > (4 * (128 + 256), 4 * 256)
    # It draws what the library draws.
    first = next((tmp_path / "images").glob("00-*-1024.png"))
    expected = load(standin).sample(report["captions"][:2])[2][0]
    assert np.abs(np.asarray(Image.open(first)).astype(int) - to_uint8(expected)).max() <= 1
    metadata = png_metadata.read(first.read_bytes())
    assert metadata.prompt == report["captions"][0] and metadata.settings["resolution"] == 1024


def test_one_object_and_two_are_scored_apart():
    from jaxdiff.data.images import to_float
    from jaxdiff.data.shapes_caption import held_out_examples
    from jaxdiff.data.shapes_draw import draw

    examples = held_out_examples(12) + held_out_examples(4, objects=2)
    captions = [caption for _, caption in examples]
    assert captions == quickstart.chosen_captions()
    drawn = np.stack([to_float(draw(scene, 64)) for scene, _ in examples])
    drawn[0], drawn[12:] = drawn[5], drawn[0]  # one of twelve, and all of two objects, are wrong
    tallies = quickstart.tallied(captions, {64: drawn, 1024: drawn[:2]})
    scores = quickstart.scores(tallies)
    assert scores["attribute_accuracy_64"] == pytest.approx(11 / 12)
    assert scores["attribute_accuracy_1024"] == pytest.approx(1 / 2)
    assert 11 / 12 <= scores["colour_accuracy_64"] <= 1
    assert scores["attribute_accuracy_64_two_objects"] == 0 and scores["colour_accuracy_64_two_objects"] < 1
    assert "attribute_accuracy_1024_two_objects" not in scores
    assert len(scores["wrong"]["64"]) == 5 and len(scores["wrong"]["1024"]) == 1
    one, two = quickstart.notes(tallies)
    assert one.startswith("One object") and "11 of 12 at 64, 1 of 2 at 1024" in one
    assert two.startswith("Two objects") and "0 of 4 at 64 pixels" in two
    # The sheet has a line of each below the images.
    texts, drawn = [c.text for c in captions], {64: drawn, 256: drawn.repeat(4, 1).repeat(4, 2)}
    plain, noted = (quickstart.sheet(texts, drawn, lines) for lines in ((), (one, two)))
    assert noted.size[0] == plain.size[0] and noted.size[1] > plain.size[1] + 2 * quickstart.FONT
    below = np.asarray(noted)[plain.size[1] :].min(-1)
    assert (below[: quickstart.FONT] < 100).any() and (below[quickstart.FONT + 4 : 2 * quickstart.FONT + 4] < 100).any()


def test_captions_that_are_nobodys_have_no_scores():
    assert quickstart.scores(quickstart.tallied([], {64: np.zeros((1, 64, 64, 3))})) == {}


def test_captions_of_ones_own_in_a_process(standin, tmp_path):
    """As from a shell; no accuracy, because nobody knows what is right."""
    arguments = ["a red circle", "--weights", str(standin), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "out")
    assert report["captions"] == ["a red circle"]
    assert not [name for name in report if "accuracy" in name]
    names = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert names == [f"00-a-red-circle-{resolution}.png" for resolution in (1024, 256, 64)]


SHORT = (
    T5Training(t5_steps=2, t5_batch=8),
    BaseTraining(examples=16, base_steps=2, base_batch=8),
    SuperResolutionTraining(examples_256=8, examples_1024=8, sr256_steps=2, sr_batch=8, sr_crop=64),
)


@pytest.mark.usefixtures("small_presets")
@pytest.mark.slow
def test_a_cascade_is_trained(tmp_path):
    """By default the last stage is the one before it again. What is finished is not trained again."""
    settings = quickstart.Training(*SHORT, sample_every=2)
    weights = train_cascade(settings, tmp_path)
    found = load(weights)
    assert weights == tmp_path / "weights" and found.sides == (64, 256, 1024)
    assert load_text_encoder(weights / "text", 16).config.decoder_layers == 0
    jax.tree.map(np.testing.assert_array_equal, *(sr.params for sr in found.decoders))
    for stage in ("base64", "sr256"):
        files = {path.name for path in (tmp_path / stage).iterdir()}
        assert {"checkpoints", "tensorboard", "loss.png", "metrics.jsonl", "samples", "model"} <= files
        assert (tmp_path / stage / "samples" / "0000002.png").is_file()
    files = [weights / stage / "model.safetensors" for stage in ("base64", "sr256", "sr1024")]
    assert {leaf.dtype for file in files for leaf in jax.tree.leaves(load_tree(file)[0])} == {np.dtype("float16")}
    before = files[0].read_bytes()
    assert train_cascade(settings, tmp_path) == weights and files[0].read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_presets")
def test_training_from_scratch(tmp_path, command):
    """The command, all four networks trained, with all scores."""
    settings = {
        name: value for group in SHORT for name, value in vars(group).items() if not isinstance(value, str | tuple)
    }
    settings |= {"sr1024_steps": 2, "psnr_images": 1, "sample_every": 2}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = command(quickstart.main, "--train", "--out", tmp_path, *options)
    assert done.code == 0, done.err
    report = report_of(tmp_path)
    assert all(0 <= report[name] <= 1 for name in ACCURACIES + OF_TWO)
    psnr = [report[f"psnr_{name}"] for name in ("256", "256_bicubic", "1024", "1024_bicubic")]
    assert all(10 < value < 60 for value in psnr)
    assert report["seconds"]["training"] > 0
    assert (tmp_path / "sr1024" / "samples" / "0000002.png").is_file() and (tmp_path / "grid.png").is_file()

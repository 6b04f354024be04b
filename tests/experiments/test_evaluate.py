"""Scores: what counts as right, what PSNR compares, and what the command writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_cascade import SR_256

from experiments.imagen import evaluate
from experiments.imagen.evaluate import Tally, psnr, psnr_scores, true_picture
from jaxdiff.data.pictures import resize, to_float
from jaxdiff.data.shapes_caption import held_out_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.diffusion.thresholding import Static
from jaxdiff.systems.cascade import Cascade
from jaxdiff.weights.imagen import load


def test_true_pictures_are_right_and_those_of_other_captions_are_not():
    examples = held_out_examples(8)
    captions = [caption for _, caption in examples]
    drawn = [to_float(draw(scene, 64)) for scene, _ in examples]
    tally = Tally()
    tally.add(64, drawn, captions)
    tally.add(256, [*drawn[:6], drawn[1], drawn[0]], captions)
    assert tally.accuracy(64) == 1
    assert tally.wrong(64) == {}
    assert set(tally.attributes(64).values()) == {1}
    assert tally.accuracy(256) == pytest.approx(6 / 8)
    assert tally.accuracy(256, 6) == 1
    assert set(tally.wrong(256)) == {captions[6].text, captions[7].text}
    assert "kind" in tally.wrong(256)[captions[6].text]
    assert tally.attributes(256)["kind"] < 1


def test_psnr():
    picture = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(picture, picture + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10))
    assert np.isfinite(psnr(picture, picture))


def without_weights(model: Cascade) -> Cascade:
    """Super-resolution that adds nothing to the enlarged input."""
    nothing = [dataclasses.replace(m, params=jax.tree.map(np.zeros_like, m.params)) for m in model.super_resolution]
    return dataclasses.replace(model, super_resolution=tuple(nothing))


def test_enlarging_alone_scores_like_bicubic(standin):
    """Our input is aligned with the true picture, and our filter is Pillow's: a stage that adds nothing is bicubic."""
    model = without_weights(load(standin))
    # Augmentation is switched off by the score itself; dynamic thresholding would take bicubic's overshoot as a scale.
    noisy = [dataclasses.replace(m.sampling, aug_level=0.3, thresholding=Static()) for m in model.models]
    for resolution in (256, 1024):
        scores = psnr_scores(model, resolution, 2, noisy)
        ours, bicubic = scores[f"psnr_{resolution}"], scores[f"psnr_{resolution}_bicubic"]
        assert ours == pytest.approx(bicubic, abs=0.05)
        assert 20 < bicubic < 45
    assert SR_256.residual


def test_the_small_pictures_are_pillows():
    text, large, small = true_picture(256, 64, 0)
    assert large.shape == (256, 256, 3) and isinstance(text, str)
    np.testing.assert_array_equal(small, resize(large, 64))


def test_the_command(standin, tmp_path, command):
    file = tmp_path / "scores" / "all.json"
    options = "--n", 4, "--psnr-256", 2, "--psnr-1024", 1, "--json", file, "--weights", standin
    done = command(evaluate.main, *options)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    for resolution in (64, 256, 1024):
        assert 0 <= scores[f"attribute_accuracy_{resolution}"] <= 1
        assert {"kind", "colour", "count"} <= scores[f"attributes_{resolution}"].keys()
    for name in ("psnr_256", "psnr_256_bicubic", "psnr_1024", "psnr_1024_bicubic"):
        assert 0 < scores[name] < 60
        assert name in done.out
    assert scores["seconds_per_picture"] == pytest.approx(sum(scores["seconds_per_picture_of_stage"].values()))
    assert scores["made_by"]["stages"][0]["steps"] == 2

    done = command(evaluate.main, *options, "--up-to", 64, "--seed", 1)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    assert "attribute_accuracy_64" in scores and "attribute_accuracy_256" not in scores
    assert scores["made_by"]["seed"] == 1 and "psnr_256" not in scores


def test_what_is_shipped(tmp_path, command):
    """The cascade in the package: its base draws the colours asked for, its super-resolution beats bicubic by 2 dB."""
    scores = tmp_path / "scores.json"
    counts = "--n", 6, "--up-to", 256, "--psnr-256", 2, "--psnr-1024", 0
    done = command(evaluate.main, *counts, "--json", scores)
    assert done.code == 0, done.err
    found = json.loads(scores.read_text())
    assert found["attributes_64"]["colour"] >= 5 / 6 and found["attributes_64"]["background"] >= 5 / 6
    assert found["psnr_256"] > found["psnr_256_bicubic"] + 2.0

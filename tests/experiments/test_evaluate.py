"""Scores: what counts as right, what PSNR compares, and what the command writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from small_cascade import SR_256

from experiments import evaluate
from experiments.evaluations.attributes import Tally, attribute_scores
from experiments.evaluations.colours import colour_scores
from experiments.evaluations.psnr import psnr, psnr_scores, small_image, true_image
from experiments.options.candidates import Ranking
from jaxdiff.data.images import resize, to_float, to_uint8
from jaxdiff.data.shapes_caption import held_out_captions, held_out_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.systems.pipeline import Batch, Pipeline, up_to, with_boxes
from jaxdiff.weights.imagen import load, trained


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
    assert tally.counts(256) == (6, 8)
    assert set(tally.wrong(256)) == {captions[6].text, captions[7].text}
    assert "kind" in tally.wrong(256)[captions[6].text]
    assert tally.attributes(256)["kind"] < 1


def test_psnr():
    picture = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(picture, picture + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10))
    assert np.isfinite(psnr(picture, picture))


def without_weights(model: Pipeline) -> Pipeline:
    """Super-resolution that adds nothing to the enlarged input."""
    nothing = [dataclasses.replace(m, params=jax.tree.map(np.zeros_like, m.params)) for m in model.decoders]
    return dataclasses.replace(model, decoders=tuple(nothing))


def test_enlarging_alone_scores_like_bicubic(standin):
    """Our input is aligned with the true image, and our filter is Pillow's: a stage that adds nothing is bicubic."""
    model = without_weights(load(standin))
    # Augmentation is switched off by the score itself; dynamic thresholding would take bicubic's overshoot as a scale.
    noisy = [dataclasses.replace(m.sampling, aug_level=0.3, thresholding=StaticThreshold()) for m in trained(model)]
    model = with_boxes(model, [dataclasses.replace(m, sampling=s) for m, s in zip(trained(model), noisy)])
    for resolution in (256, 1024):
        scores = psnr_scores(model, resolution, 2)
        ours, bicubic = scores[f"psnr_{resolution}"], scores[f"psnr_{resolution}_bicubic"]
        assert ours == pytest.approx(bicubic, abs=0.05)
        assert 20 < bicubic < 45
    assert SR_256.residual


def test_the_small_pictures_are_pillows():
    large, (text, small) = true_image(256, 0), small_image(256, 64, 0)
    assert large.shape == (256, 256, 3) and isinstance(text, str)
    np.testing.assert_array_equal(small, resize(large, 64))


def test_the_command(standin, tmp_path, command):
    file = tmp_path / "scores" / "all.json"
    options = "--n", 4, "--json", file, "--weights", standin
    done = command(evaluate, "attributes", *options, "--up-to", 256)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    for resolution in (64, 256):
        assert 0 <= scores[f"attribute_accuracy_{resolution}"] <= 1
        assert {"kind", "colour", "count"} <= scores[f"attributes_{resolution}"].keys()
        assert "relation" not in scores[f"attributes_{resolution}"]
        assert 0 <= scores[f"attribute_accuracy_{resolution}_two_objects"] <= 1
        assert {"kind", "colour", "count", "relation"} <= scores[f"attributes_{resolution}_two_objects"].keys()
        assert f"attribute_accuracy_{resolution}_two_objects" in done.out
    assert scores["seconds_per_image"] == pytest.approx(sum(scores["seconds_per_image_of_stage"].values()))
    assert scores["made_by"]["stages"][0]["steps"] == 2 and scores["made_by"]["objects"] == "both"

    done = command(evaluate, "attributes", *options, "--up-to", 64, "--seed", 1)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    assert not [name for name in scores if "attribute" in name and not name.removesuffix("_two_objects").endswith("64")]
    assert scores["made_by"]["seed"] == 1


def test_psnr_from_the_command_line(standin, tmp_path, command):
    file = tmp_path / "psnr.json"
    options = "--psnr-256", 2, "--psnr-1024", 1, "--json", file, "--weights", standin
    done = command(evaluate, "psnr", *options)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    for name in ("psnr_256", "psnr_256_bicubic", "psnr_1024", "psnr_1024_bicubic"):
        assert 0 < scores[name] < 60
        assert name in done.out
    done = command(evaluate, "psnr", *options, "--up-to", 64)
    assert done.code == 2 and "nothing to score: the stages sample 64 pixels" in done.err


@pytest.fixture
def drawn_as_told(monkeypatch):
    """Cascades that draw every caption of one object exactly, and of each caption of two the first object alone."""
    told = {}
    for scene, c in held_out_examples(40) + held_out_examples(40, objects=2):
        first = dataclasses.replace(scene, objects=scene.objects[:1])
        told[c.text] = to_float(draw(first, 64))

    def batches(model, prompts, options, progress):
        for first in range(0, len(prompts), 8):
            part = [told[text] for text in prompts[first : first + 8]]
            progress(0, first + len(part), len(prompts))
            yield Batch(first, (np.stack(part),))

    monkeypatch.setattr(Pipeline, "batches", batches)


@pytest.mark.parametrize("objects, kinds", [("1", [""]), ("2", ["_two_objects"]), ("both", ["", "_two_objects"])])
def test_one_object_and_two_are_scored_apart(objects, kinds, drawn_as_told, standin, tmp_path, command):
    """No score is an average of both, in batches of several sizes."""
    file = tmp_path / "scores.json"
    options = "--up-to", 64, "--json", file, "--weights", standin
    done = command(evaluate, "attributes", *options, "--n", 35, "--objects", objects)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    assert [name for name in scores if "accuracy" in name] == [f"attribute_accuracy_64{kind}" for kind in kinds]
    if "" in kinds:
        assert scores["attribute_accuracy_64"] == 1 and scores["wrong_64"] == {}
    if "_two_objects" in kinds:
        assert scores["attribute_accuracy_64_two_objects"] == 0 and len(scores["wrong_64_two_objects"]) == 35
        attributes = scores["attributes_64_two_objects"]
        assert (
            attributes["count"] == attributes["relation"] == attributes["kind"] == 0 and attributes["background"] == 1
        )


def test_the_noise_of_a_kind_does_not_depend_on_the_other(standin):
    """Two objects drawn alone are the ones that are drawn beside one object."""
    model = up_to(load(standin), 64)
    captions = {objects: held_out_captions(3, objects) for objects in (1, 2)}
    both = attribute_scores(model, captions, 5, 16)
    alone = attribute_scores(model, {2: captions[2]}, 5, 16)
    assert {name: value for name, value in both.items() if name.endswith("_two_objects")} == {
        name: value for name, value in alone.items() if "seconds" not in name
    }


def test_the_best_candidates_are_scored(standin):
    """Of two samples for each caption, those with the higher score: here the second ones."""
    model = up_to(load(standin), 64)
    captions = held_out_captions(3, 1)
    seen: list[str] = []

    def second(texts, images):
        seen.extend(texts)
        assert images.shape == (len(texts), 64, 64, 3)
        return np.arange(len(texts)) % 2

    scores = attribute_scores(model, {1: captions}, 5, 4, Ranking(2, second))
    assert sorted(seen) == sorted(2 * [caption.text for caption in captions])
    assert scores["attribute_accuracy_64"] == 1 - len(scores["wrong_64"]) / 3


def test_a_kind_that_is_none(standin, command):
    done = command(evaluate, "attributes", "--weights", standin, "--objects", 3)
    assert done.code == 2 and "objects" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_what_is_shipped(tmp_path, command):
    """The cascade in the package: its base draws the colours asked for, its super-resolution beats bicubic by 2 dB."""
    scores = tmp_path / "scores.json"
    done = command(evaluate, "attributes", "--n", 6, "--objects", 1, "--up-to", 64, "--json", scores)
    assert done.code == 0, done.err
    found = json.loads(scores.read_text())
    assert found["attributes_64"]["colour"] >= 5 / 6 and found["attributes_64"]["background"] >= 5 / 6
    assert command(evaluate, "psnr", "--psnr-256", 2, "--psnr-1024", 0, "--json", scores).code == 0
    found = json.loads(scores.read_text())
    assert found["psnr_256"] > found["psnr_256_bicubic"] + 2.0


def coloured(colour: tuple[int, int, int], side: int = 64) -> np.ndarray:
    """A square of a colour on white, in [-1, 1]."""
    image = np.full((side, side, 3), 255, np.uint8)
    image[side // 4 : -side // 4, side // 4 : -side // 4] = colour
    return to_float(image)


def test_dominant_colours_are_compared_at_each_resolution():
    red, blue = coloured((220, 45, 40)), coloured((35, 110, 205))
    large = [coloured((220, 45, 40), 256), coloured((220, 45, 40), 256)]
    scores = colour_scores(["a cherry", "the sea"], [red, blue], {64: [red, blue], 256: large})
    assert scores["dominant_colour_accuracy_64"] == 1 and scores["wrong_64"] == []
    assert scores["dominant_colour_accuracy_256"] == 0.5
    assert scores["wrong_256"] == [{"caption": "the sea", "expected": "blue", "sampled": "red"}]


def test_colours_of_a_folder(standin, command, tmp_path):
    for index, colour in enumerate([(220, 45, 40), (35, 110, 205), (75, 165, 75)]):
        image = Image.fromarray(to_uint8(coloured(colour, 80)))
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"square {index}")
    files = "--json", tmp_path / "out" / "scores.json", "--grid", tmp_path / "out" / "grid.png"
    data = "--data", f"folder:{tmp_path}", "--n", 2, "--up-to", 64
    done = command(evaluate, "colours", *data, "--weights", standin, *files)
    assert done.code == 0, done.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    true = {each["caption"]: each["expected"] for each in scores["wrong_64"]}
    assert true.items() <= {"square 0": "red", "square 1": "blue"}.items()
    assert scores["dominant_colour_accuracy_64"] == 1 - len(true) / 2
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 16 * 96 and grid.height > 2 * 96
    done = command(evaluate, "colours", *data, "--weights", standin, "--n", 0)
    assert done.code == 2 and "--n 0, --limit 0" in done.err

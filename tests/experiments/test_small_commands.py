"""Training of the classifier, and the recipes rainbow and glosses, on little data."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_autoencoder import random_params
from small_cascade import BASE

from experiments import train
from experiments.recipes import glosses, rainbow
from experiments.recipes.rainbow import scores_of
from experiments.table import TASKS
from experiments.tasks import classifier as task
from experiments.tasks.tokenizers import lines_of
from jaxdiff.data import shapes_draw
from jaxdiff.data.images import to_float
from jaxdiff.data.rainbow import EVERY, draw, split
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.rainbow import read
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.classifier import of_size_one
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.classifier import Classifier, ClassifierConfig
from jaxdiff.training import metrics
from jaxdiff.weights import classifier

SYNSETS = """\
  1 This is the licence.
  2 It is left out.
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived; "it is an entity"  
00001930 03 n 01 physical_entity 0 001 @ 00001740 n 0000 | an entity that has physical existence  
"""


def test_labels_are_those_of_the_scene():
    for index in range(40):
        true = scene("train", index)
        said = dict(zip(task.ATTRIBUTES, task.labels(true)))
        assert task.OF_ALL["objects"][said["objects"]] == str(len(true.objects))
        assert task.OF_ALL["background"][said["background"]] == true.background
        if len(true.objects) == 2:
            assert {said[name] for name in task.OF_ONE} == {-1}
        else:
            for name, classes in task.OF_ONE.items():
                assert classes[said[name]] == getattr(true.objects[0], name)


def test_a_classifier_is_trained_and_read_back(command, monkeypatch, tmp_path):
    presets = TASKS["classifier"].presets
    monkeypatch.setitem(presets, "tiny", dataclasses.replace(presets["tiny"], channels=(4, 8)))
    done = command(
        train, "classifier", "--out", tmp_path / "run", "--data-dir", tmp_path / "data", "--examples", 64,
        "--held-out", 4, "--steps", 3, "--batch", 16, "--features", 6, "--side", 32,
    )  # fmt: skip
    assert done.code == 0, done.err
    name, config, params = classifier.load(tmp_path / "run" / "model")
    assert name == "shapes" and config.features == 6 and config.names == tuple(task.ATTRIBUTES)
    assert params["features"]["kernel"].shape[1] == 6
    shown = np.stack([to_float(shapes_draw.draw(scene("train", i), 32)) for i in range(64)])
    features, _ = jax.jit(Classifier(config).apply)({"params": params}, jnp.asarray(shown))
    assert float((features**2).mean()) == pytest.approx(1, rel=1e-3)
    assert "kind" in metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    (tmp_path / "run" / "model" / "classifier.json").write_text("{}")
    with pytest.raises(ValueError, match="not the settings of a classifier"):
        classifier.load(tmp_path / "run" / "model")
    with pytest.raises(FileNotFoundError, match="no classifier here"):
        classifier.load(tmp_path)


def test_features_of_another_size_say_the_same():
    config = ClassifierConfig(side=16, channels=(4,), features=6, names=("kind", "colour"), classes=(3, 4))
    params = jax.jit(Classifier(config).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    shown = jax.random.normal(jax.random.key(1), (5, 16, 16, 3))
    apply = jax.jit(Classifier(config).apply)
    features, logits = apply({"params": params}, shown)
    scaled, same = apply({"params": of_size_one(config, params, shown)}, shown)
    size = float(jnp.sqrt((features**2).mean()))
    np.testing.assert_allclose(scaled * size, features, rtol=1e-4, atol=1e-6)
    for name, values in logits.items():
        np.testing.assert_allclose(same[name], values, rtol=1e-4, atol=1e-5)


def test_scores_of_the_rainbow():
    asked = [EVERY[place] for place in split("test")[:40]]
    pictures = np.stack([draw(attributes) for attributes in asked])
    assert scores_of(asked, read(pictures))["right"] == 1
    shown = pictures.copy()
    shown[0] = 255
    other = next(
        a
        for a in EVERY
        if a.colour != asked[1].colour and a.caption.replace(a.colour, asked[1].colour) == asked[1].caption
    )
    shown[1] = draw(other)
    scores = scores_of(asked, read(shown))
    assert scores["right"] == 38 / 40 and scores["attributes"]["colour"] == 38 / 40
    assert scores["attributes"]["shape"] == 39 / 40
    assert scores["wrong"] == {"no image of the dataset": 1, "colour": 1}


@pytest.mark.slow
def test_the_rainbow_from_end_to_end(command, small_presets, monkeypatch, tmp_path):
    presets = TASKS["imagen.base32"].presets
    stage = dataclasses.replace(BASE, side=32)
    monkeypatch.setitem(presets, "tiny", dataclasses.replace(presets["tiny"], model=stage))
    arguments = (
        "--out", tmp_path / "run", "--data-dir", tmp_path / "data", "--text-steps", 2, "--steps", 2, "--batch", 8,
        "--n", 8,
    )  # fmt: skip
    done = command(rainbow.main, *arguments)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        report["count"] == 8 and 0 <= report["right"] <= 1 and report["made_by"]["images_seen"]["imagen.base32"] == 16
    )
    assert (tmp_path / "run" / "grid.png").is_file() and "held-out captions" in done.out
    assert command(rainbow.main, "--n", -1).code == 2


@pytest.mark.slow
@pytest.mark.parametrize("system", ["sd", "dalle", "unclip"])
def test_the_rainbow_of_other_systems(system, command, tmp_path):
    few = "--text-steps", 2, "--decoder-steps", 2, "--steps", 2, "--batch", 8, "--n", 8
    done = command(rainbow.main, "--system", system, *few, "--out", tmp_path / "run", "--data-dir", tmp_path / "data")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["count"] == 8 and report["made_by"]["system"] == system and "held-out captions" in done.out
    assert ("equal_codes" in report["made_by"]) is (system == "dalle")


def test_equal_codes():
    """Of what was asked for; one sample with another code is wrong."""
    asked = [EVERY[place] for place in split("test")[:70]]
    config = AutoencoderConfig(
        (4, 4), 1, norm_groups=0, local_encoder=True, middle_attention=False, bottleneck=VQBottleneck(9, 3)
    )
    codes = VQCodes(TrainedAutoencoder(config, random_params(config), side=32))
    sampled = np.asarray(codes.encode(jnp.asarray(np.stack([to_float(draw(each)) for each in asked])))).copy()
    assert rainbow.equal_codes(codes, sampled, asked) == 1
    sampled[3, 0, 0] += 1
    assert rainbow.equal_codes(codes, sampled, asked) == pytest.approx(69 / 70)
    assert rainbow.equal_codes(None, sampled, asked) is None


def test_definitions_without_licence_and_examples(command, tmp_path):
    source = tmp_path / "wordnet"
    source.mkdir()
    for part in glosses.PARTS:
        (source / part).write_text(SYNSETS, encoding="latin-1")
    done = command(glosses.main, "--data-dir", tmp_path, "--source", source)
    assert done.code == 0 and "8 definitions" in done.out
    lines = (tmp_path / "glosses.txt").read_text().splitlines()
    assert lines[:2] == ["that which is perceived", "an entity that has physical existence"]
    (source / "data.adv").write_text("no line of theirs\n")
    done = command(glosses.main, "--data-dir", tmp_path, "--source", source)
    assert done.code == 2 and "data.adv:1" in done.err
    done = command(glosses.main, "--data-dir", tmp_path, "--source", tmp_path)
    assert done.code == 2 and "not WordNet's files" in done.err


def test_a_package_that_cannot_be_fetched(command, monkeypatch, tmp_path):
    monkeypatch.setattr(glosses, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(glosses.shutil, "which", lambda name: None)
    done = command(glosses.main, "--data-dir", tmp_path)
    assert done.code == 2 and "apt-get is not installed" in done.err and "--source" in done.err


def test_texts_are_spread_over_their_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"line {i}\n\n" for i in range(100)))
    assert lines_of(file, 4) == ["line 0", "line 25", "line 50", "line 75"]
    assert len(lines_of(file, 1000)) == 100
    file.write_text(" \n")
    with pytest.raises(ValueError, match="no lines of text"):
        lines_of(file, 4)

"""The long form of CLIP's training: `pytest -m slow tests/experiments/test_clip_training_long.py` (half an hour)."""

import json

import pytest

from experiments import evaluate, train


@pytest.mark.slow
def test_a_tiny_clip_finds_held_out_pictures(command, tmp_path):
    """Seen: R@1 0.70 by caption and 0.81 by image, of a hundred whose captions all differ in what they say."""
    recipe = ("--optimizer", "muon", "--learning-rate", 4e-3, "--weight-decay", 0.05, "--warmup", 50, "--steps", 1400)
    done = command(train, "clip", "--out", tmp_path / "clip", "--data-dir", tmp_path / "data", *recipe)
    assert done.code == 0, done.err
    scores = tmp_path / "scores.json"
    done = command(evaluate, "retrieval", "--clip", tmp_path / "clip" / "model", "--n", 100, "--json", scores)
    assert done.code == 0, done.err
    found = json.loads(scores.read_text())
    assert found["images by caption, R@1"] >= 0.6 and found["captions by image, R@1"] >= 0.7

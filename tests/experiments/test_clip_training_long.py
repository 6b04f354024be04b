"""The long form of CLIP's training: `pytest -m slow tests/experiments/test_clip_training_long.py` (half an hour)."""

import json

import pytest

from experiments.clip import evaluate, train


@pytest.mark.slow
def test_a_tiny_clip_finds_held_out_pictures(command, tmp_path):
    """R@1 of at least 0.95 both ways among a hundred held-out pictures that differ in what their captions say."""
    done = command(train.main, "--out", tmp_path / "clip", "--data-dir", tmp_path / "data")
    assert done.code == 0, done.err
    scores = tmp_path / "scores.json"
    done = command(evaluate.main, "--weights", tmp_path / "clip" / "model", "--n", 100, "--json", scores)
    assert done.code == 0, done.err
    found = json.loads(scores.read_text())
    assert found["pictures by caption, R@1"] >= 0.95 and found["captions by picture, R@1"] >= 0.95

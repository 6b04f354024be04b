"""`experiments.imagen.train` on two real processes: the losses, pictures and parameters of one, written once."""

import sys
from pathlib import Path

import jax
import joined_train
import numpy as np
import pytest

from jaxdiff.training.metrics import read
from jaxdiff.weights.imagen import load_model

sys.path.append(str(Path(__file__).parents[1] / "training"))

from processes import Processes


def started(standin, out, count, *arguments):
    """Every run with data and embeddings of its own, which it has to prepare; parameters over both processes."""
    data = "--examples", 16, "--held-out", 2, "--data-dir", f"{out}-data", "--text", standin / "text"
    short = "--batch", 8, "--ema-decay", 0.9, "--log-every", 1, "--steps", 3, "--sample-every", 3, "--save-every", 2
    command = [sys.executable, joined_train.__file__, "--stage", "base64", "--out", out, *data, *short, *arguments]
    return Processes([*command, "--mesh", f"fsdp={count}"], count, flags=count > 1)


def ended(processes):
    codes = processes.wait(400)
    assert set(codes) == {0}, processes.words()


def test_two_processes_train_as_one_does(standin, tmp_path):
    with started(standin, tmp_path / "one", 1) as one, started(standin, tmp_path / "two", 2) as two:
        ended(one)
        ended(two)
        said = [[line for line in two.out(i).splitlines() if line and "Gloo" not in line] for i in range(2)]
        out = tmp_path / "two"
        assert said[0] == [f"samples: {out}/samples/0000003.png", f"{out}/model: the averaged parameters of step 3"]
        assert said[1] == []
        assert not [line for line in two.err(1).splitlines() if not line.startswith("WARNING:absl")]  # Orbax's
        assert "embed captions" in two.err(0)
    for name in ("loss", "grad_norm"):
        found, wanted = ([line[name] for line in read(tmp_path / run / "metrics.jsonl")] for run in ("two", "one"))
        assert len(found) == 3 and found == pytest.approx(wanted, rel=1e-4)
    found, wanted = (load_model(tmp_path / run / "model") for run in ("two", "one"))
    assert found.stage == wanted.stage and found.text == wanted.text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found.params, wanted.params)
    assert not list((tmp_path / "two-data").glob(".process-*"))

    # Another run of two begins with what they have learned.
    with started(standin, tmp_path / "next", 2, "--init", tmp_path / "two", "--steps", 1, "--sample-every", 0) as more:
        ended(more)
    first = read(tmp_path / "next" / "metrics.jsonl")[0]["loss"]
    assert first != read(tmp_path / "two" / "metrics.jsonl")[0]["loss"]

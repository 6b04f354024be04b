"""`experiments.train imagen.base64` on two real processes: the losses, images and parameters of one, written once.

A long form: in the ordinary run tests/training/test_several_processes.py has processes that train a toy.
"""

import sys
from pathlib import Path

import jax
import joined_train
import numpy as np
import pytest

from experiments import train
from jaxdiff.training.metrics import read
from jaxdiff.weights.stages import load_model

sys.path.append(str(Path(__file__).parents[1] / "training"))

from processes import Processes


def arguments(standin, out, *more, data_dir=None):
    """Every run with data and embeddings of its own, which it has to prepare, unless it is given some."""
    data_dir = data_dir or f"{out}-data"
    data = "--examples", 16, "--held-out", 2, "--data-dir", data_dir, "--text", standin / "text"
    short = "--batch", 8, "--ema-decay", 0.9, "--log-every", 1, "--steps", 3, "--sample-every", 3, "--save-every", 2
    return "imagen.base64", "--out", out, *data, *short, *more


def two_processes(standin, out, *more, data_dir=None):
    """With the parameters split over both."""
    given = arguments(standin, out, *more, data_dir=data_dir)
    command = [sys.executable, joined_train.__file__, *given, "--mesh", "fsdp=2"]
    return Processes(command, 2, flags=True)


def ended(processes):
    codes = processes.wait(400)
    assert set(codes) == {0}, processes.words()


@pytest.mark.slow
def test_two_processes_train_as_one_does(standin, tmp_path, command, small_presets):
    assert command(train, *arguments(standin, tmp_path / "one"), "--mesh", "fsdp=8").code == 0
    with two_processes(standin, tmp_path / "two") as two:
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
    assert found.model == wanted.model and found.text_fingerprint == wanted.text_fingerprint
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found.params, wanted.params)
    assert not list((tmp_path / "two-data").glob(".process-*"))

    # Another run of two begins with what they have learned.
    more = "--init", tmp_path / "two", "--steps", 1, "--sample-every", 0
    with two_processes(standin, tmp_path / "next", *more, data_dir=tmp_path / "two-data") as following:
        ended(following)
    first = read(tmp_path / "next" / "metrics.jsonl")[0]["loss"]
    assert first != read(tmp_path / "two" / "metrics.jsonl")[0]["loss"]

"""DALL·E 1 by commands."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import train
from experiments.table import TASKS
from jaxdiff.models.dvae import Annealed, DVAEModel
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.training import metrics
from jaxdiff.weights import dvae

DVAE = DVAEModel(
    DVAEConfig(codes=10, hidden=8, multipliers=(1, 2), blocks=1, code_width=4),
    side=32,
    temperature=Annealed(1.0, 0.1, 100),
    kl_weight=Annealed(0.0, 1.0, 100),
)


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    """A very small one in place of the tiny one."""
    task = TASKS["dalle.dvae"]
    monkeypatch.setitem(task.presets, "tiny", dataclasses.replace(task.preset("tiny"), model=DVAE))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = "--data", "shapes", "--examples", 12, "--held-out", 4, "--evaluate-n", 4
    return *data, "--data-dir", tmp_path_factory.mktemp("data"), "--batch", 4, "--log-every", 1


def test_a_dvae_is_trained(data, command, tmp_path):
    """It logs its scores, writes reconstructions and a dVAE, and another run continues from it."""
    flags = "--kl-steps", 2, "--kl-weight", 0.5, "--temperature", 0.5, "--temperature-steps", 1
    done = command(train, "dalle.dvae", *data, "--steps", 2, *flags, "--out", tmp_path / "first")
    assert done.code == 0, done.err
    lines = metrics.read(tmp_path / "first" / "metrics.jsonl")
    assert {"loss", "psnr", "kl", "codes_used", "held_out_loss", "held_out_psnr"} <= lines[-1].keys()
    assert lines[-1]["temperature"] == 0.5 and lines[0]["temperature"] == 1.0
    assert (tmp_path / "first" / "samples" / "0000002.png").is_file()
    first = dvae.load(tmp_path / "first" / "model")
    assert first.config == DVAE.network and "10 codes" in done.out
    again = "--init", tmp_path / "first", "--learning-rate", 1e-9, "--steps", 1, "--out", tmp_path / "second"
    done = command(train, "dalle.dvae", *data, *again)
    assert done.code == 0, done.err
    second = dvae.load(tmp_path / "second" / "model")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.params, second.params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kl-steps", 0), "--kl-steps 0: at least 1"),
        (("--temperature", 0.0), "a temperature must be above 0"),
        (("--side", 33), "not a multiple of the stride 2"),
        (("--init", "nowhere"), "no dVAE here"),
    ],
)
def test_refused(arguments, message, data, command, tmp_path):
    done = command(train, "dalle.dvae", *data, "--steps", 1, *arguments, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "checkpoints").exists()

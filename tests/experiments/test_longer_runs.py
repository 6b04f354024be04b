"""What a run says of itself on the way, and how it becomes longer, from the command line."""

import json

import pytest

from experiments import train
from jaxdiff.training.metrics import read

pytestmark = pytest.mark.usefixtures("small_presets")


@pytest.fixture
def base(standin, tmp_path, command):
    """`base(steps, *more)`: a run of the small base on sixteen images of `shapes`."""

    def call(steps, *more, out=tmp_path / "run"):
        arguments = "--steps", steps, "--batch", 8, "--sample-every", 0, "--ema-decay", 0.995, "--log-every", 1
        data = "--examples", 16, "--held-out", 8, "--evaluate-n", 8, "--data-dir", tmp_path / "data"
        text = "--text", standin / "text"
        return command(train, "imagen.base64", *arguments, *data, *text, "--out", out, *more)

    return call


def test_the_held_out_loss_stands_beside_the_training_loss(base, tmp_path):
    done = base(4, "--evaluate-every", 2, "--schedule", "constant")
    assert done.code == 0, done.err
    lines = {line["step"]: line for line in read(tmp_path / "run" / "metrics.jsonl")}
    assert "held_out_loss" in lines[2] and "held_out_loss" in lines[4] and "held_out_loss" not in lines[1]
    levels = [name for name in lines[4] if name.startswith("held_out_loss_t")]
    assert len(levels) == 8
    mean = sum(lines[4][name] for name in levels) / 8
    assert lines[4]["held_out_loss"] == pytest.approx(mean, rel=1e-5)
    # A constant rate lets more steps be asked for.
    done = base(5, "--evaluate-every", 2, "--schedule", "constant")
    assert done.code == 0 and "step 5" in done.out, done.err


def test_a_finished_run_names_the_command_that_goes_on(base, tmp_path):
    assert base(2, "--evaluate-every", 0).code == 0
    done = base(3, "--evaluate-every", 0)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: "), done.err
    out = tmp_path / "run"
    command = f"python -m experiments.train imagen.base64 --config {out}/settings.json --init {out} --steps 3"
    assert "learning rate has fallen to 0" in done.err and command in done.err
    kept = json.loads((out / "settings.json").read_text())
    assert kept["settings"]["steps"] == 2


def test_what_differs_is_named_by_its_flag(base):
    assert base(2, "--evaluate-every", 0).code == 0
    done = base(2, "--evaluate-every", 0, "--learning-rate", 0.5, "--save-every", 7)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and "saved with other settings" in last
    assert "--learning-rate 0.001 → 0.5" in last and "--save-every" not in last

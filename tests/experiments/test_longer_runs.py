"""What a run says of itself on the way, and how it becomes longer, from the command line."""

import dataclasses
import json

import pytest
import small_others

from experiments import train
from experiments.options.training import DataOptions, RunOptions, TrainSettings
from experiments.table import TASKS
from experiments.tasks import diffusion, held_out
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.data import sources
from jaxdiff.data.embeddings import store_embeddings
from jaxdiff.data.example import captions
from jaxdiff.nets.t5 import MICRO
from jaxdiff.training.metrics import read
from jaxdiff.weights.t5 import load_text_encoder

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


@pytest.mark.parametrize(
    "name", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "classifier"))]
)
def test_so_does_that_of_other_models(name, monkeypatch, command, tmp_path):
    small_others.shrink(monkeypatch, 32)
    monkeypatch.setitem(TASKS["t5"].presets, "tiny", MICRO)
    data = "--examples", 64, "--held-out", 24, "--evaluate-n", 24, "--data-dir", tmp_path / "data"
    arguments = "--steps", 2, "--batch", 16, "--log-every", 1, "--evaluate-every", 1, "--out", tmp_path / "run"
    vocab = () if name == "classifier" else ("--vocab", 400)
    done = command(train, name, *arguments, *data, *vocab)
    assert done.code == 0, done.err
    lines = read(tmp_path / "run" / "metrics.jsonl")
    losses = [line["held_out_loss"] for line in lines]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 20 for loss in losses)
    accuracies = [name for name in lines[0] if name.startswith("held_out_") and name != "held_out_loss"]
    assert accuracies, lines[0]


def test_a_loss_of_the_batch_is_measured_on_full_batches_alone(capsys):
    source = range(20)

    def count(batch, evaluate_n):
        settings = TrainSettings(run=RunOptions(batch=batch), dataset=DataOptions(evaluate_n=evaluate_n))
        some = held_out.in_full_batches(settings, source)
        return some and len(some)

    assert [count(16, 64), count(8, 64), count(8, 15), count(4, 1)] == [16, 16, 8, 4]
    assert not capsys.readouterr().out
    assert count(32, 64) is None
    assert capsys.readouterr().out == "no held-out loss: 20 held-out examples are fewer than --batch 32\n"


def test_embeddings_need_their_encoder_for_a_held_out_loss(base, standin, tmp_path, capsys):
    data = DataOptions(examples=16, held_out=8, evaluate_n=8, data_dir=tmp_path / "data")
    source, encoder = sources.open(data.spec(), 64, "train", data.data_dir), load_text_encoder(standin / "text", 24)
    stored = store_embeddings(captions(source), encoder.encode, tmp_path / "stored", encoder=encoder.fingerprint)
    done = base(1, "--evaluate-every", 1, "--embeddings", stored.path)
    assert done.code == 0 and "held_out_loss" in read(tmp_path / "run" / "metrics.jsonl")[-1], done.err
    task = TASKS["imagen.base64"]
    settings = dataclasses.replace(task.settings, dataset=data, text_encoder=TextOptions(embeddings=stored.path))
    assert diffusion.held_out_batches(settings, diffusion.Pixels(task.preset("tiny").model), None, text=True) is None
    assert "no held-out loss: give --text too, as --embeddings" in capsys.readouterr().out


def test_a_finished_run_names_the_command_that_goes_on(base, tmp_path):
    assert base(2, "--evaluate-every", 0).code == 0
    done = base(30, "--evaluate-every", 0)  # with another warmup, a tenth of the steps
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: "), done.err
    out = tmp_path / "run"
    command = f"python -m experiments.train imagen.base64 --config {out}/settings.json --init {out} --steps 30"
    assert "learning rate has fallen to 0" in done.err and command in done.err
    kept = json.loads((out / "settings.json").read_text())
    assert kept["settings"]["steps"] == 2


def test_what_differs_is_named_by_its_flag(base):
    assert base(2, "--evaluate-every", 0).code == 0
    done = base(2, "--evaluate-every", 0, "--learning-rate", 0.5, "--save-every", 7)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and "saved with other settings" in last
    assert "--learning-rate left out → 0.5" in last and "--save-every" not in last

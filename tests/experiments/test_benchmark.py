"""The table of sizes and speeds."""

import json

import jax
import pytest
from small import random_params
from small_cascade import SR_256
from small_others import shrink

from experiments import benchmark


@pytest.mark.usefixtures("small_presets")
def test_rows(tmp_path, command):
    file = tmp_path / "rows.json"
    options = "--batch", 8, "--steps", 2, "--json", file
    done = command(benchmark, "imagen.sr256", *options)
    assert done.code == 0, done.err
    (row,) = json.loads(file.read_text())["rows"]
    assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(random_params(SR_256)))
    assert (row["side"], row["unit"]) == (64, "images")
    for name in ("compile_seconds", "memory", "step_seconds", "examples_per_second", "sampling_seconds"):
        assert row[name] > 0
    assert row["examples_per_second"] == pytest.approx(8 / row["step_seconds"])
    # A training step has a forward and two of its size backward, on a sixteenth of the pixels. To sample, the input is
    # enlarged once, which weighs a third of so small a network.
    assert 1.5 < row["flops_per_example"] / (row["sampling_flops_per_example"] / 16) < 3
    assert row["fraction_of_peak"] is None
    assert "| imagen.sr256 tiny |" in done.out and "not known" in done.out
    assert f"| {row['parameters'] / 1e6:,.1f} M |" in done.out


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
    ],
)
def test_fraction_of_peak(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)] * 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert benchmark.fraction_of_peak(peak * 1e12, 1.0) == pytest.approx(0.5)
    assert benchmark.fraction_of_peak(1e12, None) is None


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize(
    ("model", "unit", "side"), [("t5", "captions", 0), ("clip", "pairs", 16), ("classifier", "images", 16)]
)
def test_every_model_can_be_measured(model, unit, side, tmp_path, command, monkeypatch):
    shrink(monkeypatch)
    file = tmp_path / "rows.json"
    done = command(benchmark, model, "--batch", 8, "--steps", 0, "--sample-batch", 8, "--json", file)
    assert done.code == 0, done.err
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["model"], row["unit"], row["side"], row["step_seconds"]) == (model, unit, side, None)
    # What the trained model does is at most the forward pass of its training: of a T5 the encoder alone.
    assert 0 < row["sampling_flops_per_example"] <= 1.001 * row["flops_per_example"] / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagen.base64", "--batch", 0), "--batch must be at least 1"),
        (("imagen.base64", "--steps", -1), "--steps at least 0"),
        (("imagen.sr256", "--preset", "2b"), "--preset 2b: choose from tiny, small, medium, paper"),
        (("imagen.base64", "--crop", 32), "--crop 32: for super-resolution"),
        (("t5", "--crop", 32), "--crop: this model is not trained on crops"),
        (("imagen.base64", "--preset", "2b", "--scan"), "--scan: this network has no equal blocks in a row"),
        (("imagen.base128",), "unknown 'imagen.base128'"),
    ],
)
def test_bad_settings(arguments, message, command):
    done = command(benchmark, *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err

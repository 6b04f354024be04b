"""The table of sizes and speeds."""

import json

import jax
import pytest
from small import random_params
from small_cascade import SR_256

from experiments import benchmark


@pytest.mark.usefixtures("small_presets")
def test_rows(tmp_path, command):
    file = tmp_path / "rows.json"
    options = "--batch", 8, "--steps", 2, "--json", file
    done = command(benchmark.main, "--stage", "sr256", *options)
    assert done.code == 0, done.err
    (row,) = json.loads(file.read_text())["rows"]
    assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(random_params(SR_256)))
    assert (row["side"], row["sampling_side"]) == (64, 256)
    for name in ("compile_seconds", "memory", "step_seconds", "images_per_second", "sampling_seconds"):
        assert row[name] > 0
    assert row["images_per_second"] == pytest.approx(8 / row["step_seconds"])
    # A training step has a forward and about two of its size backward, on a sixteenth of the pixels.
    assert 2 < row["flops_per_image"] / (row["sampling_flops_per_image"] / 16) < 5
    assert row["share_of_peak"] is None
    assert "| sr256 tiny |" in done.out and "not known" in done.out
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
def test_share_of_peak(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)] * 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert benchmark.share_of_peak(peak * 1e12, 1.0) == pytest.approx(0.5)
    assert benchmark.share_of_peak(1e12, None) is None


def test_bad_sizes(command):
    assert command(benchmark.main, "--batch", 0).code == 2
    assert command(benchmark.main, "--stage", "sr256", "--preset", "2b").code == 2

"""The report of an accelerator, rehearsed end to end on the CPU at tiny sizes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.recipes import gpu_benchmark, gpu_networks, gpu_report, gpu_section
from experiments.recipes.gpu_section import Context
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.weights.stages import load_model


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


CHEAP = ("networks", "training")
"""Sections that are rehearsed in the ordinary run."""


def rehearsed(command, out, standin, *sections):
    """Every one of these sections measures something, and nothing fails."""
    done = command(
        gpu_report.main, "--out", out, "--tiny", "--minutes", 1, "--weights", standin, "--sections", *sections
    )
    report = (out / "report.md").read_text()
    assert done.code == 0, done.err + report
    for name in sections:
        assert f"## {name}" in report
        assert not [row for row in rows(out, name) if "error" in row or "not_measured" in row], report


@pytest.mark.slow
def test_rehearsal(tmp_path, command, standin):
    """The trained base can be read as a stage, and its examples are gone again."""
    rehearsed(command, tmp_path, standin, *CHEAP)
    limits = [row for row in rows(tmp_path, "networks") if "within_limits" in row]
    assert len(limits) == 3 and all(row["within_limits"] for row in limits)
    training = rows(tmp_path, "training")
    assert [row["images_seen"] for row in training if "images_seen" in row] == [20]
    assert {(row["base"], row["objects"]) for row in training if "right" in row} == {
        (name, objects) for name in ("trained", "shipped") for objects in (1, 2)
    }
    model = load_model(tmp_path / "model")
    assert all(np.isfinite(leaf).all() for leaf in model.params["stem"].values())
    assert not (tmp_path / "images.npy").exists()


def test_presets_are_timed(tmp_path, monkeypatch, small_presets):
    gpu_benchmark.main(Context("benchmark", tmp_path, deadline=time.time() + 300, tiny=True))
    first, second = rows(tmp_path, "benchmark")
    assert first["measured_bfloat16_tflops"] > 0 and second["images_per_second"] > 0


@pytest.mark.slow
def test_rehearsal_of_all_sections(tmp_path, command, standin):
    """Two minutes: `pytest -m slow tests/experiments/test_gpu_report.py`, before time on an accelerator is spent."""
    pytest.importorskip("torch", reason="one section measures diffusers")
    rehearsed(command, tmp_path, standin, *gpu_report.SECTIONS)
    (suite,) = rows(tmp_path, "suite")
    assert suite["passed"] > 10 and suite["failed"] == 0
    assert {row["what"] for row in rows(tmp_path, "diffusers") if "what" in row} == {"forward", "gradient"}
    names = {row["network"].split(",")[1].split()[0] for row in rows(tmp_path, "diffusers") if "network" in row}
    assert names == {"jaxdiff", "diffusers"}


def fails(context):
    context.record(before="the failure")
    raise RuntimeError("made to fail")


def hangs(context):
    context.record(before="the deadline")
    time.sleep(1000)


@pytest.mark.slow
def test_a_section_that_fails_costs_only_itself(tmp_path, command, monkeypatch):
    """What it had recorded stays, the report says what happened, and the next section runs."""
    monkeypatch.setattr(gpu_report, "GRACE", 1.0)
    # The one that hangs takes its share of the minutes; the others may take long to begin on a busy machine.
    sections = {run.__name__: gpu_report.Section(run, share) for run, share in ((fails, 4), (hangs, 1), (records, 4))}
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    done = command(gpu_report.main, "--out", tmp_path, "--minutes", 1.5, "--sections", *sections)
    assert done.code == 1
    for name, says in (("fails", "exit code 1: RuntimeError: made to fail"), ("hangs", "stopped")):
        assert list(rows(tmp_path, name)[0]) == ["before"]
        assert says in rows(tmp_path, name)[1]["error"]
    assert rows(tmp_path, "records") == [{"reached": True}]
    assert "made to fail" in (tmp_path / "report.md").read_text()


def records(context):
    context.record(reached=True)


def test_examples_are_those_of_the_set(tmp_path, standin):
    # In a process of its own: it forks, which jax's threads do not survive.
    options = ("--out", str(tmp_path), "--weights", str(standin), "--count", "10", "--two-objects", "0.3")
    command = [sys.executable, "-m", "experiments.recipes.gpu_examples", *options, "--first", "100"]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=300)
    images, mask = np.load(tmp_path / "images.npy"), np.load(tmp_path / "mask.npy")
    for place in range(10):
        drawn = scene("train", 100 + place, 2 if place < 10 and place % 100 < 30 else 1)
        np.testing.assert_array_equal(images[place], draw(drawn, 64))
    assert mask.shape == (10, 16) and mask[:, 0].all()
    assert json.loads((tmp_path / "examples.json").read_text())["examples"] == 10


def test_no_time_and_bad_settings(tmp_path, command):
    bad = command(gpu_report.main, "--out", tmp_path, "--sections", "speed")
    assert bad.code == 2 and "choose from networks, suite" in bad.err
    assert command(gpu_report.main, "--out", tmp_path, "--minutes", 0).code == 2
    assert command(gpu_report.main, "--out", tmp_path, "--minutes", "nan").code == 2


def test_a_failed_measurement_is_recorded(tmp_path):
    """For want of memory, say: the section goes on."""
    context = Context("benchmark", tmp_path, deadline=time.time() + 60, tiny=True)

    def out_of_memory():
        raise MemoryError("RESOURCE_EXHAUSTED: 80 GiB\nand a stack")

    context.attempt("base64 2b", out_of_memory)
    Context("benchmark", tmp_path, deadline=0.0, tiny=False).attempt("base64 500m", out_of_memory)
    assert rows(tmp_path, "benchmark") == [
        {"not_measured": "base64 2b", "why": "MemoryError: RESOURCE_EXHAUSTED: 80 GiB and a stack"},
        {"not_measured": "base64 500m", "why": "no time was left"},
    ]


@pytest.mark.parametrize("broken", (0, 1, 2))
def test_an_output_that_is_no_number_is_no_small_error(broken):
    outputs = [np.ones(3), np.ones(2), np.ones(4)]
    found = [1.001 * each for each in outputs]
    assert gpu_networks._error(found, outputs) == pytest.approx(1e-3)
    found[broken] = np.full_like(found[broken], np.nan)
    assert not gpu_networks._error(found, outputs) < 1.0


def test_a_result_that_was_cut_short(tmp_path, command, monkeypatch):
    """It stands in the report as such; what is recorded after it has a line of its own."""
    monkeypatch.setattr(gpu_report, "SECTIONS", {"first": gpu_report.Section(half, 0.5)})
    assert command(gpu_report.main, "--out", tmp_path, "--minutes", 0.6, "--sections", "first").code == 1
    assert gpu_section.recorded(tmp_path, "first") == [
        {"whole": 1},
        {"error": "a result was cut short"},
        {"whole": 2},
    ]
    assert "a result was cut short" in (tmp_path / "report.md").read_text()


def half(context):
    context.record(whole=1)
    with (context.out / "first.jsonl").open("a") as file:
        file.write('{"whole": ')
    context.record(whole=2)


def test_random_params_leave_no_path_out():
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((64,), np.float32)}, "kernel": jax.ShapeDtypeStruct((9, 64), "f4")}
    params = gpu_section.random_params(shapes)
    assert abs(params["norm"]["scale"].mean() - 1.08) < 0.05
    assert abs(params["kernel"].std() - 1 / 3) < 0.05

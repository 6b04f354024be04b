"""The settings of a run as a file: what is written is what was told, and can be given back."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from experiments import train
from experiments.cli import Command, run
from experiments.options import settings_file
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.table import TASKS
from experiments.tasks import diffusion
from jaxdiff.training.distributed import Cluster

CHANGED = diffusion.Settings(
    Path("runs/a b"),
    "300m",
    run=RunOptions(steps=7, init=Path("runs/x"), ema_decay=0.5),
    dataset=DataOptions(("folder:my photos", "shapes"), (3.0, 1.0), strict=True),
    optimization=OptimizerOptions("muon", 1e-5, warmup=3),
    diffusion=diffusion.DiffusionOptions(logsnr=(-5.5, 0.0), text_dropout=0.2),
    compute=diffusion.UNetCompute("bfloat16", "blocks", scan=True),
)


@pytest.mark.parametrize("settings", [CHANGED, *(task.settings for task in TASKS.values())], ids=lambda s: str(s.out))
def test_what_is_written_is_given_back(settings, tmp_path):
    path = tmp_path / settings_file.NAME
    settings_file.save(path, "some", settings)
    name, line = settings_file.given(["some", "--config", str(path)])
    again = tyro.cli(type(settings), default=settings, args=line, config=(tyro.conf.OmitArgPrefixes,))
    assert name == "some" and again == settings
    fresh = dataclasses.replace(type(settings)(), cluster=settings.cluster)
    assert tyro.cli(type(settings), default=fresh, args=line, config=(tyro.conf.OmitArgPrefixes,)).run == settings.run


def test_what_is_left_out_is_the_default():
    """A setting of None is not written on a command line: None has to be what it is without."""
    for name, task in TASKS.items():
        default = settings_file.flags(task.settings)
        changed = settings_file.flags(type(task.settings)())
        for flag, value in changed.items():
            assert value is not None or default[flag] is None or flag in ("warmup",), (name, flag)


def test_how_processes_find_each_other_is_not_kept():
    flags = settings_file.flags(dataclasses.replace(CHANGED, cluster=Cluster(stall=5.0)))
    assert "stall" not in flags and "process" not in flags and flags["learning-rate"] == 1e-5


@pytest.fixture
def told():
    """A table of one command, and the settings that it was called with."""
    calls = []
    return {"base": Command(calls.append, diffusion.Settings(), "a base"), "other": Command(calls.append, 1, "")}, calls


def called(table, *args):
    with pytest.raises(SystemExit) as stop:
        run(table, [str(arg) for arg in args])
    return stop.value.code


def test_the_command_line_counts_more(told, tmp_path):
    table, calls = told
    settings_file.save(tmp_path / "a.json", "base", CHANGED)
    assert called(table, "--config", tmp_path / "a.json", "--steps", 9, "--no-scan") == 0
    assert calls[0] == dataclasses.replace(
        CHANGED,
        run=dataclasses.replace(CHANGED.run, steps=9),
        compute=dataclasses.replace(CHANGED.compute, scan=False),
    )
    assert called(table, "base", "--seed", 4, "--config", tmp_path / "a.json") == 0
    assert calls[1].run.seed == 4 and calls[1].run.steps == 7


@pytest.mark.parametrize(
    "content, args, said",
    [
        (None, ("--config", "FILE"), "no such file of settings"),
        ("[1]", ("--config", "FILE"), "is not JSON with settings"),
        ('{"version": 1}', ("--config", "FILE"), "not the settings of a run"),
        ('{"version": 9, "command": "base", "settings": {}}', ("--config", "FILE"), "not the settings of a run"),
        ('{"version": 1, "command": "base", "settings": {"steps": {"a": 1}}}', ("--config", "FILE"), "steps is"),
        ('{"version": 1, "command": "base", "settings": {"stepz": 1}}', ("--config", "FILE"), "stepz"),
        ('{"version": 1, "command": "base", "settings": {}}', ("other", "--config", "FILE"), "not of other"),
        ('{"version": 1, "command": "gone", "settings": {}}', ("--config", "FILE"), "unknown 'gone'"),
        ("{}", ("base", "--config"), "--config names no file"),
    ],
)
def test_files_that_are_none(told, content, args, said, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert called(told[0], *(path if arg == "FILE" else arg for arg in args)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and said in line
    assert told[1] == []


def test_help_and_version(told, capsys):
    assert called(told[0], "--help") == 0
    assert "base   a base" in capsys.readouterr().out
    for args in (("--version",), ("base", "--version")):
        assert called(told[0], *args) == 0
        assert capsys.readouterr().out == "jaxdiff 0.1.0\n"
    assert called(told[0]) == 2
    assert "the first argument names one of base, other" in capsys.readouterr().err


def test_a_run_keeps_its_settings(command, small_presets, tmp_path):
    out = tmp_path / "t5"
    arguments = "t5", "--out", out, "--data-dir", tmp_path / "data", "--examples", 16, "--held-out", 2
    done = command(train, *arguments, "--vocab", 400, "--batch", 8, "--steps", 1, "--length", 16)
    assert done.code == 0, done.err
    kept = json.loads((out / "settings.json").read_text())
    assert kept["command"] == "t5" and kept["settings"]["vocab"] == 400
    again = command(train, "--config", out / "settings.json")
    assert again.code == 0 and "encoder of width" in again.out, again.err
    # Refused, the settings of the run stay as they are.
    other = command(train, "--config", out / "settings.json", "--learning-rate", 1.0)
    assert other.code == 2 and json.loads((out / "settings.json").read_text()) == kept

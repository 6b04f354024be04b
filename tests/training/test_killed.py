"""SIGKILL at moments of every stage: no checkpoint is lost, and no bit (see killed.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "killed.py"


def killed(report, *arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--report", report, *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def test_a_killed_run_loses_nothing(tmp_path):
    stages = ["writing", "manifest", "deleting", "outside"]
    report = killed(tmp_path / "report.json", "--moments", "4", "--stages", *stages)
    assert report["stages"] == dict.fromkeys(stages, 1)
    assert report["survived"] == 4 and report["last_equal"]
    unfinished = {death["stage"]: death["unfinished"] for death in report["deaths"]}
    assert any(name.endswith("-deleted.orbax-checkpoint-tmp") for name in unfinished["deleting"])
    assert any("-sealing" in name for name in unfinished["manifest"])


@pytest.mark.slow
def test_a_run_killed_fifty_times_loses_nothing(tmp_path):
    report = killed(tmp_path / "report.json", "--moments", "50")
    assert report["survived"] == report["died"] == 50 and report["last_equal"]
    assert min(report["stages"].values()) >= 4

"""A stall is reported with stacks, again and more rarely, and its end too; what compiles may take longer."""

import os
import re
import subprocess
import sys
import time

from jaxdiff.training.watchdog import Watchdog


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stall_here(condition):
    wait_until(condition)


def test_a_stall_is_reported_with_stacks_in_doubling_intervals_and_its_end_too(tmp_path, capfd):
    file = tmp_path / "stall-0.txt"
    reports = lambda: file.read_text().count(" stalled for ") if file.exists() else 0  # noqa: E731
    with Watchdog(tmp_path, 0.2) as watchdog:
        watchdog.doing("waiting for the data of step 5")
        begun = time.monotonic()
        stall_here(lambda: reports() == 3)  # after 0.2, 0.4, 0.8 s
        assert time.monotonic() - begun >= 0.8
        watchdog.doing("in step 5")
    said = capfd.readouterr().err
    pattern = r"^process 0 \(\S+\) stalled for \d+ s waiting for the data of step 5; the stacks .*stall-0\.txt:$"
    assert len(re.findall(pattern, said, re.MULTILINE)) == 3
    assert "in stall_here" in said and "in stall_here" in file.read_text()
    assert re.search(r"resumed after \d+ s waiting for the data of step 5", said)


def test_what_goes_on_and_what_compiles_is_no_stall(tmp_path, capfd):
    with Watchdog(tmp_path, 0.5) as watchdog:
        for step in range(10):
            watchdog.doing(f"in step {step}")
            time.sleep(0.1)
        watchdog.doing("in step 10", compiles=True)
        time.sleep(1)
    with Watchdog(tmp_path, 0.0) as watchdog:
        watchdog.doing("in step 11")
        time.sleep(0.1)
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_speaking(tmp_path, capfd):
    (tmp_path / "stall-0.txt").mkdir()
    said = []
    with Watchdog(tmp_path, 0.1) as watchdog:
        watchdog.doing("in step 1")
        wait_until(lambda: said.append(capfd.readouterr().err) or "cannot be written" in "".join(said))
    assert "stalled for" in "".join(said)


ENDS = """
import sys, time
from pathlib import Path
from jaxdiff.training import watchdog
from jaxdiff.training.watchdog import Watchdog
watchdog.WRITES = 0.1
with Watchdog(Path(sys.argv[1]), 0.0, 0.3) as watchdog:
    watchdog.doing("in step 1")
    time.sleep(100)
"""


def test_a_stall_ends_the_process_where_asked(tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 71
    assert re.search(r"^error: process 0 \(\S+\) ends, having stalled for [01] s in step 1$", done.stderr, re.MULTILINE)
    assert "File" in (tmp_path / "stall-0.txt").read_text()


def test_a_folder_that_hangs_too_does_not_keep_the_process(tmp_path):
    os.mkfifo(tmp_path / "stall-0.txt")  # opening it waits for a reader
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 71 and "is still not written after" in done.stderr
    assert re.search(r"^error: process 0 \(\S+\) ends", done.stderr, re.MULTILINE)

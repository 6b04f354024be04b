"""metrics.jsonl after a crash: what is readable is kept, what is not is named, once."""

import json
import subprocess
import sys
import warnings

import pytest

from jaxdiff.training.metrics import DAMAGED, LINES, MetricsLog, plot, read


def line(step, loss=0.5):
    return json.dumps({"step": step, "loss": loss}).encode() + b"\n"


def written(folder, *parts):
    path = folder / LINES
    path.write_bytes(b"".join(parts))
    return path


def steps(path):
    """Those that are read, and the warning's text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [line["step"] for line in read(path)]
    assert len(caught) <= 1
    return found, str(caught[0].message) if caught else ""


DAMAGE = {
    "half a line in the middle": (b'{"step": 2, "lo\n', "1 line (2) cannot be read"),
    "a number": (b"7\n", "1 line (2)"),
    "a list": (b"[1, 2]\n", "1 line (2)"),
    "null": (b"null\n", "1 line (2)"),
    "no step": (b'{"loss": 1.0}\n', "1 line (2)"),
    "a step in words": (b'{"step": "2", "loss": 1.0}\n', "1 line (2)"),
    "a step that is none": (b'{"step": NaN, "loss": 1.0}\n', "1 line (2)"),
    "a step that is true": (b'{"step": true}\n', "1 line (2)"),
    "half a step": (b'{"step": 2.5}\n', "1 line (2)"),
    "a negative step": (b'{"step": -1}\n', "1 line (2)"),
    "a step of many digits": (b'{"step": 1' + b"0" * 40 + b"}\n", "1 line (2)"),
    "a number of too many digits": (b'{"step": 1' + b"0" * 5000 + b"}\n", "1 line (2)"),
    "zeros": (b"\0" * 512 + b"\n", "1 line (2)"),
    "no UTF-8": (b'{"step": 2, "\xff": 1}\n', "1 line (2)"),
    "deeply nested": (b"[" * 100_000 + b"\n", "1 line (2)"),
    "three of them": (b"7\n{\n\0\n", "3 lines (2, 3, 4)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_line_costs_that_line_alone(tmp_path, case):
    damage, words = DAMAGE[case]
    path = written(tmp_path, line(1), damage, line(3), line(4))
    found, said = steps(path)
    assert found == [1, 3, 4]
    assert str(path) in said and words in said and "3 are kept" in said and "\n" not in said
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="metrics.damaged.jsonl") as caught:
        MetricsLog(tmp_path, 3).close()
    assert len(caught) == 1
    assert steps(path) == ([1, 3], "") and (tmp_path / DAMAGED).read_bytes() == before


def test_every_damage_has_a_file_of_its_own(tmp_path):
    """The files that are set aside are the only copies of the lines that were left out."""
    befores = []
    for name in (DAMAGED, "metrics.damaged-2.jsonl", "metrics.damaged-3.jsonl"):
        path = written(tmp_path, line(1), f"lost {name}\n".encode(), line(2))
        befores.append((name, path.read_bytes()))
        with pytest.warns(UserWarning, match=name):
            MetricsLog(tmp_path, 2).close()
    assert [(name, (tmp_path / name).read_bytes()) for name, _ in befores] == befores
    MetricsLog(tmp_path, 2).close()  # nothing is wrong any more
    assert len(list(tmp_path.glob("metrics.damaged*"))) == 3


def test_what_somebody_else_has_put_there_is_kept(tmp_path):
    (tmp_path / DAMAGED).symlink_to(tmp_path / "nowhere")
    (tmp_path / "metrics.damaged-2.jsonl").mkdir()
    written(tmp_path, line(2), line(1), line(2))
    with pytest.warns(UserWarning, match="metrics.damaged-3.jsonl"):
        MetricsLog(tmp_path, 2).close()
    assert not (tmp_path / "nowhere").exists()


def test_a_block_of_zeros_before_a_line(tmp_path):
    """What some file systems leave after a power cut; the next line was written behind it."""
    found, said = steps(written(tmp_path, line(1), b"\0" * 100 + line(2), line(3)))
    assert found == [1, 2, 3] and "1 line (2)" in said


def test_of_equal_steps_the_last_is_kept(tmp_path):
    path = written(tmp_path, line(1), line(2, 0.1), line(3), line(2, 0.2))
    found, said = steps(path)
    assert found == [1, 2, 3] and "1 line (2) have a step that a later line has too" in said
    with warnings.catch_warnings(action="ignore"):
        assert read(path)[1]["loss"] == 0.2


def test_a_mark_at_the_front_other_ends_and_blank_lines_are_no_damage(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbf", line(1).replace(b"\n", b"\r\n"), b"\n", line(2), b"  \n")
    assert steps(path) == ([1, 2], "")


def test_a_separator_of_unicode_in_a_line_does_not_end_it(tmp_path):
    assert steps(written(tmp_path, '{"step": 1, "note": "a\u2028b"}\n'.encode(), line(2))) == ([1, 2], "")


def test_a_last_line_cut_short_is_said_when_the_run_goes_on(tmp_path):
    path = written(tmp_path, line(1), b'{"step": 2, "lo')
    assert steps(path) == ([1], "")  # it may just be being written
    with pytest.warns(UserWarning, match="line 2, the last, was cut short: left out, 1 are kept"):
        MetricsLog(tmp_path, 1).close()
    assert path.read_bytes() == line(1) and not (tmp_path / DAMAGED).exists()


def test_a_last_line_without_an_end_is_read_and_gets_one(tmp_path):
    path = written(tmp_path, line(1), line(2).rstrip())
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    assert steps(path) == ([1, 2, 3], "")


def test_many_damaged_lines_are_counted_not_listed(tmp_path):
    _, said = steps(written(tmp_path, b"7\n" * 1000, line(3)))
    assert "1000 lines (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)" in said and len(said) < 400


@pytest.mark.parametrize(
    "loss", [None, "high", [1], True, float("nan"), 10**400, -(10**400)], ids=lambda loss: f"{loss}"[:9]
)
def test_a_loss_that_is_no_number_is_not_drawn(tmp_path, loss):
    written(tmp_path, json.dumps({"step": 1, "loss": loss}).encode() + b"\n", line(2), b'{"step": 3}\n')
    plot(tmp_path)
    assert (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize("loss", [10**300, -(10**300), 10**30, 1e308], ids=lambda loss: f"{loss:.0e}")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of matplotlib, about the axis
def test_a_large_loss_is_drawn(tmp_path, loss):
    written(tmp_path, line(1), json.dumps({"step": 2, "loss": loss}).encode() + b"\n", line(3))
    plot(tmp_path)
    assert (tmp_path / "loss.png").is_file()


FULL = """
import resource, signal, sys
from pathlib import Path
from jaxdiff.training.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    for step in range(2000):
        log.write({"step": step, "loss": 1.0})
except OSError as error:
    print(error)
log.close()
"""


@pytest.mark.parametrize("most", [1000, 0])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, most):
    command = [sys.executable, "-c", FULL, str(tmp_path), str(most)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{tmp_path / LINES}: cannot be written: File too large" in done.stdout, done.stderr
    assert done.stderr == ""

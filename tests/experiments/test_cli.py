"""Exit codes of scripts, and what they say."""

import warnings

import pytest

from experiments.cli import run
from jaxdiff.training.multihost import FolderInUseError, PeerLostError


class Stopped(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a\n  b"), 2, "error: a b\n"),
        (FileNotFoundError("no such file"), 2, "error: no such file\n"),
        (FolderInUseError("runs/a: in use"), 73, "error: runs/a: in use\n"),
        (PeerLostError("another process is gone"), 71, "error: another process is gone\n"),
        (Stopped("it diverged"), 1, "error: it diverged\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(75), 75, ""),
    ],
)
def test_a_failure_is_one_line_and_a_code(capsys, error, code, said):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, [], stopped_by=(Stopped,))
    assert stop.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback_and_has_a_code_of_its_own(capsys):
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(SystemExit) as stop:
        run(main, [])
    assert stop.value.code == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("RuntimeError: a bug\n") and "in main" in said


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x07red", "half \ud83d", "\u202egnp.exe", "a\x9b31m\x00b", "x" * 10**6], ids=range(5)
)
@pytest.mark.parametrize("as_warning", [False, True])
def test_nothing_that_is_said_reaches_a_terminal_as_it_is(capsys, text, as_warning):
    """A message may hold what a file holds: escaped, and of a length that can be read."""

    def main() -> None:
        if as_warning:
            warnings.warn(text, stacklevel=1)
        else:
            raise ValueError(text)

    with pytest.raises(SystemExit) as stop:
        run(main, [])
    assert stop.value.code == (0 if as_warning else 2)
    said = capsys.readouterr().err
    assert said.endswith("\n") and said[:-1].isprintable() and len(said) < 4100

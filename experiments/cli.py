"""Command lines from settings: one place that turns bad input into one line and exit code 2."""

import contextlib
import functools
import io
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tyro
from tqdm import tqdm

from jaxdiff.core.messages import plain
from jaxdiff.training import multihost
from jaxdiff.training.compilation_cache import enable_compilation_cache

COMPILED = Path("~/.cache/jaxdiff/compiled")
"""Where scripts keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR names another place."""


def run(
    main: Callable[..., int | None], args: list[str] | None = None, stopped_by: tuple[type[Exception], ...] = ()
) -> None:
    """Call `main` with the arguments of the command line, which tyro derives from its signature, and exit.

    Exit codes: what `main` returns (None is 0); 2 for a bad argument or value, a file that cannot be read or written
    (`ValueError`, `OSError`: one line on standard error); 1 for the errors in `stopped_by`, one line too; 75 for a run
    that was told to stop and has saved; 130 for Ctrl-C; 71 for other processes that are gone or a stall (one line); 73
    where another run writes to the folder (one line); 70 for a bug of ours, which keeps its traceback. Warnings are one
    line each.

    Of several processes that one fails ends all of them, with the same code. What is in `stopped_by` is raised by all
    of them, and said by process 0.
    """
    enable_compilation_cache(COMPILED)
    with warnings.catch_warnings():
        warnings.showwarning = _Warnings().show
        try:
            code = _parsed(main, args)()
        except stopped_by as error:
            if multihost.index() == 0:
                print(f"error: {_line(str(error))}", file=sys.stderr)
            code = 1
        except Exception as error:
            multihost.fail(error)  # of several processes, none returns from here
            code, text = multihost.outcome(error)
            print(text, file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
            multihost.end(code, "interrupted")
    sys.exit(code or 0)


def _parsed(main: Callable[..., int | None], args: list[str] | None) -> Callable[[], int | None]:
    """`main` with its arguments. ValueError for bad ones: tyro would print a box of several lines and exit."""

    @functools.wraps(main)
    def later(*positional, **named):
        return functools.partial(main, *positional, **named)

    specification = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {specification.name}" if specification else None
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(later, prog=program, args=args, description=main.__doc__, config=_CONFIG)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # The message is what stands in the first box above its ruled line; the rest repeats the help.
        lines = [line.strip("│ ") for line in box.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        message = next((lines[:i] for i, line in enumerate(lines) if set(line) == {"─"}), lines)
        raise ValueError(f"{' '.join(message)} (--help lists all settings)") from None


_CONFIG = (tyro.conf.OmitArgPrefixes,)


def _line(text: str) -> str:
    return plain(text, most=4000)


class _Warnings:
    """Shows each warning as a line of its own above any progress bar, and of one kind the first few alone."""

    LINES = 12

    def __init__(self) -> None:
        self._shown: Counter[tuple[str, int]] = Counter()

    def show(self, message: Warning | str, category: type[Warning], file: str, line: int, *_) -> None:
        self._shown[file, line] += 1
        count = self._shown[file, line]
        if count <= self.LINES:
            rest = "; further ones like it are not shown" if count == self.LINES else ""
            tqdm.write(f"warning: {_line(str(message))}{rest}", file=sys.stderr)

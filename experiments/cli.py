"""Command lines from settings; bad input becomes one line on standard error and exit code 2.

    run(main)                                       # flags from the signature of `main`
    run({"imagen.base64": Command(…), "clip": …})   # the first word chooses one of a table

Flags are the fields of a dataclass. A field that is a dataclass is a group: its fields are flags too.
"""

import contextlib
import functools
import io
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

import jaxdiff
from experiments.options import settings_file
from jaxdiff.core.messages import Note, plain
from jaxdiff.training import multihost
from jaxdiff.training.compilation_cache import enable_compilation_cache

COMPILED = Path("~/.cache/jaxdiff/compiled")
"""Compilation cache, unless JAX_COMPILATION_CACHE_DIR is set."""


@dataclass(frozen=True)
class Command:
    """A command of a table: `main` is called with settings of the type of `settings`, the defaults. `about`: one line
    for --help."""

    main: Callable[[Any], int | None]
    settings: Any
    about: str


Main = Callable[..., int | None] | Command | Mapping[str, Command]


def run(main: Main, args: Sequence[str] | None = None, stopped_by: tuple[type[Exception], ...] = ()) -> None:
    """Parse the command line, call `main` or the command of a table named by the first argument, and exit.

    `--version` prints the version; with a table, `--config FILE` reads settings from a file (`settings_file`).

    Exit codes (all but 0, 130 and the result of `main` with one line on standard error; 70 with a traceback):
        0: success (or what `main` returns)
        1: an error in `stopped_by`
        2: a bad argument or value, an unreadable or unwritable file (`ValueError`, `OSError`)
        70: a bug
        71: other processes are gone, or a stall
        73: another run writes to the folder
        75: stopped by a signal after saving
        130: Ctrl-C

    Each warning is one line. If one of several processes fails, all exit with the same code. Errors in `stopped_by` are
    raised by all processes and printed by process 0.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["--version"]:
        print(f"jaxdiff {jaxdiff.__version__}")
        sys.exit(0)
    enable_compilation_cache(COMPILED)
    with warnings.catch_warnings():
        warnings.showwarning = _Warnings().show
        try:
            code = _given(main, args)()
        except stopped_by as error:
            if multihost.index() == 0:
                print(f"error: {_line(str(error))}", file=sys.stderr)
            code = 1
        except Exception as error:
            multihost.fail(error)  # does not return if there are several processes
            code, text = multihost.outcome(error)
            print(text, file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
            multihost.end(code, "interrupted")
    sys.exit(code or 0)


def _given(main: Main, args: list[str]) -> Callable[[], int | None]:
    if isinstance(main, Mapping):
        return _chosen(main, args)
    return _parsed(main.main, args, command=main) if isinstance(main, Command) else _parsed(main, args)


def _chosen(commands: Mapping[str, Command], args: list[str]) -> Callable[[], int | None]:
    """The command named by the arguments or by their settings file. ValueError for an unknown name."""
    if args[:1] in (["-h"], ["--help"]):
        width = max(map(len, commands))
        lines = [f"  {name:{width}}  {command.about}" for name, command in commands.items()]
        print("\n".join([f"usage: {_program()} NAME [settings]", "", *lines, "", "NAME --help lists the settings."]))
        sys.exit(0)
    name, args = settings_file.given(args)
    if name not in commands:
        problem = "the first argument names" if name is None else f"unknown {name!r}: the first argument names"
        raise ValueError(f"{problem} one of {', '.join(commands)} (--help says what they are)")
    command = commands[name]
    if args[:1] == ["--version"]:
        print(f"jaxdiff {jaxdiff.__version__}")
        sys.exit(0)

    return _parsed(command.main, args, f"{_program()} {name}", command)


def _program() -> str:
    """The command that started this process."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {specification.name}" if specification else Path(sys.argv[0]).name


def _parsed(
    main: Callable[..., int | None], args: list[str], program: str | None = None, command: Command | None = None
) -> Callable[[], int | None]:
    """`main` with its parsed arguments, or with the settings of a command. ValueError for bad arguments, for which tyro
    would print a box of several lines and exit."""

    @functools.wraps(main)
    def later(*positional, **named):
        return functools.partial(main, *positional, **named)

    box = io.StringIO()
    options = {"prog": program or _program(), "args": args, "config": _CONFIG}
    try:
        with contextlib.redirect_stderr(box):
            if command is None:
                return tyro.cli(later, description=(main.__doc__ or "").partition("Args:")[0].strip(), **options)
            default = command.settings
            settings = tyro.cli(type(default), default=default, description=command.about, **options)
            return functools.partial(command.main, settings)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # The message is in the first box, above its ruled line; the rest repeats the help.
        lines = [line.strip("│ ") for line in box.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        message = next((lines[:i] for i, line in enumerate(lines) if set(line) == {"─"}), lines)
        raise ValueError(f"{' '.join(message)} (--help lists all settings)") from None


_CONFIG = (tyro.conf.OmitArgPrefixes,)


def _line(text: str) -> str:
    return plain(text, most=4000)


class _Warnings:
    """Prints each warning on one line above any progress bar; only the first few of each kind."""

    LINES = 12

    def __init__(self) -> None:
        self._shown: Counter[tuple[str, int]] = Counter()

    def show(self, message: Warning | str, category: type[Warning], file: str, line: int, *_) -> None:
        self._shown[file, line] += 1
        count = self._shown[file, line]
        if count <= self.LINES:
            rest = "; further ones like it are not shown" if count == self.LINES else ""
            kind = "note" if issubclass(category, Note) else "warning"
            tqdm.write(f"{kind}: {_line(str(message))}{rest}", file=sys.stderr)

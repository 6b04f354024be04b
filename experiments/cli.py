"""Command lines from settings: one place that turns bad input into one line and exit code 2.

    run(main)                                       # flags from the signature of `main`
    run({"imagen.base64": Command(…), "clip": …})   # the first word chooses one of a table

Flags are the fields of a dataclass, whose own dataclass fields are groups: their fields are flags too.
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
"""Where scripts keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR names another place."""


@dataclass(frozen=True)
class Command:
    """One of the commands that a table names: `main` is called with settings like `settings`, which are the defaults.
    `about`: one line for --help."""

    main: Callable[[Any], int | None]
    settings: Any
    about: str


Main = Callable[..., int | None] | Command | Mapping[str, Command]


def run(main: Main, args: Sequence[str] | None = None, stopped_by: tuple[type[Exception], ...] = ()) -> None:
    """Call `main`, or the command of a table that the first argument names, as the command line says, and exit.

    `--version` prints the version; with a table, `--config FILE` begins with the settings in a file (`settings_file`).

    Exit codes: what `main` returns (None is 0); 2 for a bad argument or value, a file that cannot be read or written
    (`ValueError`, `OSError`: one line on standard error); 1 for the errors in `stopped_by`, one line too; 75 for a run
    that was told to stop and has saved; 130 for Ctrl-C; 71 for other processes that are gone or a stall (one line); 73
    where another run writes to the folder (one line); 70 for a bug of ours, which keeps its traceback. Warnings are one
    line each.

    Of several processes that one fails ends all of them, with the same code. What is in `stopped_by` is raised by all
    of them, and said by process 0.
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
            multihost.fail(error)  # of several processes, none returns from here
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
    """The command that the arguments, or the file of settings among them, name. ValueError for any other name."""
    if args[:1] in (["-h"], ["--help"]):
        width = max(map(len, commands))
        lines = [f"  {name:{width}}  {command.about}" for name, command in commands.items()]
        print("\n".join([f"usage: {_program()} NAME [settings]", "", *lines, "", "NAME --help lists the settings."]))
        sys.exit(0)
    name, args = settings_file.given(args)
    if name not in commands:
        said = "the first argument names" if name is None else f"unknown {name!r}: the first argument names"
        raise ValueError(f"{said} one of {', '.join(commands)} (--help says what they are)")
    command = commands[name]
    if args[:1] == ["--version"]:
        print(f"jaxdiff {jaxdiff.__version__}")
        sys.exit(0)

    return _parsed(command.main, args, f"{_program()} {name}", command)


def _program() -> str:
    """How this process was started."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {specification.name}" if specification else Path(sys.argv[0]).name


def _parsed(
    main: Callable[..., int | None], args: list[str], program: str | None = None, command: Command | None = None
) -> Callable[[], int | None]:
    """`main` with its arguments, or with the settings of a command of a table. ValueError for bad ones: tyro would
    print a box of several lines and exit."""

    @functools.wraps(main)
    def later(*positional, **named):
        return functools.partial(main, *positional, **named)

    box = io.StringIO()
    options = {"prog": program or _program(), "args": args, "config": _CONFIG}
    try:
        with contextlib.redirect_stderr(box):
            if command is None:
                return tyro.cli(later, description=main.__doc__, **options)
            default = command.settings
            settings = tyro.cli(type(default), default=default, description=command.about, **options)
            return functools.partial(command.main, settings)
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
            kind = "note" if issubclass(category, Note) else "warning"
            tqdm.write(f"{kind}: {_line(str(message))}{rest}", file=sys.stderr)

"""Command lines from settings: one place that turns bad input into one line and exit code 2."""

import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from jaxdiff.training.compilation_cache import enable_compilation_cache

COMPILED = Path("~/.cache/jaxdiff/compiled")
"""Where scripts keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR names another place."""


def run(main: Callable[..., int | None], args: list[str] | None = None) -> None:
    """Call `main` with the arguments of the command line, which tyro derives from its signature, and exit.

    Exit codes: what `main` returns (None is 0); 2 for a bad value, a file that cannot be read or written
    (`ValueError`, `OSError`: one line on standard error); 130 for Ctrl-C. Anything else is a bug of ours and
    keeps its traceback.
    """
    enable_compilation_cache(COMPILED)
    try:
        code = tyro.cli(main, args=args, description=main.__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)

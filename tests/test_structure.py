"""Functions have at most 60 lines and 8 parameters, in the package and in the experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARAMETERS, LINES = 8, 60

TOO_LARGE: set[str] = set()
"""Known exceptions. A function that has become small leaves this list."""


def parameters(function):
    """How many parameters a function has, `self` and `cls` aside."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return sum(name.arg not in ("self", "cls") for name in names)


def too_large(source):
    """The names of the functions and methods, of any depth, with too many parameters or lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if parameters(node) > PARAMETERS or node.end_lineno - node.lineno >= LINES:
            yield node.name


def test_functions_and_signatures_are_short():
    files = [path for package in ("jaxdiff", "experiments") for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 50
    large = {f"{path.relative_to(ROOT).as_posix()}: {name}" for path in files for name in too_large(path.read_text())}
    assert sorted(large - TOO_LARGE) == [], f"more than {PARAMETERS} parameters, or than {LINES} lines"
    assert sorted(TOO_LARGE - large) == [], "no longer too large: to be removed from the exceptions"


EIGHT = "a, b, c, d, *e, f, g, **h"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (f"def f({EIGHT}): pass", []),
        (f"def f(first, {EIGHT}): pass", ["f"]),
        (f"def f(first, /, {EIGHT}): pass", ["f"]),
        (f"class A:\n  def f(self, {EIGHT}): pass", []),
        (f"class A:\n  def __init__(self, first, {EIGHT}): pass", ["__init__"]),
        (f"def outer():\n  async def f(first, {EIGHT}): pass", ["f"]),
        ("def f():\n" + 59 * "  pass\n", []),
        ("def f():\n" + 60 * "  pass\n", ["f"]),
    ],
)
def test_what_is_too_large(source, found):
    assert list(too_large(source)) == found

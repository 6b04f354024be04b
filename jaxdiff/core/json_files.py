"""JSON that anyone may have written: bounded in size and depth, and one kind of error for all that can be wrong."""

import json
from pathlib import Path
from typing import Any

from jaxdiff.core.messages import quoted, reason

LARGEST = 2**24
"""Bytes of a file of settings: hundreds of times what any has."""
DEEPEST = 64
"""Levels of lists and objects in one another."""


def read_object(path: Path, what: str = "settings", most: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes (UTF-8, or UTF-16 and UTF-32 by their first bytes).

    OSError where the file cannot be read. ValueError that names it, in one line, where it is no JSON object of
    `what`, is too large, is nested too deeply, or gives two values to one name.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    return parse_object(data, str(path), what, most)


def parse_object(data: str | bytes, where: str, what: str = "settings", most: int = LARGEST) -> dict[str, Any]:
    """`read_object` of text that is at hand; `where` names it."""
    values = parse(data, where, what, most)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not JSON with {what}: it holds a {type(values).__name__}")
    return values


def parse(data: str | bytes, where: str, what: str = "settings", most: int = LARGEST) -> Any:
    """Any JSON value. ValueError as in `read_object`."""
    if len(data) > most:
        raise ValueError(f"{where} is not JSON with {what}: it is larger than {most} bytes")
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON with {what}: {reason(error)}") from error
    except RecursionError:  # without its traceback, which is a thousand lines long
        raise ValueError(f"{where} is not JSON with {what}: it is nested too deeply") from None
    _check_depth(values, f"{where} is not JSON with {what}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members. ValueError where two of one name differ: readers do not agree on which of them counts."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if values.setdefault(name, value) is not value and values[name] != value:
            raise ValueError(f"{quoted(name)} is there twice, with two values")
    return values


def _check_depth(values: Any, problem: str) -> None:
    level = [values]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for group in level
            if isinstance(group, list | dict)
            for item in (group.values() if isinstance(group, dict) else group)
        ]
        if not level:
            return
    raise ValueError(f"{problem}: it is nested more than {DEEPEST} levels deep")

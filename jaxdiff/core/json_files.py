"""Reading of untrusted JSON: bounded in size and depth, with ValueError for every fault."""

import json
from pathlib import Path
from typing import Any

from jaxdiff.core.messages import quoted, reason

LARGEST = 2**24
"""Maximum bytes of a settings file, hundreds of times the usual size."""
DEEPEST = 64
"""Maximum nesting of lists and objects."""


def read_object(path: Path, what: str = "settings", most: int = LARGEST) -> dict[str, Any]:
    """Read the JSON object in a file of at most `most` bytes (UTF-8; UTF-16 and UTF-32 are detected).

    Raises OSError if the file cannot be read, and a one-line ValueError that names it if it is not a JSON object, is
    too large or nested too deeply, or has two values for one name. what: the expected contents, for the message.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    return parse_object(data, str(path), what, most)


def parse_object(data: str | bytes, where: str, what: str = "settings", most: int = LARGEST) -> dict[str, Any]:
    """`read_object` for data in memory. where: its name in messages."""
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
    except RecursionError:  # its traceback has a thousand lines
        raise ValueError(f"{where} is not JSON with {what}: it is nested too deeply") from None
    _check_depth(values, f"{where} is not JSON with {what}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members. ValueError if a name has two different values, since JSON readers differ on which to use."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if values.setdefault(name, value) is not value and values[name] != value:
            raise ValueError(f"{quoted(name)} occurs twice, with different values")
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

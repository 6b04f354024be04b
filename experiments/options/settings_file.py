"""The settings of a run as a JSON file, read by `--config FILE`.

    {"version": 1, "command": "imagen.base64", "settings": {"preset": "tiny", "steps": 5000, …}}

Settings have the names of their flags. Flags on the command line override the file.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.messages import quoted
from jaxdiff.training.distributed import Cluster

NAME = "settings.json"
VERSION = 1
OTHER_NAMES = {"dropout": "text_dropout", "max_level": "max_aug_level", "total": "steps"}
"""Flags whose names differ from the library's fields."""
FREE = ("out", "mesh", "log-every", "sample-every", "evaluate-every", "save-every", "keep", "init", "strict")
"""Flags that may change when a run is resumed."""


def flags(settings: Any) -> dict[str, Any]:
    """`{"learning-rate": 0.001, …}`: all settings by flag, as JSON types, without `Cluster`, which is not part of a
    run."""
    return dict(_flags(settings))


def _flags(settings: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Cluster):
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        else:
            yield flag(field.name), _plain(value)


def flag(name: str) -> str:
    """The flag of a field, without its dashes."""
    return name.replace("_", "-")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def save(path: Path, command: str, settings: Any) -> None:
    """Write the settings of a command to a file."""
    write_json(path, {"version": VERSION, "command": command, "settings": flags(settings)})


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The command and the settings in a file. ValueError for another file; FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of settings")
    data = json_files.read_object(path)
    command, settings = data.get("command"), data.get("settings")
    if data.get("version") != VERSION or not isinstance(command, str) or not isinstance(settings, dict):
        raise ValueError(f"{path}: not the settings of a run (a {NAME} of version {VERSION})")
    for name, value in settings.items():
        if not _is_setting(value):
            raise ValueError(f"{path}: {name} is {quoted(value)}, which no setting can be")
    return command, settings


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str | int | float) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def changed(path: Path, settings: Any) -> list[str]:
    """The flags that differ from those in the file: `--preset tiny → quick`."""
    before, now = read(path)[1], flags(settings)
    names = [name for name in now if name in before and before[name] != now[name] and name not in FREE]
    return [f"--{name} {_shown(before[name])} → {_shown(now[name])}" for name in names]


def _shown(value: Any) -> str:
    """The value as typed on a command line; None is an omitted flag."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or '""'
    return "left out" if value is None else str(value)


def in_flags(message: str, settings: Any) -> str:
    """A library message that begins with a field's name, with the flag instead."""
    name, blank, rest = message.partition(" ")
    flagged = flag(OTHER_NAMES.get(name, name))
    return f"--{flagged}{blank}{rest}" if flagged in flags(settings) else message


def words(settings: dict[str, Any]) -> list[str]:
    """The equivalent command line. None is omitted: it is the default of every such setting."""
    line = []
    for name, value in settings.items():
        if value is True or value is False:
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def given(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command's name, from the first argument or the file of `--config`, and its arguments, the file's first.
    ValueError if the two names differ."""
    args = list(args)
    name = args.pop(0) if args and not args[0].startswith("-") else None
    if "--config" not in args:
        return name, args
    place = args.index("--config")
    if place + 1 == len(args):
        raise ValueError("--config names no file")
    path = Path(args[place + 1])
    command, settings = read(path)
    if name not in (None, command):
        raise ValueError(f"--config {path}: the settings of {command}, not of {name}")
    return command, words(settings) + args[:place] + args[place + 2 :]

"""Every command that a page or a docstring shows names a command that there is, and flags that it takes."""

import dataclasses
import importlib
import inspect
import re
import shlex
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "jaxdiff").rglob("README.md")),
    *sorted((ROOT / "tpu_scripts").rglob("*.md")),
    *sorted(path for path in (ROOT / "experiments").rglob("*.py")),
]
LINE = re.compile(r"(?:python|\bpython3?) -m (experiments(?:\.\w+)+)((?:[^\n`\\]|\\\n)*)")


def commands_of(text):
    """(module, words) of each command that stands in a text."""
    for match in LINE.finditer(text):
        line = match[2].replace("\\\n", " ").split("#")[0].split(" && ")[0]
        try:
            yield match[1], shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe behind the name
            yield match[1], []


def flags_of(settings_type):
    """Of a dataclass of settings, or of a function, with those of its groups."""
    if dataclasses.is_dataclass(settings_type):
        fields = {field.name: field.type for field in dataclasses.fields(settings_type)}
        hints = typing.get_type_hints(settings_type)
        values = {name: hints.get(name) for name in fields}
    else:
        values = typing.get_type_hints(settings_type)
    found = set()
    for name, hint in values.items():
        inner = hint if inspect.isclass(hint) else None
        if dataclasses.is_dataclass(inner):
            found |= flags_of(inner)
        else:
            found |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    return found


def of_value(settings):
    """The same of a value, whose groups may be of narrower classes than its fields say."""
    found = flags_of(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= of_value(value)
    return found


def problem(module, words):
    """What is wrong with a command, or None."""
    path = ROOT / module.replace(".", "/")
    if path.is_dir() or path.name == "NAME":  # a form, not a command
        return None
    if not path.with_suffix(".py").is_file():
        return "no such command"
    loaded = importlib.import_module(module)
    if hasattr(loaded, "commands"):
        table, config = loaded.commands(), "--config" in words
        if not words or words[0] == "NAME" or words[0].startswith("-"):
            return None if not words or config or words[0] in ("NAME", "--help", "--version") else "names nothing"
        if words[0] not in table and not words[0][0].isalpha():
            return None  # prose behind the command's name
        if words[0] not in table:
            return f"knows no {words[0]}" if any(word.startswith("--") for word in words) else None
        known = of_value(table[words[0]].settings)
    elif inspect.isfunction(getattr(loaded, "command", None)):
        known = of_value(loaded.command().settings)
    else:
        known = flags_of(loaded.main)
    given = {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}
    unknown = given - known - {"--help", "--version", "--config"}
    return f"takes no {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_written_can_be_typed(page):
    wrong = {
        f"{module} {' '.join(words)}": reason
        for module, words in commands_of(page.read_text(encoding="utf-8"))
        if (reason := problem(module, words)) is not None
    }
    assert not wrong


def test_what_is_wrong_is_seen():
    text = "`python -m experiments.gone`, `python -m experiments.train imagen.base63 --steps 3` and\n"
    text += "    python -m experiments.train t5 --stepz 3 \\\n        --out x  # a comment\n"
    text += "    python -m experiments.sample 'a b' --seed 3 --guidance 2 --weights x\n"
    found = [problem(module, words) for module, words in commands_of(text)]
    assert found == ["no such command", "knows no imagen.base63", "takes no --stepz", None]

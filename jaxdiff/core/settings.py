"""Settings dataclasses as JSON, for files and for comparison, and hashes of what they say.

In JSON a dataclass is its tag with its fields, an enum's member its tag with its name. Fields that say only how
something is computed (metadata `how`) are no part of it: they may change from one run to the next.

Files use the tags of a closed table (`Table`), which stay when classes are renamed or moved. Checkpoints take any
class, by its name, and where it is one of this package by its module too.
"""

import dataclasses
import enum
import hashlib
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import typeguard

from jaxdiff.core.messages import quoted, reason

LONGEST = 2**16
"""Entries of a list in a file."""
_SHOWN = 32  # entries of a list that are compared one by one; longer ones by their hash

Tag = Callable[[type], str]


@dataclass(frozen=True, eq=False)
class Table:
    """The classes that a file of settings may name, each by its tag.

    check: called with (class, field, value, where) for each field of a file before its class is given it.
    check_value: called with (value, where) for each dataclass and enum member that came out of a file. Both raise
        ValueError that names `where`.
    """

    classes: Mapping[str, type]
    check: Callable[[type, str, Any, str], None] = lambda *_: None
    check_value: Callable[[Any, str], None] = lambda *_: None
    _tags: Mapping[type, str] = field(init=False)

    def __post_init__(self):
        tags = {cls: tag for tag, cls in self.classes.items()}
        if len(tags) != len(self.classes):
            raise ValueError("a class has two tags")
        object.__setattr__(self, "_tags", tags)

    def to_json(self, settings: Any) -> Any:
        """Settings as JSON's types; ValueError for a class that `from_json` would not read back."""
        return _plain(settings, self._tag, _refused)

    def from_json(self, data: Any, where: str) -> Any:
        """The inverse of `to_json`, of what `core.json_files` has read; `how` fields of a file are left as they are by
        default. ValueError that names `where` for anything it does not know, before anything is built."""
        if isinstance(data, list):
            if len(data) > LONGEST:
                raise ValueError(f"{where}: a list of {len(data)} entries, more than {LONGEST}")
            return tuple(self.from_json(item, where) for item in data)
        if not isinstance(data, dict):
            return data
        tag = data.get("class")
        if not isinstance(tag, str) or tag not in self.classes:
            raise ValueError(f"{where}: unknown class of settings {quoted(tag)}")
        cls = self.classes[tag]
        passed_over = {"class", *(_how(cls) - {"class"})}
        fields = {name: self.from_json(value, where) for name, value in data.items() if name not in passed_over}
        self._check_fields(cls, fields, where)
        try:
            value = cls[fields["member"]] if issubclass(cls, enum.Enum) else cls(**fields)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{where}: settings of {tag} that this version does not know ({reason(error)})") from error
        except ValueError as error:  # of the class itself, which knows no file
            raise ValueError(f"{where}: {reason(error)}") from error
        self.check_value(value, where)
        return value

    def _tag(self, cls: type) -> str:
        if cls not in self._tags:
            raise ValueError(f"settings of class {cls.__name__} cannot be written to a file")
        return self._tags[cls]

    def _check_fields(self, cls: type, fields: dict[str, Any], where: str) -> None:
        """ValueError for a field of another type, or that `check` refuses."""
        hints, every = typing.get_type_hints(cls), typeguard.CollectionCheckStrategy.ALL_ITEMS
        for name, value in fields.items():
            hint = hints.get(name, typing.Any)
            self.check(cls, name, value, where)
            try:
                typeguard.check_type(value, hint, collection_check_strategy=every)
            except typeguard.TypeCheckError as error:
                raise ValueError(f"{where}: {name} of {cls.__name__} is {quoted(value)}: {reason(error)}") from error
            kinds = {hint, *typing.get_args(hint)}
            if isinstance(value, bool) and float in kinds and bool not in kinds:  # to Python, True is the number 1
                raise ValueError(f"{where}: {name} of {cls.__name__} is {value}, it takes only numbers")


def flatten(settings: Any) -> dict[str, Any]:
    """`{"unet.channels": 128, …}` of nested settings of any kind, so that a checkpoint can say by name what differs.

    Lists of more than 32 entries, and arrays, are hashes; other objects are their names.
    """
    return dict(_flat(_plain(settings, qualified_name, _described), ""))


def difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first differing setting of two that are flattened, with both values, in words; None where all agree."""
    name = first_difference(saved, given)
    if name is None:
        return None
    if name not in saved:
        return f"{name} is {given[name]!r} here and not among the saved settings"
    if name not in given:
        return f"{name} was {saved[name]!r} and is not a setting here"
    return f"{name} was {saved[name]!r} and is {given[name]!r} here"


def first_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The name of the first setting that differs, in the order of `given`; None where all agree."""
    names = [*given, *(name for name in saved if name not in given)]
    return next((name for name in names if name not in saved or name not in given or saved[name] != given[name]), None)


def canonical(settings: Any) -> bytes:
    """Settings of any kind as JSON that is the same wherever they are the same, for hashes: classes by their bare
    names, names sorted."""
    values = _plain(settings, lambda cls: cls.__name__, _described)
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def qualified_name(named: Any) -> str:
    """Of a class or function of this package its module's name and its own; of any other, whose module is called
    `__main__` when it is run as a script, its own."""
    ours = named.__module__.startswith(f"{__name__.partition('.')[0]}.")
    return f"{named.__module__}.{named.__qualname__}" if ours else named.__qualname__


def _plain(value: Any, tag: Tag, other: Callable[[Any, Tag], Any]) -> Any:
    """JSON's types. `other`: what becomes of values that are neither settings nor JSON's."""
    if isinstance(value, enum.Enum):
        return {"class": tag(type(value)), "member": value.name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        how = _how(type(value))
        names = [each.name for each in dataclasses.fields(value) if each.name not in how]
        return {"class": tag(type(value)), **{name: _plain(getattr(value, name), tag, other) for name in names}}
    if isinstance(value, tuple | list):
        return [_plain(item, tag, other) for item in value]
    return other(value, tag)


def _refused(value: Any, tag: Tag) -> Any:
    raise ValueError(f"settings of class {type(value).__name__} cannot be written to a file")


def _described(value: Any, tag: Tag) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype | type):  # float32 of numpy, of jax, or as a dtype: all the same
        dtype = np.dtype(value).name
        return dtype if dtype != "object" else qualified_name(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, tag, _described) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return [_plain(item, tag, _described) for item in sorted(value, key=repr)]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    return qualified_name(value if hasattr(value, "__qualname__") else type(value))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value.keys() == {"class", "member"}:
        yield name, f"{value['class']}.{value['member']}"
    elif isinstance(value, dict):
        if "class" in value:
            yield name, value["class"]
        for key, item in value.items():
            if key != "class":
                yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
        yield name, f"{len(value)} values" + f" {digest}" * (len(value) > _SHOWN)
        for index, item in enumerate(value if len(value) <= _SHOWN else ()):
            yield from _flat(item, f"{name}.{index}" if name else str(index))
    else:
        yield name, value


def _how(cls: type) -> set[str]:
    """The fields that say only how something is computed."""
    if not dataclasses.is_dataclass(cls):
        return set()
    return {each.name for each in dataclasses.fields(cls) if each.metadata.get("how")}

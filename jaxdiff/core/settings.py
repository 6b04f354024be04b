"""Settings dataclasses as JSON, for files, comparison and hashes.

In JSON a dataclass is its tag with its fields, an enum member its tag with its name. Fields that affect only the
execution (metadata `how`) are omitted: they may change between runs.

Files use the tags of a closed table (`Table`), which do not change when classes are renamed or moved. Checkpoints
accept any class, by its name, for classes of this package with the module.
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
"""Maximum entries of a list in a file."""
_SHOWN = 32  # entries of a list that are compared one by one; longer ones by their hash

Tag = Callable[[type], str]


@dataclass(frozen=True, eq=False)
class Table:
    """The classes that a settings file may contain, by tag.

    check: called with (class, field, value, where) for each field of a file before the class is constructed.
    check_value: called with (value, where) for each dataclass and enum member from a file. Both raise ValueError that
        names `where`.
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
        """Settings as JSON types; ValueError for a class that `from_json` cannot read back."""
        return _plain(settings, self._tag, _reject)

    def from_json(self, data: Any, where: str) -> Any:
        """The inverse of `to_json`, for data from `core.json_files`; `how` fields keep their defaults. ValueError that
        names `where`, for unknown classes, fields and values."""
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
        ignored = {"class", *(_how(cls) - {"class"})}
        fields = {name: self.from_json(value, where) for name, value in data.items() if name not in ignored}
        self._check_fields(cls, fields, where)
        try:
            value = cls[fields["member"]] if issubclass(cls, enum.Enum) else cls(**fields)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{where}: settings of {tag} that this version does not know ({reason(error)})") from error
        except ValueError as error:  # from the class, without the file's name
            raise ValueError(f"{where}: {reason(error)}") from error
        self.check_value(value, where)
        return value

    def _tag(self, cls: type) -> str:
        if cls not in self._tags:
            raise ValueError(f"settings of class {cls.__name__} cannot be written to a file")
        return self._tags[cls]

    def _check_fields(self, cls: type, fields: dict[str, Any], where: str) -> None:
        """ValueError for a field of the wrong type, or rejected by `check`."""
        hints, every = typing.get_type_hints(cls), typeguard.CollectionCheckStrategy.ALL_ITEMS
        for name, value in fields.items():
            hint = hints.get(name, typing.Any)
            self.check(cls, name, value, where)
            try:
                typeguard.check_type(value, hint, collection_check_strategy=every)
            except typeguard.TypeCheckError as error:
                raise ValueError(f"{where}: {name} of {cls.__name__} is {quoted(value)}: {reason(error)}") from error
            kinds = {hint, *typing.get_args(hint)}
            if isinstance(value, bool) and float in kinds and bool not in kinds:  # in Python, True is the number 1
                raise ValueError(f"{where}: {name} of {cls.__name__} is {value}, it takes only numbers")


def flatten(settings: Any) -> dict[str, Any]:
    """Nested settings of any kind as `{"unet.channels": 128, …}`, to report differences by name.

    Lists of more than 32 entries and arrays become hashes; other objects their names.
    """
    return dict(_flat(_plain(settings, qualified_name, _described), ""))


def difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """A description of the first difference between flattened settings, with both values; None if they are equal."""
    name = first_difference(saved, given)
    if name is None:
        return None
    if name not in saved:
        return f"{name} is {given[name]!r} here and not among the saved settings"
    if name not in given:
        return f"{name} was {saved[name]!r} and is not a setting here"
    return f"{name} was {saved[name]!r} and is {given[name]!r} here"


def first_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The name of the first setting that differs, in the order of `given`; None if they are equal."""
    names = [*given, *(name for name in saved if name not in given)]
    return next((name for name in names if name not in saved or name not in given or saved[name] != given[name]), None)


def canonical(settings: Any) -> bytes:
    """Settings of any kind as canonical JSON, for hashes: classes by their bare names, names sorted."""
    values = _plain(settings, lambda cls: cls.__name__, _described)
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def qualified_name(named: Any) -> str:
    """The name of a class or function, with its module if it is in this package. The module of others is omitted,
    because it is `__main__` when run as a script."""
    ours = named.__module__.startswith(f"{__name__.partition('.')[0]}.")
    return f"{named.__module__}.{named.__qualname__}" if ours else named.__qualname__


def _plain(value: Any, tag: Tag, other: Callable[[Any, Tag], Any]) -> Any:
    """`value` as JSON types. other: converts values that are neither settings nor JSON types."""
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


def _reject(value: Any, tag: Tag) -> Any:
    raise ValueError(f"settings of class {type(value).__name__} cannot be written to a file")


def _described(value: Any, tag: Tag) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype | type):  # numpy's float32, jax's and the dtype are equivalent
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
    """The fields that affect only the execution."""
    if not dataclasses.is_dataclass(cls):
        return set()
    return {each.name for each in dataclasses.fields(cls) if each.metadata.get("how")}

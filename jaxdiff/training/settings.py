"""Settings as flat, JSON-able names and values, so that a checkpoint can say by name which of them differs.

Fields whose metadata say `how` (how something is computed, no part of what is learned) are left out: they may change.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_LONG = 32  # longer sequences are stored as a checksum


def flatten(settings: Any, name: str = "") -> dict[str, Any]:
    """`{"unet.channels": 128, …}` from nested dataclasses, mappings, sequences; other objects by their names."""
    if isinstance(settings, enum.Enum):
        return {name: f"{type(settings).__name__}.{settings.name}"}
    if settings is None or isinstance(settings, bool | int | float | str):
        return {name: settings}
    if isinstance(settings, np.generic):
        return {name: settings.item()}
    if isinstance(settings, np.dtype | type):  # float32 of numpy, of jax, or as a dtype: all the same
        dtype = np.dtype(settings).name
        return {name: dtype if dtype != "object" else f"{settings.__module__}.{settings.__qualname__}"}
    if dataclasses.is_dataclass(settings):
        learned = [field.name for field in dataclasses.fields(settings) if not field.metadata.get("how")]
        fields = {field: getattr(settings, field) for field in learned}
        return {name: type(settings).__name__} | _flatten_all(fields, name)
    if isinstance(settings, Mapping):
        return _flatten_all({str(key): value for key, value in settings.items()}, name)
    if hasattr(settings, "shape") and hasattr(settings, "dtype"):
        array = np.asarray(settings)
        return {name: f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"}
    if isinstance(settings, tuple | list | set | frozenset):
        items = sorted(settings, key=repr) if isinstance(settings, set | frozenset) else settings
        if len(items) > _LONG:
            return {name: f"{len(items)} values {hashlib.sha256(repr(items).encode()).hexdigest()[:16]}"}
        return {name: f"{len(items)} values"} | _flatten_all({str(i): item for i, item in enumerate(items)}, name)
    named = settings if hasattr(settings, "__qualname__") else type(settings)
    return {name: f"{named.__module__}.{named.__qualname__}"}


def difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first differing setting with both values, in words; None where all agree."""
    for name in [*given, *(name for name in saved if name not in given)]:
        if name not in saved:
            return f"{name} is {given[name]!r} here and not among the saved settings"
        if name not in given:
            return f"{name} was {saved[name]!r} and is not a setting here"
        if saved[name] != given[name]:
            return f"{name} was {saved[name]!r} and is {given[name]!r} here"
    return None


def _flatten_all(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat

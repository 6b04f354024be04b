"""Tensors of PyTorch's pickles, read without PyTorch and without executing anything.

A pickle is a program that may call any function by its name. This reader knows a short list of names: tensors become
numpy arrays, modules become records of their attributes, and every other name ends reading. It serves converters, for
public weights that exist in no other form.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.messages import plain, quoted, reason

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
LONGEST_PATH = 64
"""Maximum depth of modules in modules."""


class Record:
    """An object of a pickle: its attributes and nothing else. Arguments of its constructor are ignored."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.state: dict = {}

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, Mapping) else {}


class _UnknownNameError(Exception):
    """A pickle names something that is not on the list."""


class _Kind(NamedTuple):
    """A class of storages."""

    dtype: np.dtype


class _Storage(NamedTuple):
    values: np.ndarray


def read_tensors(path: str | Path, modules: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The parameters and buffers of a file of `torch.save`, by PyTorch's names: of a state dict, of a checkpoint with a
    `state_dict`, or of a pickled module.

    modules: packages whose classes are read as records, besides `torch.nn`. Raises FileNotFoundError; ValueError if the
    file is damaged, of the format before PyTorch 1.6, or names anything but tensors and these classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a file of torch.save since PyTorch 1.6; save it again with a newer PyTorch, as a state dict"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(inner) as stream:
                root = _Unpickler(stream, archive, inner.removesuffix("data.pkl"), tuple(modules)).load()
    except _UnknownNameError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a pickle can make its interpreter raise almost anything
        raise ValueError(f"{path}: a damaged pickle ({reason(error)})") from error
    if isinstance(root, Mapping) and isinstance(root.get("state_dict"), Mapping):
        root = root["state_dict"]
    found: dict[str, np.ndarray] = {}
    _collect(root, (), found, path)
    if not found:
        raise ValueError(f"{path}: no tensors in it")
    return found


def _collect(value: Any, place: tuple[str, ...], found: dict[str, np.ndarray], path: Path) -> None:
    """Add the tensors below a module or a mapping."""
    if len(place) > LONGEST_PATH:
        raise ValueError(f"{path}: modules are nested deeper than {LONGEST_PATH}")
    if isinstance(value, np.ndarray):
        found[".".join(place)] = value
    elif isinstance(value, Record):
        for group in ("_parameters", "_buffers", "_modules"):
            _collect(value.state.get(group), place, found, path)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if isinstance(name, str):
                _collect(each, (*place, name), found, path)


class _Unpickler(pickle.Unpickler):
    """Knows tensors and records alone."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str, modules: tuple[str, ...]) -> None:
        super().__init__(stream)
        self._archive, self._folder, self._modules = archive, folder, modules
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        known: dict[tuple[str, str], Callable | _Kind] = {
            ("collections", "OrderedDict"): dict,
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch", "device"): Record,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return _Kind(np.dtype(STORAGES[name]))
        if any(module == each or module.startswith(f"{each}.") for each in ("torch.nn", *self._modules)):
            return Record
        raise _UnknownNameError(
            f"the pickle names {quoted(f'{module}.{name}')}, neither a tensor nor a known class; nothing was run"
        )

    def persistent_load(self, identity: Any) -> _Storage:
        """A storage of the archive, as it is."""
        tag, kind, key, _, count = identity
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown kind of data")
        if key not in self._storages:
            member = self._archive.getinfo(f"{self._folder}data/{key}")
            if member.file_size != count * kind.dtype.itemsize:  # before it is read: it may be compressed
                raise pickle.UnpicklingError(f"storage {plain(key)} has another size than stated")
            data = self._archive.read(member)
            self._storages[key] = _Storage(np.frombuffer(data, kind.dtype))
        return self._storages[key]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A copy of the part of a storage that a tensor shows."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(each, int) and each >= 0 for each in numbers):
        raise pickle.UnpicklingError("a tensor of an impossible shape")
    values = storage.values
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if 0 in size:
        return np.zeros(size, values.dtype)
    if last >= len(values) or math.prod(size) > len(values):
        raise pickle.UnpicklingError("a tensor beyond its storage")
    steps = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False).copy()


def _parameter(data: Any, *_: Any) -> Any:
    return data

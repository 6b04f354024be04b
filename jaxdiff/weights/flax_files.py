"""Flax's msgpack files (`flax.serialization`), read without executing anything and one tensor at a time.

Such a file is one map of maps, whose leaves are arrays: an extension of type 1 with shape, name of the type, and
bytes. Only this form is read. Tensors are not loaded with the names: `tree.Stored` says where each lies in the file.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.files import replacing
from jaxdiff.core.messages import plain, quoted
from jaxdiff.core.trees import flatten, unflatten
from jaxdiff.weights import hub, tree
from jaxdiff.weights.tree import Stored, Unread

FILE = "flax_model.msgpack"
DEEPEST = 64
"""Maximum nesting of maps."""
MOST = 2**16
"""Maximum number of tensors."""
LONGEST_NAME = 2**10
LARGEST = 2**32 - 2**10
"""An array that is written is smaller, in bytes: msgpack's lengths have 32 bits."""
_ARRAY = 1
"""The type of the extension that holds an array."""
_CHUNKED = "__msgpack_chunked_array__"
_TYPES = {dtype.name: name for name, dtype in tree.TYPES.items()}


class _Kind(NamedTuple):
    """How a value of msgpack begins. mask, bits: of a first byte that holds the length in its other bits; long: for
    other first bytes, how many bytes of the length follow."""

    long: Mapping[int, int]
    mask: int = 0
    bits: int = -1

    def holds(self, first: int) -> bool:
        """Whether the first byte holds the length."""
        return first & self.mask == self.bits

    def begins(self, first: int) -> bool:
        return self.holds(first) or first in self.long


_MAP, _LIST = _Kind({0xDE: 2, 0xDF: 4}, 0xF0, 0x80), _Kind({}, 0xF0, 0x90)
_TEXT, _BYTES = _Kind({0xD9: 1, 0xDA: 2, 0xDB: 4}, 0xE0, 0xA0), _Kind({0xC4: 1, 0xC5: 2, 0xC6: 4})
_NUMBER = _Kind({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}, 0x80, 0x00)
_EXTENSION, _FIXED_EXTENSION = _Kind({0xC7: 1, 0xC8: 2, 0xC9: 4}), {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def read_index(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file, not yet read, by their path joined by "/".

    Raises FileNotFoundError, or ValueError if the file is damaged, or holds anything but maps of arrays. Arrays of more
    than 1 GiB, which Flax stores in pieces, are not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        reader.read_map("", 0)
        if file.tell() != reader.version[0]:
            raise reader.damaged("it goes on after its last tensor")
    if not reader.tensors:
        raise reader.damaged("it holds no tensors")
    return reader.tensors


def load_params(
    tensors: Mapping[str, Unread],
    shapes: dict,
    named: Mapping[str, str],
    dtype: str,
    place: hub.Place,
    where: str,
) -> dict:
    """The parameter tree of `shapes`. named: the name in `tensors` of each leaf; missing or extra tensors are an error.

    Tensors are read one at a time, cast to `dtype` and passed to `place`.
    """
    leaves = flatten(shapes)
    tree.check_stored(tensors, {named[path]: tuple(leaf.shape) for path, leaf in leaves.items()}, where)
    read = ((path, tensors[named[path]].read().astype(jnp.dtype(dtype), copy=False)) for path in leaves)
    return unflatten({path: place(array) for path, array in read})


def write(path: Path, tensors: Mapping[str, Unread], dtype: str | None = None) -> None:
    """Writes tensors by their path joined by "/", atomically; they are read one at a time. dtype: floating ones are
    cast to it; None keeps their type. ValueError for an array of 4 GiB, OSError if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {name: _written(tensor, dtype) for name, tensor in tensors.items()}
    large = [name for name, tensor in tensors.items() if math.prod(tensor.shape) * types[name].itemsize >= LARGEST]
    if large:
        raise ValueError(f"{plain(large[0])} is too large for msgpack, whose arrays are smaller than 4 GiB")
    with tree.saving(path), replacing(path) as temporary, open(temporary, "wb") as file:
        for part in _parts(unflatten({name: (tensor, types[name]) for name, tensor in tensors.items()})):
            file.write(part)


def _written(tensor: Unread, dtype: str | None) -> np.dtype:
    return np.dtype(jnp.dtype(dtype)) if dtype is not None and tensor.dtype in tree.FLOATS else tree.TYPES[tensor.dtype]


def _parts(value: dict | tuple[Unread, np.dtype]) -> Iterator[bytes | memoryview]:
    """The bytes of a map, or of an array: lengths take four bytes, whatever they are."""
    number = lambda first, value: bytes([first]) + value.to_bytes(4, "big")  # noqa: E731
    if isinstance(value, dict):
        yield number(0xDF, len(value))
        for name, inner in value.items():
            yield number(0xDB, len(name.encode())) + name.encode()
            yield from _parts(inner)
        return
    tensor, dtype = value
    array = np.asarray(tensor.read(tree.TYPES).astype(dtype, copy=False), order="C")
    name = dtype.name.encode()
    head = b"\x93" + bytes([0x90 + array.ndim]) + b"".join(number(0xCE, side) for side in array.shape)
    head += number(0xDB, len(name)) + name + number(0xC6, array.nbytes)
    yield number(0xC9, len(head) + array.nbytes) + bytes([_ARRAY]) + head
    yield array.reshape(-1).view(np.uint8).data


class _Reader:
    """A position in a file, and the tensors before it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self.version = tree.file_version(file)
        self._file, self._path = file, path

    def damaged(self, why: str) -> ValueError:
        return ValueError(f"{self._path}: not a msgpack file of Flax (damaged, or of another kind): {why}")

    def read_map(self, prefix: str, depth: int) -> None:
        """A map and all below it. prefix: the path of the map, with a slash at its end."""
        if depth > DEEPEST:
            raise self.damaged(f"maps are nested more than {DEEPEST} levels deep")
        names = set()
        for _ in range(self._length(_MAP, "a map")):
            name = self._text()
            if name == _CHUNKED:
                raise ValueError(f"{self._path}: {plain(prefix)} is an array in pieces of 1 GiB, which are not read")
            if not name or "/" in name or name in names:
                raise self.damaged(f"the name {quoted(prefix + name)} is empty, has a slash, or occurs twice")
            names.add(name)
            first = self._take(1)[0]
            self._file.seek(-1, 1)
            if _MAP.begins(first):
                self.read_map(f"{prefix}{name}/", depth + 1)
            else:
                self._array(prefix + name)

    def _array(self, key: str) -> None:
        first = self._take(1)[0]
        if first in _FIXED_EXTENSION:
            size = _FIXED_EXTENSION[first]
        elif _EXTENSION.begins(first):
            size = int.from_bytes(self._take(_EXTENSION.long[first]))
        else:
            raise self.damaged(f"{quoted(key)} is neither a map nor an array")
        if self._take(1)[0] != _ARRAY:
            raise self.damaged(f"{quoted(key)} is no array")
        end = self._file.tell() + size
        if end > self.version[0] or self._length(_LIST, "an array") != 3:
            raise self.damaged(f"{quoted(key)} is incomplete")
        shape = tuple(self._length(_NUMBER, "a size") for _ in range(self._length(_LIST, "a shape")))
        dtype = self._text()
        if dtype not in _TYPES:
            raise self.damaged(f"{quoted(key)} has the unknown type {quoted(dtype)}")
        count = self._length(_BYTES, "the values")
        start = self._file.tell()
        if start + count != end or count != math.prod(shape) * tree.TYPES[_TYPES[dtype]].itemsize:
            raise self.damaged(f"{quoted(key)} has another size than its shape {quoted(shape)}")
        if len(self.tensors) >= MOST:
            raise self.damaged(f"it holds more than {MOST} tensors")
        self.tensors[key] = Stored(self._path, key, shape, _TYPES[dtype], start, self.version)
        self._file.seek(end)

    def _text(self) -> str:
        length = self._length(_TEXT, "a name")
        if length > LONGEST_NAME:
            raise self.damaged(f"a name of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a name that is not UTF-8") from error

    def _length(self, kind: _Kind, what: str) -> int:
        """A length, or a whole number, of the given kind."""
        first = self._take(1)[0]
        if not kind.begins(first):
            raise self.damaged(f"{what} is missing at byte {self._file.tell() - 1}")
        return first & ~kind.mask if kind.holds(first) else int.from_bytes(self._take(kind.long[first]))

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise self.damaged("it ends in the middle")
        return data

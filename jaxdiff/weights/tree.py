"""Parameter trees in one safetensors file: written atomically, checked by name when read.

A parameter tree is a nested dict of arrays. A leaf's name in the file is its path joined by "/".
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.core.messages import plain, reason
from jaxdiff.core.trees import check_shapes, flatten, listed, of_part, unflatten

PARAMS = "model.safetensors"
"""The file of a model's parameters in a folder."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".msgpack")
FLOATS = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The supported weight types, by safetensors' names: no quantized, integer or complex weights."""
TYPES = FLOATS | {
    "BOOL": np.dtype(bool),
    "C64": np.dtype(np.complex64),
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
}
"""All types that numpy supports."""
LARGEST_HEADER = 2**26
"""Maximum size in bytes of a safetensors header (names, shapes and metadata)."""


def save_tree(path: str | Path, params: dict, metadata: Mapping[str, str], dtype: str | None = None) -> None:
    """Writes `params` and `metadata` to `path` atomically; OSError if writing fails, a full disk included.

    dtype: floating leaves are cast to it ("float32", "bfloat16", "float16"); None keeps their type.
    """
    tensors = {}
    for name, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.dtype(dtype))
        tensors[name] = np.asarray(array, order="C")  # ascontiguousarray would turn a scalar into a vector
    write_safetensors(Path(path), tensors, dict(metadata))


def load_tree(path: str | Path) -> tuple[dict, dict[str, str]]:
    """A nested dict of numpy arrays, in the types of the file, and the file's metadata.

    Raises FileNotFoundError, or ValueError for a pickle or a damaged file.
    """
    stored, metadata = read_header(Path(path))
    params = {name: tensor.read(TYPES) for name, tensor in stored.items()}
    try:
        return unflatten(params), metadata
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_expected(path: str | Path, expected_shapes: dict, part: bool = False) -> dict:
    """`load_tree` of a file with exactly the leaves of `expected_shapes`, all floating. part: it may lack some.

    ValueError if names, shapes or types differ, before any tensor is read.
    """
    stored, _ = read_header(Path(path))
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected_shapes).items()}
    check_stored(stored, of_part(stored.keys(), want) if part else want, str(path))
    return unflatten({name: tensor.read() for name, tensor in stored.items()})


@runtime_checkable
class Unread(Protocol):
    """A tensor that is read when asked: stored in a file (`Stored`), or computed from others (`weights/lazy.py`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Of `TYPES`."""

    def read(self, types: Collection[str] = FLOATS) -> np.ndarray: ...


class Stored(NamedTuple):
    """A tensor not yet read. start: its first byte in the file. version: the file's size in bytes and modification time
    when its header was read."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    version: tuple[int, int]

    def read(self, types: Collection[str] = FLOATS) -> np.ndarray:
        """Read the tensor in its stored type; ValueError if that is not one of `types`.

        Nothing stays mapped or open, so pages of the file do not stay in memory.
        """
        if self.dtype not in types:
            raise ValueError(f"{self.file}: {plain(self.key)} holds {plain(self.dtype)}, only {_list(types)} are read")
        dtype = TYPES[self.dtype]
        size = math.prod(self.shape) * dtype.itemsize
        with open(self.file, "rb") as file:
            if file_version(file) != self.version:
                raise ValueError(f"{self.file} was changed while it was read: load it again")
            file.seek(self.start)
            read = np.fromfile(file, np.uint8, size)
        return read.view(dtype).reshape(self.shape)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, not yet read, and its metadata. The header is parsed once for all tensors.

    Raises FileNotFoundError, or ValueError for a pickle or a damaged file.
    """
    with _open_safetensors(path):  # checks that the tensors are contiguous and fill the file
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{path} has a header of {length} bytes: more than {LARGEST_HEADER} are not read")
        header = json_files.parse_object(file.read(length), str(path), "the header of safetensors", LARGEST_HEADER)
        version = file_version(file)
    metadata = header.pop("__metadata__", None) or {}
    try:
        tensors = {
            key: Stored(
                path, key, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0], version
            )
            for key, entry in header.items()
        }
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a complete safetensors file (damaged): {reason(error)}") from error
    return tensors, metadata


def file_version(file) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def check_stored(stored: Mapping[str, Unread], want: Mapping[str, tuple], where: str) -> None:
    """`check_shapes` of unread tensors; also ValueError if one is not floating."""
    check_shapes({key: tensor.shape for key, tensor in stored.items()}, want, where)
    others = sorted(key for key, tensor in stored.items() if tensor.dtype not in FLOATS)
    if others:
        wrong = listed("of another type", others, lambda key: f"{plain(key)} holds {plain(stored[key].dtype)}")
        raise ValueError(f"{where} has {wrong}: only {_list(FLOATS)} are read")


def _open_safetensors(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    refuse_pickle(path)
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file (truncated or damaged): {reason(error)}"
        ) from error


def refuse_pickle(path: Path) -> None:
    """ValueError if `path` is a pickle, by its name or first bytes: reading one can run any code."""
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file starts with eight bytes of header length, then the JSON header.
    starts = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:] != b"{"
    if path.suffix in PICKLES or starts:
        raise ValueError(
            f"{path} is a pickle, which can run code when read; convert it once where you trust it: "
            'python -c "import torch, safetensors.torch as s; '
            f"t = torch.load('{path}', map_location='cpu', weights_only=True); t = t.get('state_dict', t); "
            "t = {k: v.contiguous().clone() for k, v in t.items() if torch.is_tensor(v)}; "
            f"s.save_file(t, '{_converted(path)}')\""
        )


def _converted(path: Path) -> Path:
    """The name of a converted pickle: the one that transformers and diffusers give, or that of a single file."""
    return path.with_suffix(".safetensors") if path.suffix == ".ckpt" else path.with_name(PARAMS)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes beside `path`, then renames. A failure leaves no temporary file and keeps an older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(path, sum(tensor.nbytes for tensor in tensors.values()))
    with saving(path), replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def write_unread(path: Path, tensors: Mapping[str, Unread], metadata: Mapping[str, str]) -> None:
    """`write_safetensors` of tensors that are read one at a time: memory holds the largest, not all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    tensors = dict(sorted(tensors.items(), key=lambda named: (-TYPES[named[1].dtype].itemsize, named[0])))  # aligned
    for key, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * TYPES[tensor.dtype].itemsize
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data is aligned to eight bytes
    _check_space(path, len(encoded) + end)
    with saving(path), replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, tensor in tensors.items():
            array = tensor.read(TYPES)
            if array.shape != tuple(tensor.shape) or array.dtype != TYPES[tensor.dtype]:
                raise ValueError(f"{plain(key)} is {array.dtype} {array.shape}, not {tensor.dtype} {tensor.shape}")
            file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"cannot save {path}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free on the disk")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns failures in the block into a one-line OSError that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot save {path}: {error}") from error


def _list(types: Collection[str]) -> str:
    return ", ".join(types)

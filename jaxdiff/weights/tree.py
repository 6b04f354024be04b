"""Plain parameter trees in one safetensors file: written whole or not at all, read and checked by name.

A parameter tree is a nested dict of arrays. In the file a leaf's name is its path joined by "/".
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".msgpack")


def save_tree(path: str | Path, params: dict, metadata: Mapping[str, str], dtype: str | None = None) -> None:
    """Writes `params` and `metadata` to `path`; floating leaves are cast to `dtype` ("float32", "bfloat16", "float16").

    The file appears complete under its name or not at all. Raises OSError in one line, a full disk included.
    """
    tensors = {}
    for name, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.dtype(dtype))
        tensors[name] = np.ascontiguousarray(array)
    write_safetensors(Path(path), tensors, dict(metadata))


def load_tree(path: str | Path) -> tuple[dict, dict[str, str]]:
    """Nested dict of numpy arrays, in the types of the file, and its metadata.

    Raises FileNotFoundError, or ValueError for a pickle or a damaged file.
    """
    with open_safetensors(Path(path)) as file:
        flat = {name: _read(file, name, path) for name in file.keys()}  # noqa: SIM118
        return unflatten(flat), dict(file.metadata() or {})


def load_expected(path: str | Path, expected_shapes: dict) -> dict:
    """`load_tree` of a file that must hold exactly the leaves of `expected_shapes`, compared before any is read."""
    with open_safetensors(Path(path)) as file:
        have = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_shapes(have, {name: tuple(leaf.shape) for name, leaf in flatten(expected_shapes).items()}, str(path))
        return unflatten({name: _read(file, name, path) for name in have})


def check_tree(params: dict, expected_shapes: dict, where: str) -> None:
    """Raises ValueError unless `params` has exactly the leaves of `expected_shapes` (arrays or shape structs).

    The message names `where` the parameters came from, and the first ten leaves missing, unexpected and misshapen.
    """
    have = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected_shapes).items()}
    check_shapes(have, want, where)


def check_shapes(have: Mapping[str, tuple], want: Mapping[str, tuple], where: str) -> None:
    """`check_tree` for names and shapes alone, so that a file can be checked before a tensor of it is read."""
    problems = [
        _listed("missing", sorted(want.keys() - have.keys())),
        _listed("unexpected", sorted(have.keys() - want.keys())),
        _listed(
            "of another shape",
            [f"{k} {have[k]}, not {want[k]}" for k in sorted(want.keys() & have.keys()) if have[k] != want[k]],
        ),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"{where} does not fit the settings: {'; '.join(problems)}")


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """{"a": {"b": leaf}} → {"a/b": leaf}, in sorted order. ValueError for a name that holds a slash."""
    flat = {}
    for name in sorted(tree):
        if "/" in name:
            raise ValueError(f"parameter name {prefix}{name!r} holds a slash, which separates levels")
        value = tree[name]
        flat.update(flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def unflatten(flat: Mapping) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def open_safetensors(path: Path):
    """An open safetensors file for reading tensor by tensor (a context manager). A pickle is refused, never read."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    refuse_pickle(path)
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from error


def _read(file, name: str, path: str | Path) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError as error:  # of eight bits, say
        raise ValueError(f"{path}: {name} holds {file.get_slice(name).get_dtype()}, which numpy has not") from error


def refuse_pickle(path: Path) -> None:
    """Raises ValueError where `path` is a pickle, by its name or by its first bytes: reading one can run any code."""
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of its header, any eight bytes, and the header, which is JSON.
    starts = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:] != b"{"
    if path.suffix in PICKLES or starts:
        raise ValueError(
            f"{path} is a pickle, which can run code when read; convert it once where you trust it: "
            'python -c "import torch, safetensors.torch as s; '
            f"t = torch.load('{path}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.clone() for k, v in t.items()}}, '{path.with_name('model.safetensors')}')\""
        )


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes beside `path`, then renames. On any failure nothing is left behind and an older file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"cannot save {path}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free on the disk")
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; afterwards it takes its place, or on any failure it vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable to their owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot save {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", …" if len(names) > 10 else ""
    return f"{len(names)} {what} ({', '.join(names[:10])}{more})"

"""Reading and writing public checkpoints: hub ids, config.json, sharded safetensors, PyTorch's tensor layouts.

A model family (`weights/t5.py`, `weights/clip.py`) defines its tensor names by a table of rules. This module locates
the tensors, checks that names and shapes match exactly, and reads them one by one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args

import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Array

from jaxdiff.core import files, json_files, trees
from jaxdiff.core.messages import plain, quoted
from jaxdiff.weights import sizes, tree
from jaxdiff.weights.tree import Stored, Unread

SETTINGS = ("*.json", "*spiece.model", "*merges.txt")
"""Patterns of the files downloaded with the weights, from any folder of a repository."""
STEMS = ("model", "diffusion_pytorch_model")
"""Names of weight files in transformers and diffusers."""

Place = Callable[[np.ndarray], Array]
"""Puts an array on its devices."""
Dtype = Literal["float32", "bfloat16"]
"""Types that parameters can be loaded in."""


def directory_of(
    path_or_id: str | Path, what: str = "weights", *, folders: tuple[str, ...] = ("",), variant: str | None = None
) -> Path:
    """A directory is returned unchanged; a hub id (`id` or `id@revision`) is downloaded, and its snapshot returned.

    folders: the folders with the needed weights, "" for the top. variant: "fp16" for the files of that name; None for
    files without a variant or, if the repository has none, any. With HF_HUB_OFFLINE=1 only the download cache is used.
    Raises FileNotFoundError, or ValueError if the download fails.
    """
    text = str(path_or_id)
    hub_id, _, revision = text.partition("@")
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if isinstance(path_or_id, Path) or text.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FileNotFoundError(f"no {what} at {text}: not a directory")
    for names in (_files(variant), ["*.safetensors"] if variant is None else []):
        wanted = [f"{folder}/{name}" if folder else name for folder in folders for name in names]
        try:
            snapshot = snapshot_download(hub_id, revision=revision or None, allow_patterns=[*SETTINGS, *wanted])
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = plain(str(error), 2000)  # instructions (accept a licence, log in) are at its end
            raise ValueError(f"{text} is not a directory, and could not be downloaded as a hub id: {reason}") from error
        if all(any((Path(snapshot) / folder).glob("*.safetensors")) for folder in folders):
            return Path(snapshot)
    of_variant = f" of the variant {variant}" if variant else ""
    raise ValueError(
        f"{text} holds no safetensors{of_variant}; pickles are not read. Use a revision that has safetensors "
        f"({hub_id}@refs/pr/N), or convert a copy that you trust and pass its directory"
    )


def _files(variant: str | None) -> list[str]:
    """Patterns for checkpoint files: single or sharded, with the shard number before or after the variant."""
    mark, number = f".{variant}" if variant else "", "-?????-of-?????"
    names = (f"{mark}.safetensors", f"{mark}{number}.safetensors", f"{number}{mark}.safetensors")
    return [stem + name for stem in STEMS for name in dict.fromkeys(names)]


def check_dtype(dtype: str) -> Dtype:
    """Returns `dtype`; ValueError unless it is "float32" or "bfloat16"."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    return cast(Dtype, dtype)


def read_json(path: Path, what: str = "weights") -> dict[str, Any]:
    """Read a config.json. Raises FileNotFoundError, or ValueError unless it is a JSON object of moderate size."""
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path.parent}: {path.name} is missing")
    return json_files.read_object(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """The inverse of `read_json`, atomic. OSError if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tree.saving(path):
        files.write_json(path, values)


def require(path: Path, values: Mapping, name: str, allowed: tuple, default: Any = None) -> None:
    """ValueError, naming the setting, if its value is not in `allowed`."""
    value = values.get(name, default)
    if value not in allowed:
        raise ValueError(f"{path}: {name} = {quoted(value)} is not supported, only {' or '.join(map(repr, allowed))}")


class Group(NamedTuple):
    """A group of settings in a config.json. Methods raise ValueError with the setting's full name if it is invalid."""

    path: Path
    values: dict[str, Any]
    name: str = ""

    def group(self, name: str) -> "Group":
        """A nested group. `{name}_dict`, from older transformers versions, replaces it entirely."""
        values = self.values.get(f"{name}_dict")
        name = name if values is None else f"{name}_dict"
        values = self.values.get(name)
        if not isinstance(values, dict | None):
            raise ValueError(f"{self.path}: {name} is not a group of settings")
        return Group(self.path, values or {}, f"{name}.")

    def require(self, name: str, allowed: tuple, default: Any = None) -> None:
        require(self.path, {self.name + name: self.values.get(name, default)}, self.name + name, allowed)

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = sizes.SIZE.most) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, value, f"a whole number from {least} to {most}")
        return value

    def fraction(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) is not float or not 0 < value < 1:
            raise self.error(name, value, "a number between 0 and 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def error(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.path}: {self.name}{name} = {quoted(value)} is not supported, only {wanted}")


def open_tensors(directory: Path, variant: str | None = None) -> dict[str, Stored]:
    """All tensors of a checkpoint, not yet read, from its single file or the shards in its index.

    variant: as in `directory_of`. Raises FileNotFoundError, or ValueError for pickles and damaged files or indices.
    """
    single, index = _single_or_index(directory, variant)
    if single is not None:
        return tree.read_header(single)[0]
    listed = json_files.read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is not an index of shards: it has no weight_map")
    outside = [name for name in listed.values() if not _is_file_name(name)]
    if outside:
        raise ValueError(f"{index} lists {quoted(outside[0])}, which is not the name of a file beside it")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        stored = tree.read_header(directory / name)[0]
        # If a tensor is in two shards, the index decides.
        tensors |= {key: tensor for key, tensor in stored.items() if listed.get(key, name) == name}
    lost = sorted(listed.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{index} lists {len(lost)} tensors that its shards lack ({sizes.names(lost)})")
    return tensors


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.isprintable() and len(name.encode()) <= 255


def _single_or_index(directory: Path, variant: str | None) -> tuple[Path | None, Path]:
    """The single weights file or None, and the path of the index of shards."""
    for mark in (f".{variant}",) if variant else ("", ".fp16", ".bf16"):
        for stem in STEMS:
            single = directory / f"{stem}{mark}.safetensors"
            index = directory / f"{stem}.safetensors.index{mark}.json"
            if single.is_file() or index.is_file():
                return single if single.is_file() else None, index
    for pickle in sorted(directory.glob("*.bin")):
        tree.refuse_pickle(pickle)
    names = " nor ".join(f"{stem}{f'.{variant}' if variant else ''}.safetensors" for stem in STEMS)
    raise FileNotFoundError(f"no weights at {directory}: neither {names}, nor an index of shards")


def names(
    paths: Iterable[str], rules: Iterable[tuple[str, str]], words: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Maps each of our parameter paths to its public name, by the first matching rule.

    A rule is our path with {fields}, each matching within one path component, and the public name with the same
    fields; `words` translates field values. ("norm/{leaf}", "layer_norm.{leaf}") with {"scale": "weight"} maps
    "norm/scale" to "layer_norm.weight". ValueError if a path matches no rule or two paths get the same name.
    """
    compiled = [(re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+?)", re.escape(ours))), to) for ours, to in rules]
    renamed: dict[str, str] = {}
    for path in paths:
        fits = ((match, to) for pattern, to in compiled if (match := pattern.fullmatch(path)))
        match, to = next(fits, (None, ""))
        if match is None:
            raise ValueError(f"no rule names {path}")
        renamed[path] = to.format(**{field: words.get(word, word) for field, word in match.groupdict().items()})
    if len(set(renamed.values())) < len(renamed):
        raise ValueError("two parameters have the same name")
    return renamed


def load_params(
    tensors: Mapping[str, Unread], shapes: dict, named: Mapping[str, str], dtype: str, place: Place, where: str
) -> dict:
    """The parameter tree of `shapes`. named: the name in `tensors` of each leaf; missing or extra tensors are an error.

    Tensors are read one at a time, cast to `dtype` and passed to `place`.
    """
    leaves = trees.flatten(shapes)
    want = {named[path]: theirs_shape(path, leaf.shape) for path, leaf in leaves.items()}
    tree.check_stored(tensors, want, where)
    read = ((path, tensors[named[path]].read().astype(jnp.dtype(dtype), copy=False)) for path in leaves)
    return trees.unflatten({path: place(ours(path, array)) for path, array in read})


def write_params(path: Path, params: dict, named: Mapping[str, str], dtype: str) -> None:
    """The inverse of `load_params`: writes one file atomically. OSError if writing fails."""
    leaves = trees.flatten(params).items()
    tensors = {named[name]: theirs(name, np.asarray(leaf).astype(jnp.dtype(dtype))) for name, leaf in leaves}
    tree.write_safetensors(path, tensors, {"format": "pt"})


def ours(path: str, array: np.ndarray) -> np.ndarray:
    """PyTorch layout to Flax layout: (out, in) → (in, out); for convolutions (out, in, h, w) → (h, w, in, out)."""
    if not path.endswith("kernel"):
        return array
    return _transposed(array) if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 3, 1, 0))


def _transposed(array: np.ndarray) -> np.ndarray:
    """Transpose a few rows at a time: numpy's full copy misses the cache at each element and is four times slower."""
    result = np.empty(array.shape[::-1], array.dtype)
    for row in range(0, len(array), 32):
        result[:, row : row + 32] = array[row : row + 32].T
    return result


def theirs(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `ours`."""
    if path.endswith("kernel"):
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return np.asarray(array, order="C")  # ascontiguousarray would turn a scalar into a vector


def theirs_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `theirs` for an array of `shape`."""
    if not path.endswith("kernel"):
        return tuple(shape)
    return tuple(shape[::-1]) if len(shape) == 2 else tuple(shape[i] for i in (3, 2, 0, 1))

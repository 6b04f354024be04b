"""What public checkpoints have in common: a folder or hub id, config.json, safetensors in shards, PyTorch's layouts.

A family (`weights/t5.py`, `weights/clip.py`) says what its tensors are called, by a table of rules; here they are
found, accounted for, read one by one and written.
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
from jaxdiff.weights.tree import Stored

SETTINGS = ("*.json", "*spiece.model", "*merges.txt")
"""The files of a hub id, in any of its folders, that are downloaded beside weights."""
STEMS = ("model", "diffusion_pytorch_model")
"""What transformers and diffusers call their files of weights."""

Place = Callable[[np.ndarray], Array]
"""Puts an array on its devices."""
Dtype = Literal["float32", "bfloat16"]
"""What parameters are loaded in."""


def directory_of(
    path_or_id: str | Path, what: str = "weights", *, folders: tuple[str, ...] = ("",), variant: str | None = None
) -> Path:
    """A directory as it is; a hub id (`id@revision` for another than main) as its downloaded snapshot.

    `folders`: where the weights are that are wanted, "" for the top. `variant`: "fp16" for the files of that name; None
    for those without one or, where a repository has none of them, for what it has. With HF_HUB_OFFLINE=1 only what was
    downloaded before is found. FileNotFoundError, or ValueError in one line where nothing can be downloaded.
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
            reason = plain(str(error), 2000)  # what to do (accept a licence, log in) stands at its end
            raise ValueError(f"{text} is no directory, and no hub id that could be downloaded: {reason}") from error
        if all(any((Path(snapshot) / folder).glob("*.safetensors")) for folder in folders):
            return Path(snapshot)
    of_variant = f" of the variant {variant}" if variant else ""
    raise ValueError(
        f"{text} holds no safetensors{of_variant}, only pickles perhaps, which are not read: name a revision that has "
        f"them ({hub_id}@refs/pr/N), or convert a copy that you trust and give its directory"
    )


def _files(variant: str | None) -> list[str]:
    """Patterns of the names that a checkpoint has: in one file or in shards, numbered before or behind the variant."""
    mark, number = f".{variant}" if variant else "", "-?????-of-?????"
    names = (f"{mark}.safetensors", f"{mark}{number}.safetensors", f"{number}{mark}.safetensors")
    return [stem + name for stem in STEMS for name in dict.fromkeys(names)]


def check_dtype(dtype: str) -> Dtype:
    """The type itself; ValueError for one that parameters are not loaded in."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    return cast(Dtype, dtype)


def read_json(path: Path, what: str = "weights") -> dict[str, Any]:
    """The settings in a config.json. FileNotFoundError, or ValueError where it is no JSON object of moderate size."""
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path.parent}: {path.name} is missing")
    return json_files.read_object(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """The inverse of `read_json`; the file appears whole or not at all (OSError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tree.saving(path):
        files.write_json(path, values)


def require(path: Path, values: Mapping, name: str, allowed: tuple, default: Any = None) -> None:
    """ValueError that names a setting whose value is not supported."""
    value = values.get(name, default)
    if value not in allowed:
        raise ValueError(f"{path}: {name} = {quoted(value)} is not supported, only {' or '.join(map(repr, allowed))}")


class Group(NamedTuple):
    """A group of settings in a config.json; what is wrong with one is a ValueError that gives the name it has there."""

    path: Path
    values: dict[str, Any]
    name: str = ""

    def group(self, name: str) -> "Group":
        """A group in this one. What transformers calls its `_dict` is from older versions, and replaces all of it."""
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
    """Every tensor of a checkpoint, unread: of its one file, or of the shards that its index lists.

    `variant` as in `directory_of`. FileNotFoundError, or ValueError for pickles, damaged files and indices.
    """
    single, index = _single_or_index(directory, variant)
    if single is not None:
        return tree.read_header(single)[0]
    listed = json_files.read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is not an index of shards: it has no weight_map")
    outside = [name for name in listed.values() if not _is_file_name(name)]
    if outside:
        raise ValueError(f"{index} lists {quoted(outside[0])}, which is no file beside it")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        stored = tree.read_header(directory / name)[0]
        # Of a tensor that is in two shards, the one counts that the index gives.
        tensors |= {key: tensor for key, tensor in stored.items() if listed.get(key, name) == name}
    lost = sorted(listed.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{index} lists {len(lost)} tensors that its shards lack ({sizes.names(lost)})")
    return tensors


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.isprintable() and len(name.encode()) <= 255


def _single_or_index(directory: Path, variant: str | None) -> tuple[Path | None, Path]:
    """The one file of weights, or None and the index of several."""
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
    """Their name of each of our parameters, by the first rule that fits its path.

    A rule is a path with {fields}, each a part of one name, and their name with the same fields; what a field stands
    for is exchanged by `words`. ("norm/{leaf}", "layer_norm.{leaf}") with {"scale": "weight"} makes "norm/scale"
    "layer_norm.weight". Raises ValueError for a path without a rule, and where two have one name.
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
        raise ValueError("two parameters have one name")
    return renamed


def load_params(
    tensors: Mapping[str, Stored], shapes: dict, named: Mapping[str, str], dtype: str, place: Place, where: str
) -> dict:
    """The parameter tree of `shapes`, whose leaves are `named` so in `tensors`; none may be missing or left over.

    Tensors are read one at a time, cast to `dtype` and handed to `place`.
    """
    leaves = trees.flatten(shapes)
    want = {named[path]: theirs_shape(path, leaf.shape) for path, leaf in leaves.items()}
    tree.check_stored(tensors, want, where)
    read = ((path, tensors[named[path]].read().astype(jnp.dtype(dtype), copy=False)) for path in leaves)
    return trees.unflatten({path: place(ours(path, array)) for path, array in read})


def write_params(path: Path, params: dict, named: Mapping[str, str], dtype: str) -> None:
    """The inverse of `load_params`, into one file, which appears whole or not at all (OSError)."""
    leaves = trees.flatten(params).items()
    tensors = {named[name]: theirs(name, np.asarray(leaf).astype(jnp.dtype(dtype))) for name, leaf in leaves}
    tree.write_safetensors(path, tensors, {"format": "pt"})


def ours(path: str, array: np.ndarray) -> np.ndarray:
    """A tensor of PyTorch as Flax has it: (out, in) → (in, out); of a convolution (out, in, h, w) → (h, w, in, out)."""
    if not path.endswith("kernel"):
        return array
    return _transposed(array) if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 3, 1, 0))


def _transposed(array: np.ndarray) -> np.ndarray:
    """A few rows at a time: numpy's copy of the whole misses the cache at each number, and takes four times as long."""
    result = np.empty(array.shape[::-1], array.dtype)
    for row in range(0, len(array), 32):
        result[:, row : row + 32] = array[row : row + 32].T
    return result


def theirs(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `ours`."""
    if path.endswith("kernel"):
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return np.asarray(array, order="C")  # ascontiguousarray would make a vector of a scalar


def theirs_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`theirs` of a shape."""
    if not path.endswith("kernel"):
        return tuple(shape)
    return tuple(shape[::-1]) if len(shape) == 2 else tuple(shape[i] for i in (3, 2, 0, 1))

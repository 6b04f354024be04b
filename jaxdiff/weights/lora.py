"""LoRA files of diffusers, PEFT and kohya's scripts ⇄ the trees of `models/lora.py`.

All formats hold the same: for some modules down (r in) and up (out r), and alpha in a tensor, in the metadata, or not
at all, when it is the rank. Their keys are in `weights/lora_names.py`.
"""

import enum
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core import trees
from jaxdiff.core.messages import plain, quoted
from jaxdiff.models import lora
from jaxdiff.models.lora import MODEL
from jaxdiff.weights import hub, lora_config, lora_families, sizes, tree
from jaxdiff.weights.lora_names import Component, Networks, Part, components, parse, unsupported
from jaxdiff.weights.tree import Stored

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of LoRA files in folders: diffusers', PEFT's."""


class Layout(enum.Enum):
    """The layout of a written file.

    DIFFUSERS: the layout of diffusers and PEFT; alpha is in the metadata. Programs that do not read the metadata take
    alpha as the rank. KOHYA: that of kohya's scripts, with diffusers' names of modules; alpha is in tensors. KOHYA_SGM:
    with the names of single files, as kohya's scripts write for SDXL.
    """

    DIFFUSERS = enum.auto()
    KOHYA = enum.auto()
    KOHYA_SGM = enum.auto()


def load(
    path_or_id: str | Path,
    networks: Networks,
    dtype: str = "float32",
    *,
    strict: bool = False,
    place: hub.Place = jnp.asarray,
) -> dict[str, dict]:
    """The LoRAs of a file, or of the LoRA file of a folder or hub id, by network: "model", "text", "text_2"
    (`models.lora`). Networks without a tensor are absent.

    Tensors of no given network are named in one warning; strict: they are a ValueError. Raises FileNotFoundError, or
    ValueError for another algorithm than LoRA, tensors that do not fit the network, or a file with none that do.
    """
    file = _file(path_or_id)
    tensors, metadata = tree.read_header(file)
    known = components(networks)
    for key in tensors:
        algorithm = unsupported(key)
        if algorithm:
            raise ValueError(f"{file} holds {algorithm} ({plain(key)}), only LoRA is supported")
    pairs, others = _assigned(tensors, known, file)
    origin = lora_families.described(tensors, metadata)
    if not pairs:
        raise ValueError(f"{file} has no LoRA of this network: {_listed(tensors, others)}{origin}")
    configs = lora_config.read(file, metadata)
    _check(pairs, known, f"{file}", origin)
    if others:
        message = f"{file}: {_listed(tensors, others)}"
        if strict:
            raise ValueError(message + origin)
        warnings.warn(message, stacklevel=2)
    result: dict[str, dict] = {}
    for (name, kernel), pair in sorted(pairs.items()):
        component = known[name]
        alpha = _alpha(pair, configs.get(name), component.modules[kernel])
        read = {part: _read(tensor, kernel, part, component).astype(jnp.dtype(dtype)) for part, tensor in _both(pair)}
        leaves = {part.name.lower(): place(hub.ours("kernel", array)) for part, array in read.items()}
        leaves["alpha"] = place(np.asarray(alpha, np.float32))
        result.setdefault(name, {}).update({f"{kernel}/{leaf}": value for leaf, value in leaves.items()})
    return {name: trees.unflatten(flat) for name, flat in result.items()}


_Pair = dict[Part, Stored]
_Pairs = dict[tuple[str, str], _Pair]
"""The tensors of each kernel, by its network and path."""


def _file(path_or_id: str | Path) -> Path:
    """The LoRA file of a folder or hub id; the path of a file is returned unchanged."""
    path = Path(path_or_id)
    if not path.exists() and path.suffix not in (".safetensors", *tree.PICKLES):
        path = hub.directory_of(path_or_id, "LoRA")
    if not path.is_dir():
        return path
    named = [path / name for name in FILES if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) == 1 or named:
        return found[0]
    if not found:
        for pickle in sorted([*path.glob("*.bin"), *path.glob("*.pt")]):
            tree.refuse_pickle(pickle)
        raise FileNotFoundError(f"no LoRA at {path}: neither {' nor '.join(FILES)}")
    raise ValueError(f"{path} holds {len(found)} files ({sizes.names([f.name for f in found])}): pass one of them")


def _assigned(tensors: Mapping[str, Stored], known: Mapping[str, Component], file: Path) -> tuple[_Pairs, list[str]]:
    """The tensors of each kernel, and the other keys. ValueError if two tensors are the same part of a module, or if a
    name without a prefix fits several networks."""
    pairs: _Pairs = {}
    others = []
    for key, tensor in tensors.items():
        parsed = parse(key)
        names = [] if parsed is None else list(known) if parsed.network is None else [parsed.network]
        fits = [(name, known[name].path(parsed.module)) for name in names if parsed and name in known]
        fitting = [(name, path) for name, path in fits if path is not None]
        if len(fitting) > 1:
            raise ValueError(
                f"{file}: {plain(key)} may be of {' or '.join(name for name, _ in fitting)}: load it for one of them"
            )
        if parsed is None or not fitting:
            others.append(key)
        elif parsed.part in pairs.setdefault(fitting[0], {}):
            twin = pairs[fitting[0]][parsed.part].key
            raise ValueError(f"{file}: {plain(key)} and {plain(twin)} are the same tensor of a module")
        else:
            pairs[fitting[0]][parsed.part] = tensor
    # An alpha alone is of no use.
    alone = [where for where, pair in pairs.items() if set(pair) == {Part.ALPHA}]
    return {w: p for w, p in pairs.items() if w not in alone}, others + [pairs[w][Part.ALPHA].key for w in alone]


def _listed(tensors: Mapping[str, Stored], others: list[str]) -> str:
    return f"{len(others)} of {len(tensors)} tensors are not used ({sizes.names(sorted(others))})"


def _both(pair: _Pair) -> list[tuple[Part, Stored]]:
    return [(part, pair[part]) for part in (Part.DOWN, Part.UP)]


def _check(pairs: _Pairs, known: Mapping[str, Component], where: str, origin: str) -> None:
    """ValueError for a module with one of two tensors, or with shapes that do not fit the network."""
    wrong = []
    for (name, kernel), pair in pairs.items():
        module = known[name].modules[kernel]
        for part in (Part.DOWN, Part.UP):
            if part not in pair:
                raise ValueError(f"{where}: {module} has no {part.name.lower()} tensor")
        for tensor in pair.values():
            if tensor.dtype not in tree.FLOATS and not (tensor is pair.get(Part.ALPHA) and tensor.dtype in tree.TYPES):
                raise ValueError(f"{where}: {plain(tensor.key)} holds {plain(tensor.dtype)}, only floats are read")
        down, up = (tuple(tensor.shape) for _, tensor in _both(pair))
        rank = down[0] if down else 0
        wanted = _shapes(known[name].kernels[kernel], rank)
        if not rank or any(_trimmed(have) != _trimmed(want) for have, want in zip((down, up), wanted)):
            wrong.append((module, down, up, hub.theirs_shape("kernel", known[name].kernels[kernel])))
        if Part.ALPHA in pair and math.prod(pair[Part.ALPHA].shape) != 1:
            raise ValueError(f"{where}: {plain(pair[Part.ALPHA].key)} is not one number")
    if wrong:
        module, down, up, weight = wrong[0]
        more = f", nor do {len(wrong) - 1} others theirs" if len(wrong) > 1 else ""
        raise ValueError(
            f"{where}: {module} has down {quoted(down)} and up {quoted(up)}, which do not fit this network's weight "
            f"{weight}{more}{origin}"
        )


def _shapes(kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of down and up in files, for a kernel's shape (ours)."""
    out, width, *sides = hub.theirs_shape("kernel", kernel)
    return (rank, width, *sides), (out, rank, *(1 for _ in sides))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1×1 convolution as a matrix: files have either for either."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _read(tensor: Stored, kernel: str, part: Part, component: Component) -> np.ndarray:
    """In the shape that fits the kernel, in PyTorch's layout."""
    rank = tensor.shape[0 if part is Part.DOWN else 1]
    down, up = _shapes(component.kernels[kernel], rank)
    return tensor.read().reshape(down if part is Part.DOWN else up)


def _alpha(pair: _Pair, config: lora_config.Config | None, module: str) -> float:
    """From its tensor, else from the metadata, else the rank."""
    rank = pair[Part.DOWN].shape[0]
    if Part.ALPHA not in pair:
        return float(rank) if config is None else config.alpha(module, rank)
    tensor = pair[Part.ALPHA]
    alpha = float(tensor.read(tree.TYPES).astype(np.float64).reshape(()))
    if not math.isfinite(alpha):
        raise ValueError(f"{tensor.file}: {plain(tensor.key)} is {alpha}")
    return alpha or float(rank)  # kohya's scripts take 0 as the rank


class _Written(NamedTuple):
    """A module to write: its network, its names, the tensors in PyTorch's layout, alpha."""

    network: str
    module: str
    single_file: str | None
    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def export(
    loras: Mapping[str, Mapping],
    networks: Networks,
    path: str | Path,
    layout: Layout = Layout.DIFFUSERS,
    dtype: str = "float32",
) -> None:
    """Writes LoRAs, by network as `load` returns them, to one safetensors file, atomically.

    dtype: "float32", "float16" or "bfloat16". ValueError if they do not fit the networks or the layout, OSError if
    writing fails.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA is written to a file named .safetensors")
    modules = _written(loras, components(networks), dtype)
    if not modules:
        raise ValueError("no LoRA to export")
    if layout is Layout.DIFFUSERS:
        tensors, metadata = _diffusers(modules)
    else:
        tensors, metadata = _kohya(modules, networks, layout is Layout.KOHYA_SGM)
    tree.write_safetensors(path, tensors, {"format": "pt"} | metadata)


def _written(loras: Mapping[str, Mapping], known: Mapping[str, Component], dtype: str) -> list[_Written]:
    """Every module. ValueError if one does not fit."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    result = []
    for name, flat in loras.items():
        if name not in known:
            raise ValueError(f"a LoRA of {quoted(name)}, but the networks are {', '.join(known)}")
        component = known[name]
        for kernel, module in lora.modules(flat).items():
            lora.check_module(kernel, module, component.kernels.get(kernel))
            down, up = (
                hub.theirs("kernel", np.asarray(module[part]).astype(jnp.dtype(dtype))) for part in ("down", "up")
            )
            names = component.modules[kernel], component.single_file.get(kernel)
            result.append(_Written(name, *names, down, up, float(module["alpha"])))
    return result


_PREFIX = {MODEL: "unet", lora.TEXT[0]: "text_encoder", lora.TEXT[1]: "text_encoder_2"}
_PARTS = {MODEL: ("lora_A", "lora_B")} | dict.fromkeys(lora.TEXT, ("lora_linear_layer.down", "lora_linear_layer.up"))
"""As diffusers' training scripts write them: its reader wants `lora_linear_layer` in text encoders."""


def _diffusers(modules: list[_Written]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for network in dict.fromkeys(module.network for module in modules):
        own = [module for module in modules if module.network == network]
        for module in own:
            for part, array in zip(_PARTS[network], (module.down, module.up)):
                tensors[f"{_PREFIX[network]}.{module.module}.{part}.weight"] = array
        # transformers 5 has no `text_model`; a name without it fits both as the end of the module's name.
        short = {module.module: module.module.removeprefix("text_model.") for module in own}
        mark = "^" if network == MODEL else ""
        values = lora_config.values(
            {mark + short[module.module]: (module.rank, module.alpha) for module in own}, sorted(short.values())
        )
        config |= {f"{_PREFIX[network]}.{name}": value for name, value in values.items()}
    return tensors, {lora_config.KEY: json.dumps(config, indent=2, sort_keys=True)}


def _kohya(modules: list[_Written], networks: Networks, sgm: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    towers = ("lora_te_",) if len(networks.text) < 2 else ("lora_te1_", "lora_te2_")
    prefixes = {MODEL: "lora_unet_"} | dict(zip(lora.TEXT, towers))
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        name = module.single_file if sgm and module.network == MODEL else module.module
        if name is None:
            raise ValueError(f"{module.module} has no name in single files: use another layout")
        name = prefixes[module.network] + name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = module.down, module.up
        tensors[f"{name}.alpha"] = np.asarray(module.alpha, np.float32)
    metadata = {"ss_network_module": "networks.lora"} | lora_families.kohya(networks)
    for key, values in (("dim", [m.rank for m in modules]), ("alpha", [m.alpha for m in modules])):
        metadata[f"ss_network_{key}"] = f"{Counter(values).most_common(1)[0][0]:g}"
    return tensors, metadata

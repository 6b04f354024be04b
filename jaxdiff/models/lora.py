"""LoRA (arXiv 2106.09685): low-rank differences of kernels, W' = W + w · (alpha / r) · down @ up.

A LoRA is a tree beside the parameters. At the path of a kernel it has {"down", "up", "alpha"}; other leaves are absent.
A matrix (in out) has down (in r) and up (r out); a convolution (h w in out) has down (h w in r) and up (1 1 r out).
`merged` adds any number of them to the parameters, so that networks and samplers need no change.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxdiff.core import trees

MODEL, TEXT = "model", ("text", "text_2")
"""Names of the networks: the LoRAs of a training run, and of a file, are a dict from these names to trees."""
LEAVES = ("down", "up", "alpha")


@dataclass(frozen=True)
class Targets:
    """The kernels with a LoRA: those whose path (`down_0_0/conv_1/kernel`) ends with a match of `pattern`.

    side: the largest side of convolutions among them; 0: matrices only.
    """

    pattern: str
    side: int = 0

    def paths(self, params: Mapping) -> list[str]:
        """The paths of these kernels, sorted. params: arrays or shapes. ValueError if there are none."""
        ends = re.compile(f"(?:{self.pattern})$")
        leaves = trees.flatten(params).items()
        kernels = [path for path, leaf in leaves if path.split("/")[-1] == "kernel" and self._fits(leaf.shape)]
        fitting = [path for path in kernels if ends.search(path)]
        if not fitting:
            raise ValueError(f"none of {len(kernels)} kernels of a fitting size ends with {self.pattern!r}")
        return fitting

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 or (len(shape) == 4 and max(shape[:2]) <= self.side)


ATTENTION = Targets("(self|cross)/(q|k|v|out)/kernel")
"""Attention of the latent U-Net to pixels and tokens, as in diffusers' training scripts."""
TRANSFORMERS = Targets("_attention/.*kernel", 1)
"""All layers of the latent U-Net's transformers, as in kohya's scripts."""
LINEAR = Targets("kernel")
"""All matrices."""
ALL = Targets("kernel", 3)
"""All matrices and all convolutions up to 3×3."""
TEXT_ATTENTION = Targets(r"text/block_\d+/(q|k|v|o)/kernel")
"""Attention of CLIP's text tower."""
TEXT_LINEAR = Targets(r"text/block_\d+/\w+/kernel")
"""Attention and feed-forward layers of CLIP's text tower, as in kohya's scripts."""


def init(params: Mapping, targets: Targets, rank: int, key: Key[Array, ""], alpha: float | None = None) -> dict:
    """A LoRA that changes nothing yet: down is normal with a standard deviation of 1/rank, up is zero. Float32.

    params: arrays or shapes. alpha: None for `rank`, which makes the scale 1. ValueError if nothing is a target.
    """
    if rank < 1:
        raise ValueError(f"a LoRA of rank {rank}: at least 1")
    leaves, result = trees.flatten(params), {}
    for number, path in enumerate(targets.paths(params)):
        *sides, width, out = leaves[path].shape
        shape = (*sides, width, rank)
        result[f"{path}/down"] = jax.random.normal(jax.random.fold_in(key, number), shape) / rank
        result[f"{path}/up"] = jnp.zeros((*(1 for _ in sides), rank, out))
        result[f"{path}/alpha"] = jnp.float32(rank if alpha is None else alpha)
    return trees.unflatten(result)


def merged(params: Mapping, loras: Iterable[tuple[Mapping, int | float | Array]], *, keep_type: bool = True) -> dict:
    """The parameters with all LoRAs added, each times its weight, which may be traced. Differences are summed in
    float32; a kernel keeps its type, or with keep_type=False becomes float32, so that no difference is rounded away.

    ValueError for a LoRA of a kernel that is missing or of another shape.
    """
    result: dict[str, Any] = dict(trees.flatten(params))
    added: dict[str, list[tuple[Mapping[str, Any], int | float | Array]]] = {}
    for lora, weight in loras:
        for path, module in modules(lora).items():
            check_module(path, module, result[path].shape if path in result else None)
            added.setdefault(path, []).append((module, weight))
    for path, own in added.items():
        total = sum(weight * difference(module) for module, weight in own)
        dtype = result[path].dtype if keep_type else jnp.float32
        result[path] = (jnp.asarray(result[path], jnp.float32) + total).astype(dtype)
    return trees.unflatten(result)


def difference(module: Mapping[str, Any]) -> Array:
    """(alpha / r) · down @ up of one kernel, float32, in the kernel's shape."""
    down, up = (jnp.asarray(module[name], jnp.float32) for name in ("down", "up"))
    # Accelerators round products to 8 or 11 bits by default.
    return module["alpha"] / down.shape[-1] * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)


def modules(lora: Mapping) -> dict[str, dict[str, Any]]:
    """{"down", "up", "alpha"} by the path of the kernel. ValueError for another leaf or a missing one."""
    result: dict[str, dict[str, Any]] = {}
    for name, leaf in trees.flatten(lora).items():
        path, _, part = name.rpartition("/")
        result.setdefault(path, {})[part] = leaf
    wrong = [path for path, module in result.items() if sorted(module) != sorted(LEAVES)]
    if wrong:
        own = ", ".join(result[wrong[0]])
        raise ValueError(f"a LoRA has {', '.join(LEAVES)} at each kernel, but at {wrong[0]} {own}")
    return result


def labelled(lora: Mapping, label_of: Callable[[str], str]) -> dict:
    """The tree of the LoRA with the label of each kernel's path; "none" for alpha."""
    leaves = trees.flatten(lora)
    path_and_leaf = {name: name.rpartition("/") for name in leaves}
    labels = {name: "none" if leaf == "alpha" else label_of(path) for name, (path, _, leaf) in path_and_leaf.items()}
    return trees.unflatten(labels)


def check_module(path: str, module: Mapping[str, Any], kernel: tuple[int, ...] | None) -> None:
    """ValueError if a LoRA does not fit the kernel of that shape. None: there is no such kernel."""
    if kernel is None:
        raise ValueError(f"a LoRA of {path}, which the network does not have")
    down, up = tuple(module["down"].shape), tuple(module["up"].shape)
    rank, ones = down[-1] if down else 0, (1,) * (len(kernel) - 2)
    if len(kernel) < 2 or down != (*kernel[:-1], rank) or up != (*ones, rank, kernel[-1]):
        raise ValueError(f"a LoRA of {path} with down {down} and up {up} does not fit its kernel {tuple(kernel)}")


@runtime_checkable
class Base(Hashable, Protocol):
    """A `training.state.Trainable`."""

    def init(self, key: Any) -> tuple[Any, Any]: ...

    def loss(
        self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any
    ) -> tuple[Any, tuple[dict, Any]]: ...

    def labels(self, params: Any) -> Any: ...

    def cast(self, params: Any) -> Any: ...

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]: ...


@dataclass(frozen=True)
class LoRAModel:
    """Training of a LoRA of any trainable model, whose parameters stay. A `training.state.Trainable`.

    Parameters are {"model": LoRA}. frozen is {"model": the base's parameters} and, if the base's loss reads frozen
    arrays itself, {"frozen": those}. The difference is added in float32, whatever the type of the parameters; keep
    them in the type in which they are published, because a LoRA of rounded ones is one of other parameters.

    alpha: None for `rank`. It is stored with the LoRA, and not trained.
    """

    base: Base
    targets: Targets = ATTENTION
    rank: int = 4
    alpha: float | None = None

    def init(self, key: Key[Array, ""]) -> tuple[dict, Any]:
        """A LoRA that changes nothing yet, and the base's extra."""
        shapes, extra = _shapes(self.base)
        if jax.tree.leaves(extra):
            extra = self.base.init(key)[1]
        return {MODEL: init(shapes, self.targets, self.rank, key, self.alpha)}, extra

    def loss(
        self, params: dict, extra: Any, frozen: dict, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, Any]]:
        """The base's loss with merged parameters."""
        return self.base.loss(self.adapted(params, frozen), extra, frozen.get("frozen", ()), batch, key, step)

    def adapted(self, params: dict, frozen: dict) -> dict:
        """The base's merged parameters, in the types that its network computes in."""
        return self.base.cast(merged(frozen[MODEL], [(params[MODEL], 1.0)], keep_type=False))

    def labels(self, params: dict) -> dict:
        """The base's label of each kernel; "none" for alpha."""
        known = trees.flatten(self.base.labels(_shapes(self.base)[0]))
        return {MODEL: labelled(params[MODEL], known.__getitem__)}

    def cast(self, params: dict) -> dict:
        """Unchanged: a LoRA is small, and is added to the parameters in float32."""
        return params

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self.base.batch_spec(batch_size, side)


@lru_cache(maxsize=32)
def _shapes(base: Any) -> tuple[Any, Any]:
    """Shapes of the base's parameters and extra. Cached, as tracing a large model takes seconds."""
    return jax.eval_shape(base.init, jax.random.key(0))

"""Sharding of parameters over a mesh, by shape and, for tensor parallelism, by rules on their paths.

Every large array is sharded over `fsdp` along its largest divisible axis (the last of equals). A rule first shards an
axis of matching arrays over `tensor`. State of a parameter (its average, its optimizer moments, Adafactor's rows and
columns) has the parameter's sharding.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.training.mesh import AnyMesh


@dataclass(frozen=True)
class Rule:
    """Arrays whose path (`down_0_0/Conv_0/kernel`) ends with `pattern` are split over `tensor` along `axis`."""

    pattern: str
    axis: int


@dataclass(frozen=True)
class ParamSharding:
    """rules: for the `tensor` axis; the first match counts. minimum: arrays with fewer elements are not sharded over
    `fsdp`, because gathering them costs more than the memory saved."""

    rules: tuple[Rule, ...] = ()
    minimum: int = 2**16


BY_SHAPE = ParamSharding()


def name_of(path: Sequence[Any]) -> str:
    """A path of jax.tree_util as `down_0_0/Conv_0/kernel`."""
    return "/".join(_words(path))


def shardings(params: Any, mesh: AnyMesh, placement: ParamSharding = BY_SHAPE, *, strict: bool = True) -> Any:
    """The sharding of every parameter (arrays or shapes), as a tree of NamedSharding.

    Raises ValueError for a rule whose axis the mesh does not divide and, where `strict`, for one that matches nothing.
    """
    rules = placement.rules if mesh.shape["tensor"] > 1 else ()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if strict:
        _check_matched(rules, [name_of(path) for path, _ in leaves])

    def place(path: Any, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        name = name_of(path)
        rule = next((rule for rule in rules if _matches(rule, name)), None)
        if rule is not None:
            _split_by_rule(spec, leaf.shape, rule, name, mesh.shape["tensor"])
        _split_by_shape(spec, leaf.shape, mesh.shape["fsdp"], placement.minimum)
        return NamedSharding(mesh, _trimmed(spec))

    return jax.tree_util.tree_map_with_path(place, params)


def following(state: Any, params: Any, placements: Any) -> Any:
    """The sharding of every array of `state` (shapes), taken from the parameter whose path is a suffix of its own.

    `params` (shapes) and `placements` are trees of the parameters. An array of the parameter's shape has its sharding;
    one without one of its axes (Adafactor's `v_row`, `v_col`) has the remaining sharding; others are replicated.
    """
    known = {
        _words(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placements))
    }
    mesh = next(iter(known.values()))[1].mesh

    def place(path: Any, leaf: Any) -> NamedSharding:
        words = _words(path)
        for start in range(len(words)):
            if words[start:] in known:
                shape, sharding = known[words[start:]]
                if leaf.shape == shape:
                    return sharding
                spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
                axis = _missing_axis(leaf.shape, shape, words[:start])
                return NamedSharding(
                    mesh, PartitionSpec() if axis is None else _trimmed(spec[:axis] + spec[axis + 1 :])
                )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def without_fsdp(sharding: NamedSharding) -> NamedSharding:
    """The same sharding, gathered along `fsdp`."""
    return NamedSharding(sharding.mesh, _trimmed([None if part == "fsdp" else part for part in sharding.spec]))


def bytes_on_a_device(tree: Any) -> int:
    """Bytes per device of arrays or shapes with shardings."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def table(tree: Any) -> str:
    """A table of the arrays of `tree` (arrays or shapes with shardings): path, shape, type, placement, bytes per
    device.

    The last line is the sum.
    """
    lines = [("array", "shape", "type", "placement", "bytes per device")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec = ", ".join("·" if part is None else str(part) for part in leaf.sharding.spec) or "copied"
        lines.append((name_of(path), "×".join(map(str, leaf.shape)), str(leaf.dtype), spec, f"{_bytes(leaf):,}"))
    lines.append(("all", "", "", "", f"{bytes_on_a_device(tree):,}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths[:-1])), line[-1].rjust(widths[-1])])
        for line in lines
    )


def _words(path: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _matches(rule: Rule, name: str) -> bool:
    return re.search(f"(?:{rule.pattern})$", name) is not None


def _check_matched(rules: tuple[Rule, ...], names: list[str]) -> None:
    for rule in rules:
        if not any(_matches(rule, name) for name in names):
            raise ValueError(f"placement rule {rule.pattern!r} matches no array: correct it, or leave it out")


def _split_by_rule(spec: list[str | None], shape: tuple[int, ...], rule: Rule, name: str, count: int) -> None:
    if not -len(shape) <= rule.axis < len(shape) or shape[rule.axis] % count:
        size = shape[rule.axis] if -len(shape) <= rule.axis < len(shape) else "none"
        raise ValueError(
            f"tensor={count} does not divide axis {rule.axis} ({size}) of {name}, which the placement rule "
            f"{rule.pattern!r} splits: choose another number of devices along tensor"
        )
    spec[rule.axis] = "tensor"


def _split_by_shape(spec: list[str | None], shape: tuple[int, ...], count: int, minimum: int) -> None:
    candidates = [(size, axis) for axis, size in enumerate(shape) if size % count == 0 and spec[axis] is None]
    if count > 1 and int(np.prod(shape)) >= minimum and candidates:
        spec[max(candidates)[1]] = "fsdp"


def _missing_axis(shape: tuple[int, ...], full: tuple[int, ...], before: tuple[str, ...]) -> int | None:
    """The axis of `full` that `shape` lacks, if it is the only difference; if ambiguous, Adafactor's choice."""
    fits = [axis for axis in range(len(full)) if full[:axis] + full[axis + 1 :] == shape]
    if not fits:
        return None
    order = np.argsort(full)  # as in optax: `v_row` is the mean over the largest axis, `v_col` over the second
    meant = int(order[-2] if "v_col" in before else order[-1])
    return meant if meant in fits else fits[-1]


def _trimmed(spec: list[Any]) -> PartitionSpec:
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return PartitionSpec(*spec)


def _bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    itemsize = leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else np.dtype(leaf.dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * itemsize

"""Parameter trees: nested dicts of arrays. A leaf's name is its path joined by "/"."""

import hashlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np

from jaxdiff.core.messages import plain, quoted


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """{"a": {"b": leaf}} → {"a/b": leaf}, in sorted order. ValueError for a name that contains a slash."""
    flat = {}
    for name in sorted(tree):
        if "/" in name:
            raise ValueError(f"parameter name {prefix}{quoted(name)} holds a slash, which separates levels")
        value = tree[name]
        flat.update(flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def unflatten(flat: Mapping) -> dict:
    """The inverse of `flatten`. ValueError if a name is both a leaf and a group."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name in node:
            raise ValueError(f"{plain(path)} is a tensor in one place and a group of tensors in another")
        node[name] = leaf
    return tree


def check_tree(params: Mapping, expected_shapes: Mapping, where: str, part: bool = False) -> None:
    """Raises ValueError unless `params` has exactly the leaves of `expected_shapes` (arrays or shape structs). part: it
    may lack some.

    The message names `where` (the source) and the first ten missing, unexpected and misshapen leaves.
    """
    have = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected_shapes).items()}
    check_shapes(have, of_part(have.keys(), want) if part else want, where)


def of_part(names: Set[str], want: Mapping[str, Any]) -> Mapping[str, Any]:
    """The leaves of a tree that a part with these names has; all leaves for names that the tree lacks."""
    return {name: want[name] for name in names} if names < want.keys() else want


def check_shapes(have: Mapping[str, tuple], want: Mapping[str, tuple], where: str) -> None:
    """`check_tree` for names and shapes only, to check a file before its tensors are read."""
    problems = [
        listed("missing", sorted(want.keys() - have.keys())),
        listed("unexpected", sorted(have.keys() - want.keys())),
        listed(
            "of another shape",
            [k for k in sorted(want.keys() & have.keys()) if have[k] != want[k]],
            lambda k: f"{plain(k)} {quoted(have[k])}, not {quoted(want[k])}",
        ),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"{where} does not fit the settings: {'; '.join(problems)}")


def listed(what: str, names: list[str], show: Callable[[str], str] = plain) -> str:
    """The number of leaves that are `what`, with the names of the first ten; "" if there are none."""
    if not names:
        return ""
    more = ", …" if len(names) > 10 else ""
    return f"{len(names)} {what} ({', '.join(map(show, names[:10]))}{more})"


def update_digest(digest: Any, params: Any) -> None:
    """Update a `hashlib` hash with paths, types, shapes and values of all leaves, independent of device and order."""
    leaves = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params))
    for path, leaf in sorted(leaves, key=lambda named: named[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def digest_of(params: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of parameters."""
    total = hashlib.sha256()
    update_digest(total, params)
    return total.hexdigest()[:12]

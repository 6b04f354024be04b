"""Tensors computed from others when they are read (`tree.Unread`): renaming 7 GB holds no second copy."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array

from jaxdiff.weights.tree import FLOATS, TYPES, Unread

_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Derived:
    """A tensor with known shape and type. compute: its values; it gets the types that may be read."""

    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[Collection[str]], np.ndarray]

    def read(self, types: Collection[str] = FLOATS) -> np.ndarray:
        return self.compute(types)


def held(array: np.ndarray | Array) -> Unread:
    """A tensor that is in memory already."""
    return Derived(tuple(array.shape), _NAMES[np.dtype(array.dtype)], lambda types: np.asarray(array))


def cast(tensor: Unread, dtype: str) -> Unread:
    """With values in another type, by safetensors' name."""
    if tensor.dtype == dtype:
        return tensor
    return Derived(tuple(tensor.shape), dtype, lambda types: tensor.read(types).astype(TYPES[dtype]))


def transposed(tensor: Unread) -> Unread:
    return Derived(tuple(tensor.shape)[::-1], tensor.dtype, lambda types: np.ascontiguousarray(tensor.read(types).T))


def reshaped(tensor: Unread, shape: tuple[int, ...]) -> Unread:
    assert math.prod(shape) == math.prod(tensor.shape)
    return Derived(shape, tensor.dtype, lambda types: tensor.read(types).reshape(shape))


def rows(tensor: Unread, start: int, stop: int) -> Unread:
    """The rows `start` to `stop` of the first axis."""
    return Derived((stop - start, *tensor.shape[1:]), tensor.dtype, lambda types: tensor.read(types)[start:stop])


def stacked(tensors: Sequence[Unread]) -> Unread:
    """Tensors of one shape and type along a new first axis."""
    first = tensors[0]
    assert all(tuple(each.shape) == tuple(first.shape) and each.dtype == first.dtype for each in tensors)
    shape = (len(tensors), *first.shape)
    return Derived(shape, first.dtype, lambda types: np.stack([each.read(types) for each in tensors]))


def joined(tensors: Sequence[Unread]) -> Unread:
    """Tensors one after another along the first axis. ValueError unless the other axes and the types are the same."""
    first = tensors[0]
    for other in tensors[1:]:
        if tuple(other.shape[1:]) != tuple(first.shape[1:]) or other.dtype != first.dtype:
            raise ValueError(
                f"{first.dtype} {tuple(first.shape)} and {other.dtype} {tuple(other.shape)} cannot be joined"
            )
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return Derived(shape, first.dtype, lambda types: np.concatenate([tensor.read(types) for tensor in tensors]))

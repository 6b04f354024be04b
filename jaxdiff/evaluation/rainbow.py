"""An exact reader for `rainbow` images: all of them are known, so what is drawn is the nearest one, or none."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from jaxdiff.data.images import to_uint8
from jaxdiff.data.rainbow import EVERY, Attributes, draw

EXPLAINED = 0.85
"""An image of whose difference from plain white the nearest one explains less is none of them."""

NAMES = tuple(field.name for field in dataclasses.fields(Attributes))


class Read(NamedTuple):
    """What an image shows: all combinations that look like it (several, where a rotation changes nothing; none, where
    it is no image of the set), and the share of its difference from plain white that they explain."""

    found: tuple[Attributes, ...]
    explained: float

    def right(self, asked: Attributes) -> bool:
        """Whether every attribute is as asked for."""
        return asked in self.found

    def attributes(self, asked: Attributes) -> dict[str, bool]:
        """For each attribute, whether it is as asked for; a rotation, only where the shape is that as well."""
        checks = {name: any(getattr(f, name) == getattr(asked, name) for f in self.found) for name in NAMES}
        same_shape = [f for f in self.found if f.shape == asked.shape]
        return {**checks, "rotation": any(f.rotation == asked.rotation for f in same_shape)}


def read(images: Num[np.ndarray, "n 32 32 3"], chunk: int = 512) -> list[Read]:
    """Each image (uint8, or floats in [-1, 1], which are read as 8 bits would hold them)."""
    templates, places = _templates()
    lengths = (templates**2).sum(1)
    readings = []
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        part = _from_white(part if part.dtype == np.uint8 else np.stack([to_uint8(p) for p in part]))
        squares = lengths - 2 * part @ templates.T  # and the length of the image, the same for all
        nearest = squares.argmin(1)
        contrast = (part**2).sum(1)
        apart = np.maximum(squares[np.arange(len(part)), nearest] + contrast, 0)
        for place, explained in zip(nearest, 1 - apart / np.maximum(contrast, 1e-6)):
            which = tuple(EVERY[i] for i in places[place]) if explained >= EXPLAINED else ()
            readings.append(Read(which, float(explained)))
    return readings


@functools.cache
def _templates() -> tuple[Float[np.ndarray, "t d"], Sequence[Int[np.ndarray, "k"]]]:
    """All different images, and of each the places of the combinations that look like it."""
    different, inverse = np.unique(
        np.stack([draw(attributes) for attributes in EVERY]).reshape(len(EVERY), -1), axis=0, return_inverse=True
    )
    order = np.argsort(inverse, kind="stable")
    places = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
    return _from_white(different), places


def _from_white(images: Num[np.ndarray, "n *d"]) -> Float[np.ndarray, "n d"]:
    return (255.0 - images.reshape(len(images), -1).astype(np.float32)) / 255.0

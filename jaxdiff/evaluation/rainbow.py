"""An exact reader for `rainbow` images: the nearest of all possible images, or none."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from jaxdiff.data.images import to_uint8
from jaxdiff.data.rainbow import EVERY, Attributes, draw

EXPLAINED = 0.85
"""An image whose difference from white is explained less than this by the nearest one matches none."""

NAMES = tuple(field.name for field in dataclasses.fields(Attributes))


class Read(NamedTuple):
    """All combinations whose image matches (several if a rotation has no effect; none if the image is not of the
    dataset), and the fraction of the image's difference from white that they explain."""

    found: tuple[Attributes, ...]
    explained: float

    def right(self, asked: Attributes) -> bool:
        """Whether all attributes are as requested."""
        return asked in self.found

    def attributes(self, asked: Attributes) -> dict[str, bool]:
        """For each attribute, whether it is as requested; the rotation counts only with the right shape."""
        checks = {name: any(getattr(f, name) == getattr(asked, name) for f in self.found) for name in NAMES}
        same_shape = [f for f in self.found if f.shape == asked.shape]
        return {**checks, "rotation": any(f.rotation == asked.rotation for f in same_shape)}


def read(images: Num[np.ndarray, "n 32 32 3"], chunk: int = 512) -> list[Read]:
    """Read each image (uint8, or float in [-1, 1], which is first quantised to 8 bits)."""
    templates, places = _templates()
    lengths = (templates**2).sum(1)
    readings = []
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        part = _from_white(part if part.dtype == np.uint8 else np.stack([to_uint8(p) for p in part]))
        squares = lengths - 2 * part @ templates.T  # plus the squared norm of the image, constant over templates
        nearest = squares.argmin(1)
        contrast = (part**2).sum(1)
        apart = np.maximum(squares[np.arange(len(part)), nearest] + contrast, 0)
        for place, explained in zip(nearest, 1 - apart / np.maximum(contrast, 1e-6)):
            which = tuple(EVERY[i] for i in places[place]) if explained >= EXPLAINED else ()
            readings.append(Read(which, float(explained)))
    return readings


@functools.cache
def _templates() -> tuple[Float[np.ndarray, "t d"], Sequence[Int[np.ndarray, "k"]]]:
    """All distinct images, and for each the indices of the combinations with that image."""
    different, inverse = np.unique(
        np.stack([draw(attributes) for attributes in EVERY]).reshape(len(EVERY), -1), axis=0, return_inverse=True
    )
    order = np.argsort(inverse, kind="stable")
    places = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
    return _from_white(different), places


def _from_white(images: Num[np.ndarray, "n *d"]) -> Float[np.ndarray, "n d"]:
    return (255.0 - images.reshape(len(images), -1).astype(np.float32)) / 255.0

"""Mean and covariance of features, added up in float64 in any order, and kept with what they were made of.

both = add(empty(2048), features)          # some pictures at a time
whole = merge(both, those_of_another_host)
save(path, whole, origin)
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from jaxdiff.data.files import replacing


@dataclass(frozen=True)
class Origin:
    """What features depend on, beside the pictures themselves: a number without it cannot be compared with another."""

    pictures: str
    """Which set, or which model's drawings."""
    digest: str
    """Of the pictures, in their order."""
    extractor: str
    """The network with the first digits of its weights' digest."""
    resize: str
    """How pictures came to its size: clean, legacy or none."""
    format: str = "png"
    seed: int | None = None
    """Of what was drawn; None for pictures that are simply there."""

    @property
    def shown(self) -> str:
        """Of the pictures alone."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.pictures} {self.digest} ({self.format}{seed})"

    def __str__(self) -> str:
        return f"{self.shown}, {self.extractor}, resize {self.resize}"


class Statistics(NamedTuple):
    """Sums over pictures, of which any two can be merged."""

    count: int
    total: Float[np.ndarray, "d"]
    products: Float[np.ndarray, "d d"]

    @property
    def mean(self) -> Float[np.ndarray, "d"]:
        return self.total / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased (divided by n − 1), as FID has it. ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} pictures: at least 2 are wanted")
        return (self.products - np.outer(self.total, self.mean)) / (self.count - 1)


def empty(width: int) -> Statistics:
    return Statistics(0, np.zeros(width), np.zeros((width, width)))


def add(statistics: Statistics, features: Num[np.ndarray, "n d"]) -> Statistics:
    """With these pictures too. ValueError where one has features that are not finite."""
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features that are not finite")
    return merge(statistics, Statistics(len(features), features.sum(0), features.T @ features))


def merge(*parts: Statistics) -> Statistics:
    return Statistics(*(sum(values[1:], values[0]) for values in zip(*parts, strict=True)))


def save(path: Path, statistics: Statistics, origin: Origin) -> None:
    """As .npz, whole or not at all. Beside ours it has `mu` and `sigma`, which other tools read."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        both = {"mu": statistics.mean, "sigma": statistics.covariance}
        np.savez(file, **statistics._asdict(), **both, origin=json.dumps(dataclasses.asdict(origin)))


def load(path: Path) -> tuple[Statistics, Origin]:
    """FileNotFoundError, or ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            origin = Origin(**json.loads(str(kept["origin"])))
            return Statistics(int(kept["count"]), kept["total"], kept["products"]), origin
    except FileNotFoundError:
        raise
    except Exception as error:  # of zipfile, numpy and json, in many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no statistics of ours: {reason}") from error

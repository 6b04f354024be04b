"""Mean and covariance of features, accumulated in float64 in any order, and stored with their origin.

both = add(empty(2048), features)          # a batch of images
whole = merge(both, those_of_another_host)
save(path, whole, origin)

The accumulated squares are centred on the mean, which merging shifts (Chan, Golub and LeVeque, 1979). Uncentred sums
of squares lose precision if the covariance is small relative to the mean: ten of 16 digits at 1e5 standard deviations.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.core.messages import plain, quoted, reason
from jaxdiff.evaluation.checks import require_features

UNKNOWN = "unknown"
"""The value of `Origin` fields that a file of another program does not record."""


@dataclass(frozen=True)
class Origin:
    """Provenance of features: everything that must be known to compare metrics."""

    images: str
    """The dataset, or the model that generated the images."""
    digest: str
    """Digest of the images, in order."""
    extractor: str
    """The network, with the first digits of its digest."""
    resize: str
    """Resize filter: clean, legacy or pytorch."""
    format: str = "png"
    seed: int | None = None
    """Sampling seed of generated images; None for others."""
    fit: str = "squeeze"
    """The part of the image used: all (squeeze), or its centred square (crop)."""
    size: str = UNKNOWN
    """Width x height in pixels, before the network's resize."""

    @property
    def shown(self) -> str:
        """The fields that describe the images."""
        if self.protocol_unknown:
            return f"{self.images} {self.digest} ({self.format}, protocol unknown)"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.images} {self.digest} ({self.format}, {self.size}{seed})"

    @property
    def protocol_unknown(self) -> bool:
        """True for statistics or features of another program, whose file does not record the protocol."""
        return self.resize == UNKNOWN

    def __str__(self) -> str:
        return f"{self.shown}, {self.extractor}, fit {self.fit}, resize {self.resize}"


@dataclass(frozen=True, eq=False)
class Moments:
    """A mean and a covariance stored by another program, of an unknown number of images."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]
    count: None = None


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mergeable statistics of images. scatter: the sum of (x − mean)(x − mean)ᵀ."""

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased (divided by n − 1), as in FID. ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} images: at least 2 are wanted")
        return self.scatter / (self.count - 1)


Gaussian = Statistics | Moments
"""The inputs of a Fréchet distance: a mean, a covariance, and a count that may be None."""


def empty(width: int) -> Statistics:
    return Statistics(0, np.zeros(width), np.zeros((width, width)))


def add(statistics: Statistics, features: Num[np.ndarray, "n d"]) -> Statistics:
    """Add a batch of features. ValueError if they are not finite, not rows, or of another width."""
    require_features("statistics", features, np.zeros((1, len(statistics.mean))))
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    apart = features - mean
    mean_left = apart.mean(0)  # the rounding error of the mean
    scatter = apart.T @ apart - len(features) * np.outer(mean_left, mean_left)
    return merge(statistics, Statistics(len(features), mean + mean_left, scatter))


def merge(*statistics: Statistics) -> Statistics:
    """The statistics of all images together, in any order."""
    nonempty = [each for each in statistics if each.count]
    if len(nonempty) < 2:
        return nonempty[0] if nonempty else statistics[0]
    count = sum(each.count for each in nonempty)
    shift = nonempty[0].mean  # average relative to one of the means, which may be large
    mean = shift + sum(each.count * (each.mean - shift) for each in nonempty) / count
    scatter = np.zeros_like(nonempty[0].scatter)
    for each in nonempty:
        scatter += each.scatter + each.count * np.outer(each.mean - mean, each.mean - mean)
    return Statistics(count, mean, scatter)


def save(path: Path, statistics: Statistics, origin: Origin) -> None:
    """Write .npz atomically, including `mu` and `sigma` for other tools."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        ours = {"count": statistics.count, "mean": statistics.mean, "scatter": statistics.scatter}
        both: dict[str, Any] = {**ours, "mu": statistics.mean, "sigma": statistics.covariance}
        np.savez(file, **both, origin=json.dumps(dataclasses.asdict(origin)))


def _origin(fields: dict[str, Any]) -> Origin:
    """ValueError if a field has another type or unprintable text."""
    for name, value in fields.items():
        if name == "seed":
            right = value is None or type(value) is int
        else:
            right = isinstance(value, str) and plain(value, 4000) == value
        if not right:
            raise ValueError(f"{plain(name)} is {quoted(value)}")
    return Origin(**fields)


def checked_moments(mean: np.ndarray, covariance: np.ndarray, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. ValueError unless they are a valid mean and covariance (up to a factor), at float32
    precision."""
    for name, each in zip(names, (mean, covariance)):
        if each.dtype.kind not in "fiu":
            raise ValueError(f"{name} has numbers of type {each.dtype}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{names[0]} of shape {mean.shape} and {names[1]} of shape {covariance.shape}")
    for name, each in zip(names, (mean, covariance)):
        if not np.isfinite(each).all():
            raise ValueError(f"{name} has numbers that are not finite")
    slack = 1e-4 * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > slack:
        raise ValueError(f"{names[1]} is not symmetric")
    if (least := np.linalg.eigvalsh(covariance)[0]) < -slack:
        raise ValueError(f"{names[1]} is no covariance: it has an eigenvalue of {least:.3g}")
    return mean, covariance


def is_ours(path: Path) -> bool:
    """Whether the file was written by `save`, in this or an earlier version. FileNotFoundError, or ValueError if it is
    neither .npz nor .npy."""
    try:
        opened = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(opened, np.lib.npyio.NpzFile):
            return False
        with opened:
            return "origin" in opened.files
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many types
        raise ValueError(f"{path}: neither statistics nor features (.npz, .npy): {reason(error)}") from error


def load(path: Path) -> tuple[Statistics, Origin]:
    """The inverse of `save`. FileNotFoundError, or ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            fields = json_files.parse_object(str(kept["origin"]), "origin")
            if "fit" in fields:
                count, mean, scatter = int(kept["count"]), kept["mean"], kept["scatter"]
                if count < 0:
                    raise ValueError(f"a count of {count}")
                mean, scatter = checked_moments(mean, scatter, ("mean", "scatter"))
                return Statistics(count, mean, scatter), _origin(fields)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many types
        raise ValueError(f"{path}: no statistics of ours: {reason(error)}") from error
    raise ValueError(
        f"{path}: written by an earlier version, which does not record whether images were cropped; compute the "
        "statistics again (--keep-reference)"
    )

"""The errors of one comparison, and the limits that they must not exceed."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Limits(NamedTuple):
    """relative: of a network, the largest error over the largest absolute value. image: of an image sampled by a
    pipeline, the mean error in 1/255 of the range."""

    relative: float
    image: float


LIMITS = {"float32": Limits(5e-4, 2.0), "bfloat16": Limits(5e-2, 8.0)}
"""By compute type."""


@dataclass(frozen=True, eq=False)
class Row:
    """One comparison.

    stage, what: the network, and its output. largest: the largest absolute error. relative: over the largest absolute
    value of the other implementation. mean: of images, in 1/255 of their range. note: why nothing can be compared.
    images: (b h w 3) in [-1, 1], ours and theirs.
    """

    stage: str
    what: str
    largest: float
    relative: float
    limit: float
    mean: float | None = None
    note: str = ""
    images: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        error = self.relative if self.mean is None else self.mean
        return not self.note and bool(error <= self.limit)  # not for NaN

    def values(self) -> dict[str, Any]:
        """As JSON; numbers that are not finite are null."""
        numbers = {name: getattr(self, name) for name in ("largest", "relative", "mean", "limit")}
        finite = {name: value if value is not None and np.isfinite(value) else None for name, value in numbers.items()}
        return {"stage": self.stage, "what": self.what, **finite, "note": self.note, "passed": self.passed}


def arrays(stage: str, what: str, ours: Any, theirs: Any, limits: Limits) -> Row:
    """The row of a network's output."""
    return Row(stage, what, *_errors(ours, theirs), limits.relative, note=_note(ours, theirs))


def images(stage: str, what: str, ours: Any, theirs: Any, limits: Limits) -> Row:
    """The row of images in [-1, 1] (b h w 3) that two pipelines sampled."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    note = _note(ours, theirs)
    mean = float("nan") if note else 127.5 * float(np.abs(ours - theirs).mean())
    pair = None if note else (ours, theirs)
    return Row(stage, what, *_errors(ours, theirs), limits.image, mean, note, pair)


def _note(ours: Any, theirs: Any) -> str:
    shapes = np.shape(ours), np.shape(theirs)
    if shapes[0] != shapes[1]:
        return f"the shapes differ: {shapes[0]} and {shapes[1]}"
    lost = [name for name, array in (("ours", ours), ("theirs", theirs)) if not np.isfinite(np.asarray(array)).all()]
    return f"values that are not finite: {' and '.join(lost)}" if lost else ""


def _errors(ours: Any, theirs: Any) -> tuple[float, float]:
    """The largest absolute error, and relative to the largest absolute value of theirs."""
    if _note(ours, theirs):
        return float("nan"), float("nan")
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    largest, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return largest, largest / scale if scale else float("inf") if largest else 0.0

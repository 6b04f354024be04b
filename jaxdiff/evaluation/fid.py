"""FID (arXiv 1706.08500), its refusals, and FID∞ (arXiv 1911.07023).

Of n pictures FID is too large by about a constant over n that differs from model to model, so that numbers of different
n cannot be compared; FID∞ is the limit of a line through FIDs over 1/n.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.frechet import frechet
from jaxdiff.evaluation.statistics import Statistics, add, empty


def distance(a: Statistics, b: Statistics, force: bool = False) -> float:
    """The squared Fréchet distance. ValueError, unless `force`, where one has fewer pictures than features: its
    covariance is that of the pictures' number, not of the set. ValueError for features of different width."""
    width = len(a.total)
    if width != len(b.total):
        raise ValueError(f"features of width {width} and {len(b.total)}: of different networks")
    least = min(a.count, b.count)
    if least <= width and not force:
        raise ValueError(
            f"{least} pictures for {width} features: the distance would be that of their number; take more than "
            f"{width}, or force it, and it says so"
        )
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


class Limit(NamedTuple):
    """FID∞, and the distances at each number of pictures that the line was drawn through."""

    value: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def limit(
    features: Float[np.ndarray, "n d"],
    reference: Statistics,
    sizes: int = 15,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Limit:
    """FID∞: distances of `sizes` random subsets, evenly from a tenth (but more than d) to all, against 1/n → 0."""
    n, d = features.shape
    least = max(n // 10, 2 if force else d + 1)
    if least >= n or sizes < 2:
        raise ValueError(f"a limit from {sizes} sizes of up to {n} pictures for {d} features: take more")
    counts = tuple(int(count) for count in np.unique(np.linspace(least, n, sizes).astype(int)))
    rng = np.random.default_rng(seed)
    distances = []
    for count in counts:
        part = features[rng.choice(n, count, replace=False)]
        distances.append(distance(add(empty(d), part), reference, force))
        progress()
    slope_and_limit = np.polyfit(1 / np.array(counts), distances, 1)
    return Limit(float(slope_and_limit[1]), counts, tuple(distances))

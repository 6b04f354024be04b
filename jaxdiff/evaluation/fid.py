"""FID (arXiv 1706.08500), its refusals, and FID∞ (arXiv 1911.07023).

Of n images FID is too large by about a constant over n that differs from model to model, so that numbers of different
n cannot be compared; FID∞ is the limit of a line through FIDs over 1/n. Near n = d they lie on no line, and the limit
would come out too low.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.frechet import frechet
from jaxdiff.evaluation.statistics import Gaussian, add, empty


def distance(a: Gaussian, b: Gaussian, force: bool = False) -> float:
    """The squared Fréchet distance. ValueError, unless `force`, where one has fewer images than features: its
    covariance is that of the images' number, not of the set (a number that is not known is taken to be enough).
    ValueError for features of different width, or not finite."""
    width = len(a.mean)
    require_features("a Fréchet distance", a.mean[None], b.mean[None])
    least = fewest(a, b)
    if least is not None and least <= width and not force:
        raise ValueError(
            f"{least} images for {width} features: the distance would be that of their number; take more than "
            f"{width}, or force it, and it says so"
        )
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


def fewest(*sets: Gaussian) -> int | None:
    """The images of the smallest set, of those whose number is known."""
    return min((each.count for each in sets if each.count is not None), default=None)


SIZES = 15
"""Of subsets, as in the paper."""


class Limit(NamedTuple):
    """FID∞, and the distances at each number of images that the line was drawn through."""

    value: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def limit(
    features: Float[np.ndarray, "n d"],
    reference: Gaussian,
    sizes: int = SIZES,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Limit:
    """FID∞: distances of `sizes` random subsets, evenly from a tenth (but at least 2 d) to all, against 1/n → 0.

    ValueError, unless `force`, for fewer than 4 d images."""
    require_features("a limit of Fréchet distances", features)
    n, d = features.shape
    least = smallest(n, d, force)
    if sizes < 2 or 2 * least > n:
        raise ValueError(f"a limit from {sizes} sizes of up to {n} images for {d} features: take {4 * d} or more")
    counts = tuple(int(count) for count in np.unique(np.linspace(least, n, sizes).astype(int)))
    rng = np.random.default_rng(seed)
    distances = []
    for count in counts:
        part = features[rng.choice(n, count, replace=False)]
        distances.append(distance(add(empty(d), part), reference, force))
        progress()
    slope_and_limit = np.polyfit(1 / np.array(counts), distances, 1)
    return Limit(float(slope_and_limit[1]), counts, tuple(distances))


def smallest(n: int, d: int, force: bool = False) -> int:
    """Of the subsets of n images that a limit is drawn through."""
    return max(n // 10, 2 if force else 2 * d)

"""FID (arXiv 1706.08500) and FID∞ (arXiv 1911.07023), with checks of the number of images.

FID from n images is biased upwards by about a constant over n, and the constant depends on the model, so values at
different n are not comparable. FID∞ extrapolates a line through FIDs over 1/n. Near n = d the points are not on a line,
and the limit would be too low.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.frechet import frechet
from jaxdiff.evaluation.statistics import Gaussian, add, empty


def distance(a: Gaussian, b: Gaussian, force: bool = False) -> float:
    """The squared Fréchet distance. ValueError, unless `force`, if one has fewer images than features, because its
    covariance is then rank-deficient (an unknown number of images is accepted). ValueError for features that differ in
    width or are not finite."""
    width = len(a.mean)
    require_features("a Fréchet distance", a.mean[None], b.mean[None])
    least = fewest(a, b)
    if least is not None and least <= width and not force:
        raise ValueError(
            f"{least} images for {width} features: the distance would mostly measure their number; take more "
            f"than {width}, or force it, which the protocol records"
        )
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


def fewest(*gaussians: Gaussian) -> int | None:
    """The smallest known number of images."""
    return min((each.count for each in gaussians if each.count is not None), default=None)


SIZES = 15
"""Number of subset sizes, as in the paper."""


class Limit(NamedTuple):
    """FID∞, and the distances at each subset size that the line was fitted to."""

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
    """FID∞: distances of `sizes` random subsets, from a tenth (at least 2 d) to all images, extrapolated to 1/n → 0.

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
    """The smallest subset of n images that a limit is fitted to."""
    return max(n // 10, 2 if force else 2 * d)

"""KID: the squared maximum mean discrepancy of Inception's features under a cubic kernel (arXiv 1801.01401).

Unlike FID, its estimate is unbiased for any number of images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features


class KID(NamedTuple):
    """The mean over subsets.

    error: its standard error with respect to other samples of both distributions; None if it cannot be estimated (a
    single subset, or subsets of all images). deviation: the standard deviation over subsets (divided by their number,
    as in torch-fidelity), which is usually published with KID; it does not decrease with more subsets.
    """

    value: float
    error: float | None
    deviation: float


def kid(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> KID:
    """KID over `subsets` random subsets of `size` images of each dataset, drawn without replacement with `seed`.

    Subsets share images, so deviation / √subsets would go to 0 with more subsets, whatever the number of images n. The
    variance of a subset of s images around the value of all n is about the variance of the latter times (n − s) / s (to
    first order; n of the smaller dataset), so the error is conservative.

    ValueError if a dataset has fewer than `size` images, size is below 2 or subsets below 1, and for features that
    differ in width or are not finite."""
    require_features("KID", a, b)
    n = min(len(a), len(b))
    if size < 2 or n < size or subsets < 1:
        raise ValueError(f"KID of {subsets} subsets of {size}, but there are {len(a)} and {len(b)} images")
    rng = np.random.default_rng(seed)
    pick = lambda x: x[rng.choice(len(x), size, replace=False)].astype(np.float64)  # noqa: E731
    values = [mmd(pick(a), pick(b)) for _ in range(subsets)]
    error = float(np.std(values, ddof=1) * np.sqrt(size / (n - size))) if subsets > 1 and size < n else None
    return KID(float(np.mean(values)), error, float(np.std(values)))


def mmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"]) -> float:
    """The unbiased estimate of the squared discrepancy under (x·y/d + 1)³, without pairs of an image with itself.

    ValueError for fewer than two images, and for features that differ in width or are not finite."""
    require_features("MMD", a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"MMD of {len(a)} and {len(b)} images: at least 2 of each are wanted")
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = lambda x: (k := kernel(x, x)).sum() - np.trace(k)  # noqa: E731
    n, m = len(a), len(b)
    return float(within(a) / (n * (n - 1)) + within(b) / (m * (m - 1)) - 2 * kernel(a, b).mean())

"""KID: the squared maximum mean discrepancy of Inception's features under a cubic kernel (arXiv 1801.01401).

Unlike FID's its estimate is unbiased, whatever the number of pictures.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class KID(NamedTuple):
    """The mean over subsets and its standard error."""

    value: float
    error: float


def kid(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> KID:
    """`subsets` times `size` pictures of each set, drawn without replacement with `seed`. ValueError where a set has
    fewer than `size`, or size is below 2."""
    if size < 2 or min(len(a), len(b)) < size:
        raise ValueError(f"KID of subsets of {size}, but there are {len(a)} and {len(b)} pictures")
    rng = np.random.default_rng(seed)
    pick = lambda x: x[rng.choice(len(x), size, replace=False)].astype(np.float64)  # noqa: E731
    values = [mmd(pick(a), pick(b)) for _ in range(subsets)]
    return KID(
        float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets)) if subsets > 1 else float("nan")
    )


def mmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The unbiased estimate of the squared discrepancy under (x·y/d + 1)³: pairs of a picture with itself left out."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = lambda x: (k := kernel(x, x)).sum() - np.trace(k)  # noqa: E731
    n, m = len(a), len(b)
    return float(within(a) / (n * (n - 1)) + within(b) / (m * (m - 1)) - 2 * kernel(a, b).mean())

"""CMMD: the squared maximum mean discrepancy of CLIP's embeddings under a Gaussian kernel (arXiv 2401.09603)."""

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.retrieval import l2_normalize

SIGMA = 10.0
SCALE = 1000.0


def cmmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"], chunk: int = 2048) -> float:
    """CMMD of embeddings (normalised here to length 1), times 1000; the paper's estimator with σ = 10.

    It is the biased estimator, which includes pairs of an image with itself, as in published figures. ValueError for no
    images, and for embeddings that differ in width, are not finite, or have length 0.
    """
    require_features("CMMD", a, b)
    a, b = l2_normalize(a), l2_normalize(b)
    return float(SCALE * (_mean(a, a, chunk) + _mean(b, b, chunk) - 2 * _mean(a, b, chunk)))


def _mean(a: np.ndarray, b: np.ndarray, chunk: int) -> float:
    """The mean kernel over all pairs, computed in chunks of rows."""
    total = 0.0
    for start in range(0, len(a), chunk):
        squares = 2 - 2 * a[start : start + chunk] @ b.T
        total += np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2)).sum()
    return total / (len(a) * len(b))

"""Precision and recall of generated images (arXiv 1904.06991, equation 2).

The manifold of a dataset is the union of balls around its features, each with the distance to the k-th neighbour as
radius. Precision: the fraction of sampled images on the manifold of real ones (fidelity). Recall: the fraction of real
images on the manifold of sampled ones (diversity).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "n d"], sampled: Float[np.ndarray, "m e"], k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """The paper's k is 3. ValueError for fewer than k + 1 images, and for features that differ in width or are not
    finite."""
    require_features("precision and recall", real, sampled)
    if k < 1 or min(len(real), len(sampled)) <= k:
        raise ValueError(f"precision and recall of {k} neighbours, but there are {len(real)} and {len(sampled)} images")
    return PrecisionRecall(_within(sampled, real, k, chunk), _within(real, sampled, k, chunk))


def _within(points: np.ndarray, of: np.ndarray, k: int, chunk: int) -> float:
    """The fraction of points in at least one ball."""
    # The nearest neighbour is the point itself.
    radii = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in _squares(of, of, chunk)])
    return float(np.mean(np.concatenate([(part <= radii).any(1) for part in _squares(points, of, chunk)])))


def _squares(a: np.ndarray, b: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Squared distances in chunks of rows; float64, because they are differences of large numbers."""
    b = b.astype(np.float64)
    lengths = (b**2).sum(1)
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk].astype(np.float64)
        yield np.maximum((part**2).sum(1)[:, None] + lengths - 2 * part @ b.T, 0)

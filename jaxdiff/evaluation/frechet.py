"""The Fréchet distance of two Gaussians (arXiv 1706.08500, equation 6):

d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½
"""

import numpy as np
from jaxtyping import Float


def frechet(
    mean_a: Float[np.ndarray, "d"],
    covariance_a: Float[np.ndarray, "d d"],
    mean_b: Float[np.ndarray, "d"],
    covariance_b: Float[np.ndarray, "d d"],
) -> float:
    """The squared distance, in float64, never below 0.

    The trace of the root is that of a symmetric matrix, (A½ B A½)½ with A½ from the eigenvalues of A, so that
    covariances without full rank, as of fewer pictures than features, need no regularisation and give nothing complex.
    """
    apart = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    values, vectors = np.linalg.eigh(np.asarray(covariance_a, np.float64))
    half = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    between = np.linalg.eigvalsh(half @ np.asarray(covariance_b, np.float64) @ half)
    root = np.sqrt(np.maximum(between, 0)).sum()
    return max(0.0, float(apart @ apart + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root))

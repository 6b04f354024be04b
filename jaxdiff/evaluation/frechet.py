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
    """The squared distance, in float64, never below 0. ValueError for moments that are not finite.

    With Σ₁ = F Fᵀ and Σ₂ = G Gᵀ the trace of the root is the sum of the singular values of Fᵀ G. The eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½ are their squares: for rank-deficient covariances (fewer images than features), the root of a 0 rounded
    to 1e-16 would contribute 1e-8.
    """
    moments = [np.asarray(each, np.float64) for each in (mean_a, covariance_a, mean_b, covariance_b)]
    if not all(np.isfinite(each).all() for each in moments):
        raise ValueError("a Fréchet distance of moments that are not finite")
    mean_a, covariance_a, mean_b, covariance_b = moments
    apart = mean_a - mean_b
    root = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False).sum()
    return max(0.0, float(apart @ apart + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root))


def _factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """F with F Fᵀ = covariance, with as many columns as the numerical rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])

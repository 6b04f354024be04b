"""SSIM, the structural similarity of two images (Wang et al. 2004), a metric of reconstructions."""

import numpy as np
import scipy
from jaxtyping import Float

WIDTH, DEVIATION = 11, 1.5
"""Side and standard deviation of the Gaussian window, in pixels."""
C1, C2 = 0.01**2, 0.03**2
"""The paper's constants, for a range of 1."""


def ssim(first: Float[np.ndarray, "b h w c"], second: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """The SSIM of pairs of images in [-1, 1]; 1 if they are equal. The mean over channels and over all windows inside
    the image.

    Computed in float64 of values in [0, 1], because the luminance depends on where black is. ValueError for images
    smaller than a window.
    """
    if min(first.shape[1:3]) < WIDTH:
        raise ValueError(f"SSIM needs images of at least {WIDTH}×{WIDTH} pixels, not {first.shape[1]}×{first.shape[2]}")
    first, second = ((image.astype(np.float64) + 1.0) / 2.0 for image in (first, second))
    mean_1, mean_2 = _windows(first), _windows(second)
    variance_1, variance_2 = _windows(first**2) - mean_1**2, _windows(second**2) - mean_2**2
    covariance = _windows(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + C1) / (mean_1**2 + mean_2**2 + C1)
    structure = (2 * covariance + C2) / (variance_1 + variance_2 + C2)
    return (luminance * structure).mean((1, 2, 3))


def _windows(x: np.ndarray) -> np.ndarray:
    """Weighted means of all windows inside the images."""
    offsets = np.arange(WIDTH) - WIDTH // 2
    weights = np.exp(-0.5 * (offsets / DEVIATION) ** 2)
    weights /= weights.sum()
    border = WIDTH // 2
    correlate = scipy.ndimage.correlate1d
    return correlate(correlate(x, weights, 1), weights, 2)[:, border:-border, border:-border]

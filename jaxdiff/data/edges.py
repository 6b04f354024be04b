"""Edge maps of images by Canny's method (IEEE PAMI-8, 1986): hints for ControlNets, from images alone.

All arithmetic is in whole numbers, so that maps are the same on every machine and turn with the image.
"""

import numpy as np
import scipy
from jaxtyping import Float

WEIGHT = 256
"""Sum of the smoothing kernel, up to rounding."""


def edge_map(
    image: np.ndarray, low: float = 100.0, high: float = 200.0, *, sigma: float = 1.0, channels: int = 3
) -> Float[np.ndarray, "h w k"]:
    """The edges of an image, uint8 (h w c): float32, 1 on edges and 0 elsewhere, `channels` times the same.

    Edges are maxima of the gradient across the edge, one pixel wide: of two equal ones the brighter. They are kept
    where the gradient is above `high`, or above `low` and connected to such a pixel (8 neighbours). The gradient is
    |x| + |y| of 3×3 Sobel filters, of the channel in which it is largest: a sharp step of d levels has 4 d before
    smoothing. These are OpenCV's units, whose usual thresholds are the defaults.

    sigma: of the Gaussian that smooths the image first, in pixels; 0: none, as in the maps on which the public
    ControlNets were trained. ValueError for an image that is not uint8, or for low > high.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"an edge map needs a uint8 image of h×w×c, not {image.dtype} of {image.ndim} axes")
    if not 0.0 <= low <= high:
        raise ValueError(f"thresholds need 0 <= low <= high, not {low} and {high}")
    if not 0.0 <= sigma < 100.0:
        raise ValueError(f"sigma must lie in [0, 100), not {sigma}")
    smooth, scale = _smoothed(image.astype(np.int64), sigma)
    ridge, strength = _ridges(smooth)
    weak, strong = ridge & (strength > low * scale), ridge & (strength > high * scale)
    components, _ = scipy.ndimage.label(weak, np.ones((3, 3)))
    edges = weak & np.isin(components, np.unique(components[strong]))
    return np.repeat(edges[..., None].astype(np.float32), channels, axis=-1)


def _smoothed(image: np.ndarray, sigma: float) -> tuple[np.ndarray, int]:
    """The image times a scale, and that scale."""
    if sigma == 0.0:
        return image, 1
    offsets = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    gaussian = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = np.rint(WEIGHT * gaussian / gaussian.sum()).astype(np.int64)
    return _filtered(image, kernel, kernel), int(kernel.sum()) ** 2


def _filtered(image: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Correlate with a kernel along the rows' axis and one along the columns'; the border is repeated. Exact: the sums
    are whole numbers far below 2^53."""
    for axis, kernel in enumerate((down, across)):
        image = scipy.ndimage.correlate1d(image, kernel, axis, np.int64, "nearest")
    return image


def _ridges(smooth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the gradient is a maximum across the edge, and its strength."""
    blur, slope = np.asarray([1, 2, 1]), np.asarray([-1, 0, 1])
    y, x = _filtered(smooth, slope, blur), _filtered(smooth, blur, slope)
    pick = np.argmax(np.abs(x) + np.abs(y), axis=-1)[..., None]
    x, y = (np.take_along_axis(gradient, pick, -1)[..., 0] for gradient in (x, y))
    strength = np.abs(x) + np.abs(y)
    # |y| <= tan(22.5°) |x|, tan(22.5°) = √2 − 1, without roots.
    horizontal, vertical = strength**2 <= 2 * x**2, strength**2 <= 2 * y**2
    falling = ~horizontal & ~vertical & ((x > 0) == (y > 0))
    rising = ~horizontal & ~vertical & ~falling
    ridge = np.zeros(strength.shape, bool)
    for sector, step in ((horizontal, (0, 1)), (vertical, (1, 0)), (falling, (1, 1)), (rising, (1, -1))):
        ridge |= sector & _above(strength, smooth, pick, step) & _above(strength, smooth, pick, (-step[0], -step[1]))
    return ridge & (strength > 0), strength


def _above(strength: np.ndarray, smooth: np.ndarray, pick: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Where the gradient is above the one a step away, or equal and the pixel is brighter. Beyond the border is 0."""
    (height, width), (dy, dx) = strength.shape, step
    inner = slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width)
    there = np.pad(strength, 1)[inner]
    other = np.pad(smooth, ((1, 1), (1, 1), (0, 0)), "edge")[inner]
    value, beside = (np.take_along_axis(image, pick, -1)[..., 0] for image in (smooth, other))
    return (strength > there) | ((strength == there) & (value > beside))

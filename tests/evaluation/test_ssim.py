"""SSIM: the formula window by window."""

import numpy as np
import pytest

from jaxdiff.evaluation.ssim import ssim

RNG = np.random.default_rng(0)
FIRST = RNG.uniform(-1, 1, (2, 14, 13, 3)).astype("f4")
SECOND = np.clip(0.7 * FIRST + 0.2 * RNG.normal(size=FIRST.shape), -1, 1).astype("f4")


def directly(first, second):
    """Each window by itself, with weights of two dimensions."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    first, second = (0.5 + 0.5 * image.astype("f8") for image in (first, second))
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            for channel in range(first.shape[2]):
                a, b = (image[top : top + 11, left : left + 11, channel] for image in (first, second))
                (m, n), c, d = ((weights * each).sum() for each in (a, b)), 0.01**2, 0.03**2
                v, w, cov = (
                    (weights * (a - m) ** 2).sum(),
                    (weights * (b - n) ** 2).sum(),
                    (weights * (a - m) * (b - n)).sum(),
                )
                values.append((2 * m * n + c) * (2 * cov + d) / ((m**2 + n**2 + c) * (v + w + d)))
    return np.mean(values)


def test_formula():
    wanted = [directly(a, b) for a, b in zip(FIRST, SECOND)]
    np.testing.assert_allclose(ssim(FIRST, SECOND), wanted, rtol=1e-10)
    assert 0.1 < wanted[0] < 0.99


def test_known_values():
    """1 for equal images; negative for inverted ones; constants differ in luminance alone."""
    np.testing.assert_allclose(ssim(FIRST, FIRST), 1.0)
    assert (ssim(FIRST, -FIRST) < 0).all()
    grey = np.full((1, 11, 11, 1), -0.5)  # 1/4 and 1/2, where black is 0
    np.testing.assert_allclose(ssim(grey, 0.0 * grey), (2 * 0.25 * 0.5 + 1e-4) / (0.0625 + 0.25 + 1e-4))


def test_small_images():
    with pytest.raises(ValueError, match="SSIM needs images of at least 11×11 pixels, not 14×10"):
        ssim(FIRST[:, :, :10], SECOND[:, :, :10])

"""In which steps a hint acts, and its blocks of pixels."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import CosineSchedule
from jaxdiff.diffusion.time_grid import UniformLogSNR, UniformTime, time_grid
from jaxdiff.models.hints import HintImage, folded, traced, unfolded

IMAGE = np.zeros((4, 6, 3), "f4")


@pytest.mark.parametrize("spacing", [UniformTime(), UniformLogSNR()])
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_steps_in_which_it_acts(spacing, steps):
    """Those of diffusers: from the first that begins at `start` or later to the last that ends at `end` or earlier."""
    times = time_grid(CosineSchedule(), steps, spacing).t
    for start, end in ((0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.0, 0.2), (0.9, 1.0)):
        wanted = [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]
        if not any(wanted):
            with pytest.raises(ValueError, match=f"none of {steps} steps"):
                traced([HintImage(IMAGE, start=start, end=end)], 2, times)
            continue
        (hint,) = traced([HintImage(IMAGE, start=start, end=end)], 2, times)
        low, high = np.asarray(hint.times).T
        for row in range(2):
            assert [bool(low[row] <= t <= high[row]) for t in np.asarray(times[:-1])] == wanted


def test_all_steps_need_no_bounds():
    (hint,) = traced([HintImage(IMAGE, 0.7, guess=True)], 3, jnp.linspace(1, 0, 5))
    assert hint.times is None and hint.image.shape == (3, 4, 6, 3)
    np.testing.assert_allclose(hint.weight, 0.7)
    np.testing.assert_allclose(hint.fade, 1.0)


def test_rows():
    each = np.arange(3, dtype="f4")[:, None, None, None] * np.ones((1, 4, 6, 3), "f4") / 2
    rows = HintImage(each, 0.5, end=0.7).of_rows(np.asarray([2, 0, 2]))
    assert (rows.weight, rows.end) == (0.5, 0.7)
    np.testing.assert_array_equal(rows.image[:, 0, 0, 0], [1.0, 0.0, 1.0])
    assert HintImage(IMAGE).of_rows(np.asarray([5, 6])).image.shape == (2, 4, 6, 3)


def test_blocks():
    image = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    blocks = folded(image, (2, 3))
    assert blocks.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(blocks[1, 1, 2].reshape(2, 2, 3), image[1, 2:, 4:])
    np.testing.assert_array_equal(unfolded(blocks, 3), image)

"""The dominant colour of images on white."""

import numpy as np
import pytest

from jaxdiff.evaluation.colours import COLOURS, dominant


def picture(*parts: tuple[str, int]) -> np.ndarray:
    """White, 64×64, with so many rows of each colour."""
    image = np.full((64, 64, 3), 255.0)
    row = 0
    for colour, rows in parts:
        image[row : row + rows] = COLOURS[colour]
        row += rows
    return (image / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("colour", [name for name in COLOURS if name != "white"])
def test_each_colour_is_named(colour):
    assert dominant(picture((colour, 20))) == colour


def test_the_largest_area_wins_and_background_does_not_count():
    assert dominant(picture(("blue", 12), ("red", 9))) == "blue"
    assert dominant(picture(("blue", 9), ("red", 12))) == "red"


def test_an_empty_picture_is_white():
    assert dominant(picture()) == "white"


@pytest.mark.parametrize("colour", ["yellow", "red", "blue", "green"])
def test_shading_and_noise_do_not_change_the_name(colour):
    image = picture((colour, 30))
    shaded = image.copy()
    shaded[:30] = (shaded[:30] + 1) * np.linspace(0.8, 1.0, 30)[:, None, None] - 1
    noisy = shaded + np.random.default_rng(0).normal(0, 0.05, shaded.shape).astype(np.float32)
    assert dominant(noisy.astype(np.float32)) == colour

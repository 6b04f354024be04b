"""The drawings: exact distances and areas, the same image at every resolution."""

import math

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.data.shapes_draw import FILLINGS, OUTLINES, STRIPE, STROKE, coverage, draw
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, KINDS, REACH, Object, Scene, scene

AREAS = {  # of each outline, in squared radii, from its construction
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.3**2,
    "star": 5 * 1.18 * 0.6 * math.sin(math.pi / 5),
    "cross": 4 * (2 * 1.0 * 0.41) - (2 * 0.41) ** 2,
    "heart": 2 * 0.9**2 + math.pi * 0.9**2 / 2,
}


def grid(n=401, reach=1.5):
    axis = np.linspace(-reach, reach, n, dtype=np.float32)
    return np.broadcast_arrays(axis[None, :], axis[:, None]), axis[1] - axis[0]


def window(kind, fill, radius, resolution):
    every = slice(0, resolution)
    return coverage(kind, fill, 0.5, 0.5, radius, resolution, every, every)


@pytest.mark.parametrize("kind", KINDS)
def test_area(kind):
    assert window(kind, "solid", 0.3, 512).sum() / (0.3 * 512) ** 2 == pytest.approx(AREAS[kind], rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_euclidean(kind):
    """Against scipy's distance transform of the sampled shape, inside and outside."""
    (x, y), step = grid()
    signed = OUTLINES[kind](x, y)
    brute = np.where(signed > 0, 1, -1) * (
        ndimage.distance_transform_edt(signed > 0) + ndimage.distance_transform_edt(signed <= 0) - 0.5
    )
    assert np.abs(signed - brute * step).max() < 1.5 * step


@pytest.mark.parametrize("kind", KINDS)
def test_the_box_is_centred_and_within_reach(kind):
    (x, y), step = grid(601, 1.3)
    inside = OUTLINES[kind](x, y) <= 0
    for c in (x[inside], y[inside]):
        assert abs(c.min() + c.max()) < 2.5 * step
        assert c.max() < REACH


def test_fillings_paint_what_they_say():
    (x, y), _ = grid()
    d = OUTLINES["circle"](x, y)
    r = np.hypot(x, y)
    np.testing.assert_array_equal(FILLINGS["outlined"](d, y) < -1e-5, (r < 1 - 1e-5) & (r > 1 - STROKE + 1e-5))
    bare = (np.abs(y) > STRIPE[0]) & (np.abs(y) < STRIPE[1])
    clear = np.minimum(np.abs(np.abs(y) - STRIPE[0]), np.abs(np.abs(y) - STRIPE[1])) > 1e-4
    np.testing.assert_array_equal((FILLINGS["striped"](d, y) < 0)[clear], ((r < 1) & ~bare)[clear])


@pytest.mark.parametrize("resolution", [65, 256, 1024])
def test_every_resolution_shows_the_same_picture(resolution):
    for index in range(4):
        s = scene("train", index)
        small, large = draw(s, 64), draw(s, resolution)
        assert large.shape == (resolution, resolution, 3) and large.dtype == np.uint8
        if resolution % 64 == 0:
            k = resolution // 64
            averaged = large.reshape(64, k, 64, k, 3).mean((1, 3))
            # One clipped distance is not the exact coverage of a corner pixel, hence single pixels may differ more.
            assert np.abs(averaged - small).mean() < 0.5
            assert np.abs(averaged - small).max() < 80


def test_colours_are_exact_inside_and_outside():
    o = Object("square", "cyan", "large", "solid", 0.5, 0.5, 0.25)
    picture = draw(Scene("grey", (o,)), 128)
    assert tuple(picture[64, 64]) == COLOURS["cyan"] and tuple(picture[2, 2]) == BACKGROUNDS["grey"]


def test_nothing_touches_the_border():
    for split in ("train", "held_out"):
        for index in range(100):
            picture = draw(scene(split, index), 64)
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (border == border[0]).all()


def test_an_impossible_resolution_is_refused():
    with pytest.raises(ValueError, match="resolution 0"):
        draw(scene("train", 0), 0)

"""Edge maps: closed forms and symmetries."""

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.data.edges import edge_map

RNG = np.random.default_rng(0)
NOISE = ndimage.gaussian_filter(RNG.uniform(0, 255, (40, 56, 3)), (3, 3, 0))
NOISE = np.rint(255 * (NOISE - NOISE.min()) / np.ptp(NOISE)).astype("u1")


def square(low=0, high=255, channels=3):
    image = np.full((24, 30, channels), low, "u1")
    image[6:17, 8:22] = high
    return image


def ring():
    wanted = np.zeros((24, 30), bool)
    wanted[6:17, 8:22] = True
    wanted[7:16, 9:21] = False
    return wanted


@pytest.mark.parametrize("channels", [1, 3])
def test_outline_of_a_square(channels):
    """The square's own border, one pixel wide; the dark side of the same edge for a dark square."""
    got = edge_map(square(channels=channels), sigma=0.0)
    assert got.shape == (24, 30, 3) and got.dtype == np.float32
    np.testing.assert_array_equal(got, np.repeat(ring()[..., None], 3, -1))
    dark = edge_map(square(255, 0), sigma=0.0, channels=1)[..., 0]
    around = np.zeros((24, 30), bool)
    around[[5, 17], 9:21] = around[7:16, [7, 22]] = True  # the corners are cut
    around[np.ix_([6, 16], [8, 21])] = True
    np.testing.assert_array_equal(dark, around)


def test_smoothed_outline_is_one_pixel_wide():
    """Along the middle of each side; closed, so that the inside is not reached from the outside."""
    edges = edge_map(square(), sigma=1.4, channels=1)[..., 0].astype(bool)
    np.testing.assert_array_equal(edges[11], ring()[11])
    np.testing.assert_array_equal(edges[:, 14], ring()[:, 14])
    regions, count = ndimage.label(~edges)
    assert count == 2 and regions[0, 0] != regions[11, 14]


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5])
def test_rotation_commutes(sigma):
    turned = edge_map(np.ascontiguousarray(np.rot90(NOISE)), 10.0, 30.0, sigma=sigma)
    edges = edge_map(NOISE, 10.0, 30.0, sigma=sigma)
    assert 20 < edges[..., 0].sum() < 0.4 * edges[..., 0].size
    np.testing.assert_array_equal(turned, np.rot90(edges))
    np.testing.assert_array_equal(edge_map(NOISE[:, ::-1], 10.0, 30.0, sigma=sigma), edges[:, ::-1])


def test_no_edges():
    assert not edge_map(np.full((16, 16, 3), 77, "u1"), 0.0, 0.0).any()
    ramp = np.repeat(np.arange(0, 160, 5, dtype="u1")[None, :, None], 8, 0)
    assert not edge_map(ramp, 41.0, 41.0, sigma=0.0).any()  # its gradient is 8 · 5 at most
    assert edge_map(square(100, 126), 50.0, 150.0, sigma=0.0).any()
    assert not edge_map(square(100, 125), 50.0, 150.0, sigma=0.0).any()


def test_an_edge_between_colours_of_equal_brightness():
    image = np.zeros((12, 12, 3), "u1")
    image[:, :5, 0], image[:, 5:, 1] = 200, 200
    edges = edge_map(image, channels=1)[..., 0]
    np.testing.assert_array_equal(edges.sum(1), 1)
    assert edges[:, 4].all()


def test_monotone_in_both_thresholds():
    def edges(low, high):
        return edge_map(NOISE, low, high, channels=1).astype(bool)

    for loose, tight in (((10.0, 150.0), (80.0, 150.0)), ((10.0, 80.0), (10.0, 150.0)), ((5.0, 5.0), (90.0, 90.0))):
        assert not (edges(*tight) & ~edges(*loose)).any()
        assert edges(*tight).sum() < edges(*loose).sum()


def test_weak_edges_need_a_strong_one():
    """Hysteresis: a line whose contrast fades stays connected; the same weak line alone is dropped."""
    image = np.zeros((20, 40, 1), "u1")
    image[10:] = np.linspace(80, 30, 40)[None, :, None]
    edges = edge_map(image, 100.0, 250.0, sigma=0.0, channels=1)[..., 0]
    assert edges[10].all()
    alone = edge_map(image[:, 20:], 100.0, 250.0, sigma=0.0, channels=1)
    assert not alone.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": NOISE.astype("f4")}, "uint8 image of h×w×c, not float32 of 3 axes"),
        ({"image": NOISE[..., 0]}, "not uint8 of 2 axes"),
        ({"low": 20.0, "high": 10.0}, "0 <= low <= high, not 20.0 and 10.0"),
        ({"low": float("nan")}, "0 <= low <= high"),
        ({"sigma": -1.0}, r"sigma must lie in \[0, 100\)"),
    ],
)
def test_refused(change, message):
    with pytest.raises(Exception, match=message):
        edge_map(**({"image": NOISE} | change))

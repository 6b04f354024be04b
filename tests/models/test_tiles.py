"""Tiles: the image is the same as without them, as far as the network is local, and nowhere is there a seam."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SR, random_params

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles, in_tiles, ramp, starts
from jaxdiff.nets.unet import AttentionConfig

RNG = np.random.default_rng(0)
LAYOUTS = [
    ((32, 32), Tiles(16, 4)),
    ((40, 24), Tiles(16, 8)),
    ((16, 50), Tiles(16, 2)),
    ((10, 64), Tiles(16, 4)),  # lower than a tile
    ((12, 12), Tiles(16, 4)),  # one tile
    ((33, 47), Tiles(16, 6)),
]


def pointwise(a, b):
    """Another value at each pixel, and in a channel of its own the same everywhere."""
    return jnp.concatenate([jnp.sin(3 * a) * b + 0.1, jnp.ones_like(a[..., :1])], -1)


@pytest.mark.parametrize(("size", "tiles"), LAYOUTS, ids=str)
def test_a_pointwise_network_does_not_notice(size, tiles):
    """And the weights sum to one: what is the same everywhere stays so."""
    a, b = (jnp.asarray(RNG.normal(size=(2, *size, 3)), jnp.float32) for _ in range(2))

    def network(a, b):
        assert a.shape[1:3] == (min(tiles.side, size[0]), min(tiles.side, size[1]))
        return pointwise(a, b)

    found, wanted = jax.jit(lambda a, b: (in_tiles(network, (a, b), tiles), pointwise(a, b)))(a, b)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(found[..., 3], 1.0, atol=1e-6)


@pytest.mark.parametrize(("length", "tiles"), [(32, Tiles(16, 4)), (1024, Tiles(256, 32)), (70, Tiles(16, 6))], ids=str)
def test_every_pixel_is_in_a_tile_and_borders_overlap(length, tiles):
    begins = starts(length, tiles.side, tiles)
    assert begins[0] == 0 and begins[-1] == length - tiles.side
    steps = np.diff(begins)
    assert (steps > 0).all() and (steps <= tiles.side - tiles.overlap).all()


def test_ramp_rises_over_the_overlap_and_is_never_zero():
    weights = ramp(16, Tiles(16, 4))
    np.testing.assert_allclose(weights[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_array_equal(weights, weights[::-1])
    assert (weights[4:12] == 1).all()


@pytest.mark.parametrize(("side", "overlap"), [(16, 0), (16, 9), (16, -2), (0, 0)])
def test_tiles_that_make_no_sense(side, overlap):
    with pytest.raises(ValueError, match="tiles need an overlap"):
        Tiles(side, overlap)


TILES = Tiles(32, 8)
SIDE = 80


@pytest.fixture(scope="module")
def enlarged():
    """(untiled, tiled) images of a random super-resolution network, which enlarges a smooth image."""
    unet = replace(SR.unet, attention=AttentionConfig((False,), (True,), heads=2))
    model = replace(SR, unet=unet, side=SIDE, prediction=Prediction.X0, residual=True)
    y, x = np.mgrid[: SIDE // 4, : SIDE // 4] / 16
    low_res = np.stack([0.7 * np.sin(3 * x + c) * np.cos(2 * y - c) for c in range(3)], -1)[None]
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(1))
    params = random_params(model)
    params["head"] = jax.tree.map(lambda leaf: 0.2 * leaf, params["head"])

    def run(tiles):
        sampling = SamplingConfig(DDIM(), 3, thresholding=StaticThreshold(), tiles=tiles)
        trained = TrainedModel(model, params, sampling)
        return np.asarray(trained.decode(jnp.asarray(low_res, jnp.float32), SampleRequest(keys, (SIDE, SIDE))))

    return run(None), run(TILES)


def test_tiles_change_little(enlarged):
    whole, tiled = enlarged
    assert whole.std() > 0.1
    assert np.abs(whole - tiled).mean() < 0.1 * whole.std()
    assert np.abs(whole - tiled).max() > 0  # they did run


def test_no_seam(enlarged):
    """Steps between neighbouring pixels are no larger at the tiles' borders than elsewhere."""
    whole, tiled = enlarged
    begins = starts(SIDE, TILES.side, TILES)
    borders = sorted({edge for b in begins for edge in (b, b + TILES.side)} - {0, SIDE})
    assert borders == [24, 32, 48, 56]
    for picture in (tiled, tiled.swapaxes(1, 2)):
        steps = np.abs(np.diff(picture, axis=1)).mean((0, 2, 3))  # between rows i and i + 1
        at_borders = steps[np.array(borders) - 1]
        elsewhere = np.delete(steps, np.array(borders) - 1)
        assert at_borders.mean() < 1.1 * elsewhere.mean()
        assert at_borders.max() < elsewhere.max()
        # What the tiles changed is smooth too: no jump of the difference to the untiled image.
        jumps = np.abs(np.diff(tiled - whole, axis=1)).mean((0, 2, 3))
        assert jumps[np.array(borders) - 1].max() < 0.5 * steps.mean()


def test_a_hard_cut_would_be_seen(enlarged):
    """The measure above finds the seam of tiles that are set side by side."""
    whole, tiled = enlarged
    cut = tiled.copy()
    cut[:, 32:] += 0.1
    steps = np.abs(np.diff(cut, axis=1)).mean((0, 2, 3))
    jumps = np.abs(np.diff(cut - whole, axis=1)).mean((0, 2, 3))
    assert jumps[31] > 0.5 * steps.mean()


def peak_of(side, tile):
    """Peak resident bytes of a process that draws such an image; its largest stage, which alone decides them."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    script = str(Path(__file__).with_name("draw_1024.py"))
    done = subprocess.run(
        [sys.executable, script, str(side), str(tile), "last"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_drawing_1024_pixels_takes_less_than_two_gigabytes():
    assert peak_of(1024, 256) < 2 * 1024**3


def test_a_picture_no_larger_than_a_tile_is_one_tile():
    assert starts(32, 32, Tiles(256, 32)) == [0]  # as large as the overlap, too
    assert starts(33, 32, Tiles(32, 8)) == [0, 1]

"""Large images in tiles: as diffusers blends them, and without seams."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small

from jaxdiff.models import autoencoder_tiles
from jaxdiff.models.autoencoder_tiles import SeamlessTiles
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.autoencoder import AttentionBlock, AutoencoderConfig

CONFIG = AutoencoderConfig((4, 8), 1, 4, norm_groups=2, middle_attention=False)
"""Of stride 2."""
PARAMS = small.random_params(CONFIG)


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch", reason="diffusers' autoencoders are PyTorch's")
    pytest.importorskip("diffusers", reason="the independent tiles are diffusers'")
    from safetensors.numpy import save
    from safetensors.torch import load

    from jaxdiff.core import trees
    from jaxdiff.weights import autoencoder, hub

    model = small.diffusers_model(CONFIG, sample_size=16)
    named = autoencoder.key_map(PARAMS)
    tensors = {named[path]: hub.theirs(path, np.asarray(leaf)) for path, leaf in trees.flatten(PARAMS).items()}
    model.load_state_dict(load(save(tensors)))
    model.enable_tiling()
    assert (model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor) == (16, 8, 0.25)

    def run(x, encode):
        with torch.no_grad():
            x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
            y = model.encode(x).latent_dist.parameters if encode else model.decode(x).sample
        return y.permute(0, 2, 3, 1).numpy()

    return run


@pytest.mark.parametrize(("run", "size"), [("decode", (12, 13)), ("encode", (8, 13)), ("encode", (12, 8))])
def test_blended_as_diffusers_does(run, size, theirs):
    """Sides that are, and are not, multiples of the distance of 6 between tiles; a last tile of one code."""
    if run == "encode":
        x = jnp.asarray(small.image(2 * size[0], 2 * size[1], 1))
    else:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)), jnp.float32)
    blended, wanted = getattr(autoencoder_tiles, run)(CONFIG, PARAMS, x, Tiles(16, 4)), theirs(x, run == "encode")
    assert blended.shape == wanted.shape
    np.testing.assert_allclose(blended, wanted, atol=1e-5 * np.abs(wanted).max())


def test_small_images_are_one_tile():
    x = jnp.asarray(small.image(16, 12))
    for tiles in (Tiles(16, 4), SeamlessTiles(16)):
        np.testing.assert_array_equal(
            autoencoder_tiles.encode(CONFIG, PARAMS, x, tiles), autoencoder_tiles.encode(CONFIG, PARAMS, x, None)
        )


def uneven(height, width, channels=4):
    """Maps whose statistics differ from place to place."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[0:height, 0:width][..., None]
    smooth = np.sin(y / 7 + np.arange(channels)) * (1 + x / width) + (x > width / 2) * np.arange(channels)
    return jnp.asarray(smooth + rng.normal(size=(2, height, width, channels)) * (0.1 + y / height), jnp.float32)


@pytest.mark.parametrize(("run", "size"), [("decode", (40, 33)), ("encode", (50, 14))])
def test_seamless(run, size):
    """The tiles give the result of the entire image; the fewer the passes, the less exactly."""
    run, x = getattr(autoencoder_tiles, run), uneven(*size) if run == "decode" else uneven(2 * size[0], 2 * size[1], 3)
    entire = run(CONFIG, PARAMS, x, None)
    errors = [
        np.abs(run(CONFIG, PARAMS, x, SeamlessTiles(28, tolerance)) - entire).max() / np.abs(entire).std()
        for tolerance in (0.0, 2e-3, 1e9)
    ]
    print(errors)
    assert errors[0] < 1e-4 and errors[1] < 2 / 255 and errors[2] > 0.02


@pytest.mark.parametrize("run", ["decode", "encode"])
def test_seamless_with_layer_norm(run, monkeypatch):
    """No statistics of the image: one pass is exact."""
    config = replace(CONFIG, norm_groups=0)
    params, run = small.random_params(config), getattr(autoencoder_tiles, run)
    x = uneven(80, 66, 3) if run is autoencoder_tiles.encode else uneven(40, 33)
    first_pass, region = [], autoencoder_tiles._region
    monkeypatch.setattr(autoencoder_tiles, "_region", lambda area, own: first_pass.append(own) or region(area, own))
    tiled, entire = run(config, params, x, SeamlessTiles(28)), run(config, params, x, None)
    np.testing.assert_allclose(tiled, entire, atol=1e-5 * np.abs(entire).max())
    assert len(first_pass) > 2 and all(first_pass)


def test_regions_cover_the_image_once():
    """Each position belongs to one tile, and lies as far from that tile's borders as the network reaches."""
    for length in range(1, 60):
        for side, reach in ((11, 5), (16, 3), (8, 0)):
            spans = list(autoencoder_tiles._spans(length, min(side, length), reach))
            assert [span[1] for span in spans] == [0, *(span[2] for span in spans[:-1])]
            assert spans[-1][2] == length
            for start, first, last in spans:
                end = start + min(side, length)
                assert 0 <= start <= first < last <= end <= length
                assert first - start >= reach or start == 0
                assert end - last >= reach or end == length


def test_one_program_per_tile_shape():
    """Images of other sizes compile nothing anew, apart from slices."""
    run, tiles = autoencoder_tiles._fine, SeamlessTiles(28, 1e9)
    autoencoder_tiles.decode(CONFIG, PARAMS, uneven(40, 33), tiles)
    programs = run._cache_size()
    for size in ((33, 58), (70, 40)):
        autoencoder_tiles.decode(CONFIG, PARAMS, uneven(*size), tiles)
    assert run._cache_size() == programs


def test_tiles_that_do_not_fit():
    for tiles, message in (
        (Tiles(15, 4), "a tile side of 15 pixels is not a multiple of the stride 2"),
        (Tiles(16, 3), "a tile overlap of 3 pixels is not a multiple"),
        (SeamlessTiles(8), "seamless tiles of 8 pixels are too small: .* at least 18 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            autoencoder_tiles.check_tiles(CONFIG, tiles)
    for refused in ({"side": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="tiles need a side"):
            SeamlessTiles(**refused)


def test_memory_of_attention():
    """Over 65,536 codes, of 2048×2048 pixels: 17 GB for all logits at once."""
    lowered = jax.jit(AttentionBlock(4, "float32").apply).lower(
        jax.eval_shape(AttentionBlock(4, "float32").init, jax.random.key(0), jnp.zeros((1, 2, 2, 16))),
        jax.ShapeDtypeStruct((1, 256, 256, 16), "f4"),
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.5e9


LARGE = """
import resource, sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
import small_autoencoder as small
from dataclasses import replace
from jaxdiff.models import autoencoder_tiles
from jaxdiff.models.tiles import Tiles
config = replace(small.KL8, blocks=1, middle_attention="attention" in sys.argv)
z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 256, 256, 4)), jnp.float32)
tiles = Tiles(512, 128) if sys.argv[1] == "blended" else autoencoder_tiles.SeamlessTiles(512, 1e9)
image = autoencoder_tiles.decode(config, small.random_params(config), z, tiles)
assert image.shape == (1, 2048, 2048, 3) and bool(jnp.isfinite(image).all())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blended", "seamless"])
def test_memory_of_a_large_image(kind):
    """2048×2048 pixels; a process of its own measures its peak."""
    command = [sys.executable, "-c", LARGE, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    print(f"{kind}: {int(done.stdout.split()[-1]) / 1e9:.2f} GB")
    assert int(done.stdout.split()[-1]) < 2e9

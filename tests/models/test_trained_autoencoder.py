"""The autoencoder as a box of a pipeline. Its networks are compared with diffusers' in tests/weights."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small

from jaxdiff.core.products import ImageSpec, LatentSpec, same_kind
from jaxdiff.diffusion import noise
from jaxdiff.models import autoencoder_tiles
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_tiles import SeamlessTiles
from jaxdiff.models.boxes import Decoder, Encoding
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck

KL = AutoencoderConfig((4, 8), 1, 4, norm_groups=2)
VQ = replace(KL, bottleneck=VQBottleneck(20, 5))
"""Both of stride 2."""
PARAMS = {config: small.random_params(config) for config in (KL, VQ)}
KEYS = noise.sample_keys(jax.random.key(0), jnp.arange(2))


def network(config, method, x):
    """The networks themselves are compared with diffusers' in tests/weights."""
    return autoencoder_tiles._run(config, method, PARAMS[config], x)


def box(config=KL, **more):
    return TrainedAutoencoder(config, PARAMS[config], **{"scale": 0.25, "side": 16, **more})


def latents(config=KL, height=4, width=6):
    shape = (2, height, width, config.code_channels)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def request(size=(8, 12), **more):
    return SampleRequest(KEYS, size, **more)


@pytest.mark.parametrize("config", [KL, VQ])
def test_it_is_a_box(config):
    each = box(config)
    assert isinstance(each, Decoder) and isinstance(each, Encoding)
    assert (each.side, each.factor, each.steps, each.reads, each.reads_padding) == (16, 2, 1, None, False)
    assert each.produces == ImageSpec(3, 2) and each.consumes == LatentSpec(config.code_channels, 2)
    assert same_kind(LatentSpec(config.code_channels, 1), each.consumes) and each.batch_size(7) == 7


def test_decode():
    """The network's image of the codes, clipped; one step is reported."""
    steps = []
    image = box().decode(latents(), request(progress=steps.append))
    wanted = network(KL, "decode", latents() / 0.25)
    np.testing.assert_allclose(image, np.clip(wanted, -1, 1), atol=1e-5)
    np.testing.assert_allclose(box().decoded(latents()), wanted, atol=1e-5)
    assert steps == [1] and np.abs(wanted).max() > 1.1 and image.dtype == jnp.float32


def test_decode_of_vq():
    """With the nearest codes: a small change of the latents leaves the image as it is."""
    image = box(VQ).decode(latents(VQ), request())
    code, _ = nets.quantize(latents(VQ) / 0.25, PARAMS[VQ]["codebook"])
    wanted = network(VQ, "decode", code)
    np.testing.assert_allclose(image, np.clip(wanted, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(image, box(VQ).decode(code * 0.25 + 1e-4, request()))


def test_encode():
    """The scaled mean; with keys a sample, whose noise depends on an image's own key only."""
    image = jnp.asarray(small.image(8, 12))
    each = box()
    output = network(KL, "encode", image)
    mean, logvar = np.split(np.asarray(output), 2, axis=-1)
    np.testing.assert_allclose(each.encode(image), 0.25 * mean, atol=1e-5)
    eps = np.stack([jax.random.normal(key, mean.shape[1:]) for key in KEYS])
    sample = each.encode(image, KEYS)
    np.testing.assert_allclose(sample, 0.25 * (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * eps), rtol=1e-4)
    np.testing.assert_allclose(each.encode(image[1:], KEYS[1:]), sample[1:], rtol=1e-4)


def test_encode_of_vq():
    image = jnp.asarray(small.image(8, 12))
    code = network(VQ, "encode", image)
    np.testing.assert_allclose(box(VQ).encode(image), 0.25 * code, atol=1e-5)
    np.testing.assert_array_equal(box(VQ).encode(image, KEYS), box(VQ).encode(image))


def test_tiles():
    """Values are in the tests of the tiles."""
    codes, tiles = latents(height=6, width=4), Tiles(8, 2)
    image = box(tiles=tiles).decode(codes, request((12, 8)))
    np.testing.assert_array_equal(image, np.clip(autoencoder_tiles.decode(KL, PARAMS[KL], codes / 0.25, tiles), -1, 1))
    assert np.abs(image - box().decode(codes, request((12, 8)))).max() > 0.01
    image = jnp.asarray(small.image(30, 8))
    np.testing.assert_allclose(box(tiles=SeamlessTiles(26)).encode(image), box().encode(image), atol=2e-3)


def test_sizes_that_are_refused():
    each = box()
    for size in ((8, 11), (0, 8), (7, 8)):
        with pytest.raises(ValueError, match=rf"{min(size, key=lambda n: n % 2 == 0)} pixels is not a multiple of"):
            each.check(size)
    with pytest.raises(ValueError, match="11 pixels is not a multiple of the autoencoder's stride 2"):
        each.encode(jnp.zeros((1, 8, 11, 3)))
    with pytest.raises(ValueError, match="these latents are those of 8×12 pixels, not of 12×8"):
        each.decode(latents(), request((12, 8)))
    with pytest.raises(ValueError, match="the latents has the shape 2×4×6×3, which is not a batch of latents of 4"):
        each.decode(latents()[..., :3], request())
    with pytest.raises(ValueError, match="the image has the shape 2×8×8×4"):
        each.encode(jnp.zeros((2, 8, 8, 4)))
    with pytest.raises(ValueError, match="scale must be above 0"):
        box(scale=0.0)
    with pytest.raises(ValueError, match="a tile side of 7 pixels"):
        box(tiles=Tiles(7, 2))


def test_half_precision():
    """Near float32, and equal to it with `upcast`."""
    half = replace(KL, dtype="bfloat16")
    wanted = box().decode(latents(), request())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = TrainedAutoencoder(half, PARAMS[KL], 0.25).decode(latents(), request())
        np.testing.assert_array_equal(
            TrainedAutoencoder(half, PARAMS[KL], 0.25, True).decode(latents(), request()), wanted
        )
    assert 0 < np.abs(image - wanted).max() < 0.2


def test_overflow_in_half_precision():
    """A warning, and the image of float32; latents that are not finite are not the network's fault."""
    half = replace(KL, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf, PARAMS[KL])
    params["decoder"]["head"]["bias"] = params["decoder"]["head"]["bias"].at[0].set(3.4e38)  # bfloat16 ends at 3.39e38
    each = TrainedAutoencoder(half, params, 0.25)
    with pytest.warns(
        UserWarning, match="decode in bfloat16 gave values that are not finite: it is repeated in float32"
    ):
        image = each.decode(latents(), request())
    np.testing.assert_array_equal(image, replace(each, upcast=True).decode(latents(), request()))
    assert np.isfinite(image).all() and (image[..., 0] == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = each.decode(latents().at[0, 0, 0, 0].set(jnp.nan), request())
    assert np.isnan(broken).any()

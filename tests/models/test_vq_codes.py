"""A VQ autoencoder as a decoder of codes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small

from jaxdiff.core.products import ImageSpec, TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.vq_codes import VQCodes

CONFIG = replace(small.VQ8, channels=(4, 8, 8), blocks=1, attention_levels=(2,))
TRAINED = TrainedAutoencoder(CONFIG, small.random_params(CONFIG), 0.7, side=32)


def test_codes_are_the_numbers_of_the_entries():
    """Decoding the codes of an image is decoding its latents, whatever their scale."""
    box = VQCodes(TRAINED)
    assert (box.consumes, box.produces) == (TokenSpec(CONFIG.bottleneck.codes, 4), ImageSpec(3, 4))
    assert (box.side, box.factor) == (32, 4)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)), jnp.float32)
    codes = box.encode(image)
    assert codes.shape == (2, 4, 2) and codes.dtype == jnp.int32
    wanted = TRAINED.decoded(TRAINED.encode(image))
    np.testing.assert_allclose(box.decoded(codes), wanted, atol=1e-5)
    request = SampleRequest(noise.sample_keys(jax.random.key(0), jnp.arange(2)), (16, 8))
    np.testing.assert_allclose(box.decode(codes, request), jnp.clip(wanted, -1, 1), atol=1e-5)


def test_images_in_the_unit_interval():
    """The network's images are in [0, 1], those of the box in [-1, 1]."""
    box = VQCodes(TRAINED, unit=True)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)), jnp.float32)
    codes = box.encode(image)
    np.testing.assert_array_equal(codes, VQCodes(TRAINED).encode((image + 1) / 2))
    inner = VQCodes(TRAINED).decoded(codes)
    np.testing.assert_allclose(box.decoded(codes), 2 * inner - 1, atol=1e-5)
    request = SampleRequest(noise.sample_keys(jax.random.key(0), jnp.arange(2)), (16, 8))
    np.testing.assert_allclose(box.decode(codes, request), 2 * jnp.clip(inner, 0, 1) - 1, atol=1e-5)


def test_refused():
    with pytest.raises(ValueError, match="a KL autoencoder has no codes"):
        VQCodes(TrainedAutoencoder(small.KL8, {}))
    with pytest.raises(ValueError, match="not a multiple of the autoencoder's stride 4"):
        VQCodes(TRAINED).check((16, 10))

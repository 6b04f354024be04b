"""Imagen as a system: its pipeline is built from a T5, a base and decoders that are made here, and samples."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import LENGTH, WIDTH, filled, random_params

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import byte_tokenizer

SAMPLING = SamplingConfig(DDIM(), 2, guidance=Guidance(2.0))


@pytest.fixture(scope="module")
def encoder():
    config = T5Config(vocab=384, d_model=WIDTH, d_kv=4, d_ff=8, layers=1, decoder_layers=0, heads=2)
    ids = jnp.zeros((1, LENGTH), int)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    return T5TextEncoder(config, filled(shapes), byte_tokenizer(), LENGTH)


def trained(model):
    return TrainedModel(model, random_params(model), SAMPLING)


def test_it_is_built_and_samples(encoder):
    base, larger = trained(replace(small.BASE, side=4)), trained(small.SR)
    pipeline = imagen(encoder, base, larger, trained(replace(small.SR, side=64)))
    assert (pipeline.text_encoder, pipeline.generator, pipeline.decoders[0]) == (encoder, base, larger)
    assert pipeline.sides == (4, 16, 64)
    images = pipeline.sample(["ab", "c"], SampleOptions(seed=1, last=1))
    assert [image.shape for image in images] == [(2, 4, 4, 3), (2, 16, 16, 3)]
    assert all(np.isfinite(image).all() and np.abs(image).max() <= 1 for image in images)
    assert np.abs(images[1][0] - images[1][1]).max() > 0.05


def test_another_text_encoder_is_refused(encoder):
    base = trained(small.BASE)
    with pytest.raises(ValueError, match="embeddings of width 6, 8 of them; the 8 stage reads 6, 4 of them"):
        imagen(replace(encoder, length=8), base)
    with pytest.raises(ValueError, match="the 8 stage has no text encoder set"):
        imagen(encoder, replace(base, model=replace(base.model, conditioners=(replace(small.TEXT, width=None),))))

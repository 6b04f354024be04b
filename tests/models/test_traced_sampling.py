"""One compiled program serves a hundred settings that only scale; and a pipeline's sampling is flat."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from small import LENGTH, SR, WIDTH, Formula

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.start import InitProduct
from jaxdiff.text.encoder import TextEmbedding

RNG = np.random.default_rng(0)
TEXT = TextEmbedding(jnp.asarray(RNG.normal(size=(2, LENGTH, WIDTH)), jnp.float32), jnp.ones((2, LENGTH), bool))
LOWER = jnp.asarray(RNG.uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
IMAGE = jnp.asarray(RNG.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)


def network(x, time, text, mask, low_res, level):
    return jnp.tanh(x) * 0.3 + low_res * jnp.tanh(text.mean((1, 2)) + level)[:, None, None, None]


MODEL = replace(SR, unet=Formula(output=network), prediction=Prediction.X0)


def sampled(number):
    """With settings of their own: weight, interval, percentile, cap, level, strength and seed."""
    share = number / 100
    guidance = Guidance(1.5 + share, (-8.0 - share, 4.0 + share), rescale=0.2 + share / 2)
    thresholding = DynamicThreshold(0.8 + share / 10, cap=1.2 + share)
    sampling = SamplingConfig(DPMSolverPP2M(), 8, guidance=guidance, thresholding=thresholding, aug_level=share / 2)
    keys = noise.sample_keys(jax.random.key(number), jnp.arange(2))
    init = InitProduct(IMAGE, strength=0.3 + 0.7 * share)
    return np.asarray(TrainedModel(MODEL, {}, sampling).decode(LOWER, SampleRequest(keys, (16, 16), TEXT, init=init)))


def test_a_hundred_settings_compile_once():
    first = sampled(0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        images = [sampled(number) for number in range(1, 100)]
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "backend_compile" in event]
    assert len(np.unique([image.sum() for image in [first, *images]])) == 100  # each of them counts
    np.testing.assert_array_equal(sampled(0), first)

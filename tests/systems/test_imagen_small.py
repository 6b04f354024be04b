"""The models between the toy and the paper: their sizes are their names, and they train and sample at their sides."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.schedules import CosineSchedule, LinearBetaSchedule
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.systems import imagen
from jaxdiff.systems.imagen_small import (
    BASE_64_50M,
    BASE_64_120M,
    SAMPLING_BASE_SMALL,
    SAMPLING_SR_SMALL,
    SR_256_MEDIUM,
    SR_256_SMALL,
    SR_1024_MEDIUM,
    SR_1024_SMALL,
)
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.state import abstract_params, loss_inputs
from jaxdiff.weights.sizes import check_model

MODELS = {
    "base64-50m": (BASE_64_50M, SAMPLING_BASE_SMALL, 50, 64),
    "base64-120m": (BASE_64_120M, SAMPLING_BASE_SMALL, 120, 64),
    "sr256-small": (SR_256_SMALL, SAMPLING_SR_SMALL, 30, 256),
    "sr256-medium": (SR_256_MEDIUM, SAMPLING_SR_SMALL, 120, 256),
    "sr1024-small": (SR_1024_SMALL, SAMPLING_SR_SMALL, 30, 1024),
    "sr1024-medium": (SR_1024_MEDIUM, SAMPLING_SR_SMALL, 120, 1024),
}
TINY_T5, T5_XXL = (24, 128), imagen.T5_XXL


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def preset(request):
    return request.param


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))


def test_it_has_the_size_of_its_name(preset):
    """With the paper's text encoder, whose embeddings are the widest."""
    model, _, millions, _ = preset
    assert count(model.reading(*T5_XXL)) / 1e6 == pytest.approx(millions, rel=0.1)


def test_a_smaller_text_encoder_changes_its_size_little():
    assert 0.95 < count(BASE_64_50M.reading(*TINY_T5)) / count(BASE_64_50M.reading(*T5_XXL)) < 1


def test_what_it_keeps_of_the_papers(preset):
    model, _, _, side = preset
    paper = {64: imagen.BASE_64_2B, 256: imagen.SR_256, 1024: imagen.SR_1024}[side]
    assert model.side == side and model.side % model.unet.stride == 0 and side // 4 % model.unet.stride == 0
    assert (model.schedule, model.prediction, model.conditioners) == (
        paper.schedule,
        paper.prediction,
        paper.conditioners,
    )
    assert model.unet.attention == paper.unet.attention and model.unet.stride == paper.unet.stride
    assert side == 64 or (model.unet.blocks, model.unet.multipliers) == (paper.unet.blocks, paper.unet.multipliers)
    assert type(model.schedule) is (LinearBetaSchedule if side == 1024 else CosineSchedule)
    check_model(model.reading(*T5_XXL), "here")
    # Tensor cores and cuDNN's attention take multiples.
    widths = [model.unet.width(level) for level in range(len(model.unet.blocks))]
    assert all(width % 32 == 0 for width in widths)
    heads = [model.unet.heads_at(level) for level in range(len(widths)) if model.unet.attention.self_attention[level]]
    assert all(width % count == 0 and width // count % 8 == 0 for width, count in zip(widths[-len(heads) :], heads))


def sampled(model, sampling, side):
    """One step of guided sampling, to a batch of that side."""

    def step(params, keys, tokens, mask, low_res):
        text = TextEmbedding(tokens, mask)
        return TrainedModel(model, params, sampling).decode(low_res, SampleRequest(keys, (side, side), text))

    return step


def sampling_inputs(model, rows, side):
    spec = model.batch_spec(rows, side)
    tokens = spec["text"].update(dtype=jnp.float32)
    keys = jax.eval_shape(lambda: noise.sample_keys(jax.random.key(0), jnp.arange(rows)))
    return keys, tokens, spec["text_mask"], spec.get("low_res")


@pytest.mark.parametrize("name", ["base64-50m", "sr256-small", "sr1024-small"])
def test_shapes_of_a_loss_and_a_sampling_step_at_its_side(name):
    """One of each network: the larger ones differ in widths and numbers of blocks."""
    model, sampling, _, side = MODELS[name]
    model = model.reading(*T5_XXL)
    crop = side if model.low_res is None else side // 4
    loss, _ = jax.eval_shape(model.loss, *loss_inputs(model, model.batch_spec(2, crop)))
    assert loss.shape == () and sampling.guidance.on
    step = sampled(model, replace(sampling, steps=1), side)
    images = jax.eval_shape(step, abstract_params(model), *sampling_inputs(model, 1, side))
    assert images.shape == (1, side, side, 3)


@pytest.mark.slow
def test_it_trains_and_samples(preset):
    """One step each of the network as it is, on the smallest images that it takes."""
    model, sampling, _, _ = preset
    model = model.reading(*TINY_T5)
    side = model.unet.stride
    params = jax.jit(model.init)(jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    batch = {
        name: jnp.asarray(rng.normal(size=spec.shape), spec.dtype) for name, spec in model.batch_spec(2, side).items()
    }
    gradient = jax.jit(jax.grad(lambda p, b, k: model.loss(p, (), (), b, k, jnp.int32(0))[0]))
    found = gradient(params, batch, jax.random.key(1))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    assert float(jnp.abs(found["head"]["kernel"]).max()) > 0  # the last layer begins at zero: it alone has a gradient
    step = sampled(model, replace(sampling, steps=1), side)
    given = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in sampling_inputs(model, 1, side)[1:3]]
    low_res = None if model.low_res is None else jnp.zeros((1, side // 4, side // 4, 3))
    image = step(params, noise.sample_keys(jax.random.key(0), jnp.arange(1)), *given, low_res)
    assert image.shape == (1, side, side, 3) and bool(jnp.isfinite(image).all()) and float(jnp.abs(image).max()) <= 1

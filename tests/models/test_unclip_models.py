"""unCLIP's models in training: the empty caption with its mask, the learned null embedding, an input without noise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import WIDTH, filled, loss_of

from jaxdiff.diffusion import noise
from jaxdiff.models.conditioners import LowResConditioner, NullText, TextConditioner
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.image_readers import TextWithImage
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems import karlo

KEY = jax.random.key(0)
NONE = (False, False)
TINY = {"channels": 8, "multipliers": (1, 2), "blocks": (1, 1)}
UNET = UNetConfig(
    **TINY,
    attention=AttentionConfig((False, True), NONE, head_channels=8, normalize_text=False),
    conditioning=ConditioningConfig(16, TextWithImage(12, 2)),
    learned_variance=True,
)
LENGTH, COUNT = 3, 4
DECODER = karlo.decoder_model(UNET, 8, LENGTH, WIDTH)
PRIOR = karlo.prior_model(PriorConfig(WIDTH, WIDTH, LENGTH, width=16, layers=1, heads=2))
PLAIN = UNetConfig(**TINY, attention=AttentionConfig(NONE, NONE), conditioning=ConditioningConfig(16, None))
UPSAMPLER = karlo.upsampler_model(PLAIN, 8, 2)
RNG = np.random.default_rng(0)


def batch_of(model):
    """Random entries of every name and shape that the model reads."""
    entries = model.batch_spec(COUNT, model.side)

    def draw(leaf):
        values = RNG.normal(size=leaf.shape)
        return jnp.asarray(values > 0 if leaf.dtype == bool else values, leaf.dtype)

    return {name: draw(leaf) for name, leaf in entries.items()}


def params_of(model):
    return filled(jax.eval_shape(model.init, KEY)[0])


def test_the_empty_caption_has_its_own_mask():
    text = TextConditioner(WIDTH, LENGTH, 0.5, NullText.EMPTY_MASKED, pooled=WIDTH)
    names = {"text", "text_mask", "text_pooled", "null_text", "null_mask", "null_pooled"}
    assert text.batch_spec(COUNT, 8).keys() == names
    many = 64
    shapes = text.batch_spec(many, 8)
    batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    batch |= {"text": batch["text"] + 1, "text_mask": jnp.ones((many, LENGTH), bool)}
    batch |= {
        "null_mask": jnp.arange(LENGTH) < 1,
        "null_text": batch["null_text"] - 1,
        "text_pooled": jnp.ones((many, WIDTH)),
    }
    given = text.training(batch, noise.sample_keys(KEY, jnp.arange(many)), (8, 8))
    kept = np.asarray(given.vector[:, 0] == 1)
    assert 16 < kept.sum() < 48
    np.testing.assert_array_equal(given.tokens[:, 0, 0], np.where(kept, 1.0, -1.0))
    np.testing.assert_array_equal(given.token_mask.sum(1), np.where(kept, LENGTH, 1))
    with pytest.raises(ValueError, match="needs null_mask"):
        del batch["null_mask"]
        text.training(batch, noise.sample_keys(KEY, jnp.arange(many)), (8, 8))


@pytest.mark.parametrize("model", [PRIOR, DECODER, UPSAMPLER], ids=["prior", "decoder", "upsampler"])
def test_loss_and_gradients(model):
    """Every parameter of the network is trained, but those that an example of the batch has no use for."""
    params, batch = params_of(model), batch_of(model)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, KEY)[0]))(params)
    assert np.isfinite(value) and value > 0
    still = [
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients) if not leaf.any()
    ]
    # With four examples none may be without an image, and none at entry 0 of the table.
    assert all("null" in path or "'last'" in path for path in still), still


def test_null_conditions_of_sampling():
    """Without an embedding both branches read the learned one, and with the empty caption they are equal."""
    params = params_of(DECODER)
    trained = TrainedModel(DECODER, params, replace(karlo.SAMPLING_DECODER, steps=2))
    request = SampleRequest(noise.sample_keys(KEY, jnp.arange(2)), (8, 8))
    null = jnp.broadcast_to(params["text"]["null"], (2, 1, WIDTH))
    given = trained.generate(replace(request, given={"image_embedding": null}))
    np.testing.assert_allclose(trained.generate(request), given, atol=1e-4)
    other = trained.generate(replace(request, given={"image_embedding": null + 1.0}))
    assert np.abs(other - given).max() > 1e-3
    assert trained.reads_empty and not trained.reads_padding


def test_an_input_without_noise():
    low = UPSAMPLER.low_res
    assert low == LowResConditioner(2, None) and low.example((8, 8)).aug_level is None
    params = params_of(UPSAMPLER)
    assert "aug_level" not in params["first"]
    trained = TrainedModel(UPSAMPLER, params, replace(karlo.SAMPLING_UPSAMPLER, steps=2))
    request = SampleRequest(noise.sample_keys(KEY, jnp.arange(2)), (8, 8))
    image = jnp.asarray(RNG.uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
    first = trained.decode(image, request)
    changed = params | {"last": jax.tree.map(lambda leaf: 2.0 * leaf, params["last"])}
    assert np.abs(replace(trained, params=changed).decode(image, request) - first).max() > 1e-3
    noisy = replace(trained, sampling=SamplingConfig(steps=2, aug_level=0.1))
    with pytest.raises(ValueError, match="without noise: leave out aug_level"):
        noisy.decode(image, request)
    given = low.seen(image, jnp.zeros(2), request.keys, (8, 8))
    np.testing.assert_array_equal(low.kept(given), given.concat)

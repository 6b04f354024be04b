"""A stage with DeepFloyd IF's conventions: what its network is given, and that its mean and its variance both learn."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import Formula, changed, loss_of, random_params

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.models.conditioners import TextConditioner, enlarge_between_corners
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.conditioning import WholeText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.text.encoder import TextEmbedding

KEY, COUNT, WIDTH = jax.random.key(1), 64, 6
TABLE = TabulatedSchedule.cosine()
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (COUNT, 16, 16, 3)).astype("f4")
NULL = RNG.normal(size=(77, WIDTH)).astype("f4")
BATCH = {
    "image": IMAGE,
    "low_res": IMAGE.reshape(COUNT, 4, 4, 4, 4, 3).mean((2, 4)),
    "text": RNG.normal(size=(COUNT, 77, WIDTH)).astype("f4"),
    "text_mask": np.ones((COUNT, 77), bool),
    "null_text": NULL,
}
BATCH = jax.tree.map(jnp.asarray, BATCH)


def stage_of(output=None, low_res=False):
    unet = Formula(learned_variance=True, output=output)
    return presets.if_model(unet, 16, low_res=low_res).reading(77, WIDTH)


def seen_in_training(low_res=False, batch=BATCH, dropout=0.1):
    """What the network is given: (x, entry, text, mask[, low_res, level])."""
    calls = []

    def record(x, *rest):
        calls.append([np.asarray(value) for value in (x, *rest)])
        return jnp.concatenate([x, x], -1)

    loss_of(changed(stage_of(record, low_res), TextConditioner, dropout=dropout), {}, batch, KEY)
    (inputs,) = calls
    return inputs


def test_entries_of_the_table():
    """Whole numbers from 0 to 999, and the image noised by the ᾱ of each."""
    x, entry = seen_in_training()[:2]
    np.testing.assert_array_equal(entry, np.round(entry))
    assert 0 <= entry.min() < 20 and 980 < entry.max() <= 999
    alpha_bar = np.asarray(TABLE.alpha_bar)[entry.astype(int)][:, None, None, None]
    eps = (x - np.sqrt(alpha_bar) * IMAGE) / np.sqrt(1 - alpha_bar)
    assert abs(eps.mean()) < 0.03 and eps.std() == pytest.approx(1, abs=0.02)


def test_dropped_captions_are_the_empty_one():
    for share in (0.0, 0.5, 1.0):
        text, mask = seen_in_training(dropout=share)[2:4]
        dropped = (text == NULL).all((1, 2))
        assert dropped.mean() == pytest.approx(share, abs=0.2 if share == 0.5 else 0)
        np.testing.assert_array_equal(text[~dropped], np.asarray(BATCH["text"])[~dropped])
        assert mask.all()


def test_a_batch_needs_the_empty_caption():
    batch = {name: value for name, value in BATCH.items() if name != "null_text"}
    with pytest.raises(ValueError, match="a batch of this model needs null_text") as error:
        seen_in_training(batch=batch)
    assert "\n" not in str(error.value)


def test_the_low_resolution_input_is_enlarged_and_then_noised():
    """With the noise of an entry of the table that the network is told, over 1000, and grain of the larger size."""
    low_res, level = seen_in_training(low_res=True)[4:]
    entry = 1000 * level
    np.testing.assert_allclose(entry, np.round(entry), atol=1e-3)
    assert 0 <= entry.min() < 60 and 940 < entry.max() <= 999
    alpha_bar = np.asarray(TABLE.alpha_bar)[np.round(entry).astype(int)][:, None, None, None]
    larger = np.asarray(enlarge_between_corners(BATCH["low_res"], (16, 16)))
    eps = (low_res - np.sqrt(alpha_bar) * larger) / np.sqrt(1 - alpha_bar)
    eps = eps[entry > 20]  # of less noise rounding is a part
    assert eps.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(eps[:, :, 1:].ravel(), eps[:, :, :-1].ravel())[0, 1]) < 0.02


def test_enlarging_between_corners():
    """Corners stay in the corners, and a ramp stays a ramp."""
    ramp = jnp.linspace(0.0, 3.0, 4)[None, :, None, None] + jnp.linspace(0.0, 1.0, 3)[None, None, :, None] * 10
    larger = enlarge_between_corners(ramp, (16, 12))
    wanted = np.linspace(0, 3, 16)[:, None] + np.linspace(0, 10, 12)
    np.testing.assert_allclose(larger[0, :, :, 0], wanted, atol=1e-4)
    np.testing.assert_allclose(enlarge_between_corners(ramp[:, :1, :1], (4, 4)), np.full((1, 4, 4, 1), 0.0), atol=1e-6)


def test_loss_of_the_mean_and_of_the_variance():
    """With all ε right there is no squared error, and the bound alone is left: the more, the wider the step is."""
    steps, shape = {}, IMAGE.shape

    def right(gamma, x, entry, *rest):
        t = TABLE.time(entry)
        alpha, sigma = (f(t)[:, None, None, None] for f in (TABLE.alpha, TABLE.sigma))
        return jnp.concatenate([(x - alpha * IMAGE) / sigma, jnp.full(shape, 2.0 * gamma - 1.0)], -1)

    for gamma in (0.0, 0.5, 1.0):
        steps[gamma] = float(loss_of(stage_of(partial(right, gamma)), {}, BATCH, KEY)[0])
    assert -1e-3 < steps[0.0] < steps[0.5] < steps[1.0] < 1.0
    wrong = loss_of(stage_of(lambda x, *rest: jnp.zeros((*shape[:3], 6))), {}, BATCH, KEY)[0]
    assert wrong == pytest.approx(1 + steps[0.5], abs=0.5)  # of ε, squared, and a bound that knows no image


@pytest.fixture(scope="module")
def network():
    unet = UNetConfig(
        channels=8,
        multipliers=(1,),
        blocks=(1,),
        attention=AttentionConfig((True,), (False,), head_channels=8, group_text=True),
        conditioning=ConditioningConfig(16, WholeText(8, pool_heads=2), frequencies=8),
        learned_variance=True,
        activation=Activation.GELU,
        norm_groups=4,
    )
    model = presets.if_model(unet, 16).reading(77, WIDTH)
    return model, random_params(model)


def test_a_step_of_training(network):
    """Nothing is NaN, all parameters have a gradient, the head's of the variance too, and the loss falls."""
    stage, params = network
    batch = jax.tree.map(lambda a: a[:8] if a.shape[0] == COUNT else a, BATCH)
    loss = jax.jit(jax.value_and_grad(lambda params: loss_of(stage, params, batch, KEY)[0]))
    before, gradient = loss(params)
    gradient = jax.tree.map(np.asarray, gradient)
    assert np.isfinite(before)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    assert np.abs(gradient["head"]["kernel"][..., 3:]).max() > 1e-6
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    after, _ = loss(jax.tree.map(lambda p, g: p - 0.01 * g / length, params, gradient))
    assert after < before


def test_the_variance_teaches_nothing_of_the_mean():
    """What the bound says of ε is not followed: its gradient is that of the squared error alone."""

    def loss(factors, learned):
        def output(x, entry, *rest):
            eps = factors[0] * jnp.tanh(x)
            return jnp.concatenate([eps, factors[1] * jnp.tanh(x)], -1) if learned else eps

        stage = stage_of(output)
        stage = stage if learned else replace(stage, unet=replace(stage.unet, learned_variance=False))
        return loss_of(stage, {}, BATCH, KEY)[0]

    both, alone = (jax.grad(loss)(jnp.asarray([0.7, 0.2]), learned) for learned in (True, False))
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-5)
    assert abs(both[1]) > 1e-6 and alone[1] == 0.0


def drawn(model, params, count=2, side=16, **settings):
    keys = noise.sample_keys(KEY, jnp.arange(count))
    text = TextEmbedding(BATCH["text"][:count], BATCH["text_mask"][:count])
    null = TextEmbedding(jnp.broadcast_to(NULL, (count, 77, WIDTH)), BATCH["text_mask"][:count])
    trained = TrainedModel(model, params, SamplingConfig(**settings))
    return np.asarray(trained.generate(SampleRequest(keys, (side, side), text, null)))


def test_drawing_with_the_learned_variance():
    """At its bounds it is that of a fixed γ; under guidance it is what the network says of the caption."""
    null = jnp.tanh(NULL.mean())

    def output(x, entry, text, *rest):
        """The lower bound for the first of three images, the upper one for the second; for the third the lower one
        where the caption is read, and the upper one where the empty caption is."""
        brightness = jnp.tanh(text.mean((1, 2)))
        empty, image = jnp.abs(brightness - null) < 1e-4, jnp.arange(len(x)) % 3  # both branches are one batch
        variance = jnp.where((image == 1) | (image == 2) & empty, 1.0, -1.0)[:, None, None, None]
        return jnp.concatenate([0.9 * x - brightness[:, None, None, None], jnp.broadcast_to(variance, x.shape)], -1)

    learned, small, large = (
        drawn(stage_of(output), {}, 3, sampler=DDPM(gamma), steps=5, guidance=Guidance(2.0))
        for gamma in (None, 0.0, 1.0)
    )
    np.testing.assert_allclose(learned, np.stack([small[0], large[1], small[2]]), atol=1e-4)
    assert (np.abs(small - large).mean((1, 2, 3)) > 0.01).all()


def test_drawing_in_tiles():
    """The variance is put together like all else: where each pixel is on its own, tiles change nothing."""
    stage = stage_of(lambda x, *rest: jnp.concatenate([0.9 * x + 0.3 * jnp.tanh(3 * x), jnp.sin(5 * x)], -1))
    settings = {"sampler": DDPM(None), "steps": 3, "guidance": Guidance(3.0)}
    whole = drawn(stage, {}, **settings)
    assert np.isfinite(whole).all() and whole.std() > 0.1
    np.testing.assert_allclose(drawn(stage, {}, tiles=Tiles(8, 4), **settings), whole, atol=1e-3)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="a learned variance needs a tabulated schedule"):
        replace(stage_of(), schedule=CosineSchedule())
    fixed = stage_of(lambda x, *rest: x)
    fixed = replace(fixed, unet=replace(fixed.unet, learned_variance=False))
    with pytest.raises(ValueError, match="the 16 stage has no learned variance, so its DDPM needs a gamma"):
        drawn(fixed, {}, sampler=DDPM(None))
    with pytest.raises(ValueError, match="this respacing has 50 steps, not 256"):
        drawn(fixed, {}, spacing=presets.SMART50)

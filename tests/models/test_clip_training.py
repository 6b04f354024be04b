"""CLIP's two losses: the plain formulas, chunk by chunk and on eight devices; the temperature; a stage that learns."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import loss_of

from jaxdiff.models.clip import (
    CLIPTraining,
    ContrastiveLoss,
    SigmoidLoss,
    clip_params,
    clipped,
    finished,
    l2_normalize,
    normalised,
)
from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.training.held_out import HeldOut
from jaxdiff.training.mesh import BATCH_AXES, make_mesh, to_devices
from jaxdiff.training.optimizer import AdamW, Decay, OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state, placements_of
from jaxdiff.training.step import make_step

CONFIG = CLIPConfig(
    TextTowerConfig(width=16, layers=1, heads=2, feed_forward=32, vocab=50, length=8, eos_id=1),
    ImageTowerConfig(width=16, layers=1, heads=2, feed_forward=32, resolution=8, patch=4),
    width=12,
)
LOSSES = {"contrastive": ContrastiveLoss(), "sigmoid": SigmoidLoss()}
ROWS = 24
KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default generator


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (ROWS, 8, 8, 3)).astype(np.float32)
    ids = rng.integers(2, 50, (ROWS, 8))
    ids[:, -1] = CONFIG.text.eos_id
    return {"ids": jnp.asarray(ids, jnp.int32), "image": jnp.asarray(image)}


@functools.cache
def params_of(name):
    return jax.jit(CLIPTraining(CONFIG, LOSSES[name]).init)(KEY)[0]


@jax.jit
def embedded(params, batch):
    """Embeddings of the captions and of the images, as the network gives them."""
    network, whole = CLIP(CONFIG), {"params": clip_params(params)}
    text = network.apply(whole, batch["ids"], method="embed_text").embedding
    image = network.apply(whole, normalised(batch["image"]), method="embed_image").embedding
    return l2_normalize(text), l2_normalize(image)


@functools.cache
def formula(name):
    """The loss and its gradients from the whole matrix of logits, as a function of the parameters and the batch:
    cross-entropies both ways (CLIP), or of each pair (SigLIP, equation 1)."""

    def loss(params, batch):
        text, image = embedded(params, batch)
        logits = jnp.exp(params["logit_scale"]) * text @ image.T
        if name == "contrastive":
            ours = jnp.diagonal(logits)
            each = [jax.nn.logsumexp(logits, axis) - ours for axis in (0, 1)]
            return (each[0].mean() + each[1].mean()) / 2
        signs = 2 * jnp.eye(ROWS) - 1
        return -jax.nn.log_sigmoid(signs * (logits + params["logit_bias"])).sum() / ROWS

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def program(stage):
    """The stage's loss, its metrics and gradients, as a function of the parameters and the batch."""
    loss = functools.partial(loss_of, stage)
    return jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch, jax.random.key(1)), has_aux=True))


def near(found, wanted, tolerance=1e-5):
    """Gradients that agree within a part of the largest."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), found, wanted)
    return max(jax.tree.leaves(apart)) <= tolerance * largest


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("contrastive", 7),
        ("sigmoid", 7),
        *(pytest.param(name, 100, marks=pytest.mark.slow) for name in ("contrastive", "sigmoid")),
    ],
)
def test_chunks_give_the_plain_formula(batch, name, chunk):
    wanted, gradient = formula(name)(params_of(name), batch)
    (found, _), ours = program(CLIPTraining(CONFIG, LOSSES[name], chunk=chunk))(params_of(name), batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5) and near(ours, gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_are_one(batch, name):
    """In chunks that divide the batch. And none of them holds the matrix of all pairs, nor its own rows of it."""
    wanted, gradient = formula(name)(params_of(name), batch)
    mesh, split = make_mesh(data=4, fsdp=2), CLIPTraining(CONFIG, LOSSES[name], chunk=6, axes=BATCH_AXES)
    with jax.set_mesh(mesh):
        params = jax.device_put(params_of(name), jax.NamedSharding(mesh, jax.P()))
        on_devices = to_devices(batch, mesh)
        compiled = program(split).lower(params, on_devices).compile()
        (found, _), ours = compiled(params, on_devices)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5) and near(ours, gradient)
    text = compiled.as_text()
    assert "all-gather" in text
    assert "f32[24,24]" not in text and "f32[3,24]" not in text and "f32[3,6]" in text


def test_accuracy_counts_captions_whose_picture_is_the_nearest(batch):
    params = params_of("contrastive")
    (_, metrics), _ = program(CLIPTraining(CONFIG, LOSSES["contrastive"], chunk=7))(params, batch)
    text, image = embedded(params, batch)
    logits = np.asarray(text @ image.T)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(logits.argmax(1) == np.arange(ROWS)), abs=1e-6)
    assert float(metrics["scale"]) == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_embeddings_that_are_all_alike_find_nothing(batch, name):
    run, params = program(CLIPTraining(CONFIG, LOSSES[name], chunk=7)), params_of(name)
    alike = {"ids": batch["ids"][:1].repeat(ROWS, 0), "image": batch["image"][:1].repeat(ROWS, 0)}
    assert float(run(params, alike)[0][1]["accuracy"]) == 0
    assert float(run(params, batch)[0][1]["accuracy"]) > 0


def test_the_temperature_is_clipped_and_can_come_back():
    most = float(np.log(100))
    value = jax.value_and_grad(lambda x, sign: sign * clipped(x, most))
    for at, sign, wanted in [(most + 1, 1, 1), (most + 1, -1, 0), (1.0, -1, -1)]:  # back; further on; not there yet
        found, gradient = value(jnp.float32(at), jnp.float32(sign))
        assert (float(found), float(gradient)) == (pytest.approx(sign * min(at, most)), wanted)
    stage = CLIPTraining(CONFIG)
    params = params_of("contrastive") | {"logit_scale": jnp.float32(9.0)}
    assert np.exp(finished(stage, params)["logit_scale"]) == pytest.approx(100, rel=1e-5)


def test_only_kernels_and_tables_decay():
    params = params_of("sigmoid")
    rule = AdamW(weight_decay=0.5, decay_all=False).transform(lambda count: 0.1)
    none = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda none, params: rule.update(none, rule.init(params), params))(none, params)
    for (path, update), param in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
        wanted = -0.1 * 0.5 * param if param.ndim > 1 else 0 * param
        assert np.allclose(update, wanted, atol=1e-7), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["contrastive", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_it_learns_a_handful_of_pairs(batch, name):
    config = OptimizerConfig(AdamW(decay_all=False), learning_rate=3e-3, warmup=0, decay=Decay.CONSTANT)
    stage, mesh = CLIPTraining(CONFIG, LOSSES[name], axes=BATCH_AXES), make_mesh(devices=jax.devices()[:2])
    state = init_state(stage, config, KEY, mesh, jax.tree.map(np.asarray, params_of(name)))
    placed = placements_of(abstract_state(stage, config, mesh))
    step = make_step(stage, config, placed)
    with jax.set_mesh(mesh):
        on_devices, key = to_devices(batch, mesh), jax.random.key(1)
        for _ in range(120):
            state, metrics = step(state, on_devices, key)
        held_out = HeldOut(stage, placed, (), mesh, lambda: [jax.device_get(batch)])(state)
    assert float(metrics["accuracy"]) > 0.75
    (loss, own), _ = program(CLIPTraining(CONFIG, LOSSES[name]))(jax.device_get(state.ema), batch)
    wanted = {"held_out_loss": loss, "held_out_accuracy": own["accuracy"], "held_out_scale": own["scale"]}
    assert held_out == pytest.approx({metric: float(value) for metric, value in wanted.items()}, rel=1e-4)


def test_a_stage_has_two_towers():
    with pytest.raises(ValueError, match="two towers"):
        CLIPTraining(replace(CONFIG, image=None))
    with pytest.raises(ValueError, match="chunk 0"):
        CLIPTraining(CONFIG, chunk=0)

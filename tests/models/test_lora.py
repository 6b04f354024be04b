"""LoRA: closed forms of one layer, sums, what is trained and what is not."""

from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import filled

from jaxdiff.core import trees
from jaxdiff.core.products import LatentSpec
from jaxdiff.models import lora
from jaxdiff.models.conditioners import NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.diffusion_lora import DiffusionLoRA, TextTower
from jaxdiff.models.lora import LoRAModel, Targets
from jaxdiff.nets.clip import CLIP, CLIPConfig, TextTowerConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.text.clip import Pooling
from jaxdiff.training.held_out import HasHeldOutLosses
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import SGD, AdamW, Decay, OptimizerConfig
from jaxdiff.training.state import Trainable, abstract_state, init_state, place_frozen, placements_of
from jaxdiff.training.step import make_step

rng = np.random.default_rng(0)


def random(*shape):
    return rng.normal(size=shape).astype("f4")


def module(kernel, rank=2, alpha=3.0):
    *sides, width, out = kernel
    down, up = random(*sides, width, rank), random(*(1 for _ in sides), rank, out)
    return {"down": down, "up": up, "alpha": np.float32(alpha)}


PARAMS = {
    "a": {"kernel": random(5, 4), "bias": random(4)},
    "b": {"kernel": random(3, 3, 4, 6)},
    "c": {"kernel": random(1, 1, 6, 2), "embedding": random(7, 2)},
}
LORA = {"a": {"kernel": module((5, 4))}, "b": {"kernel": module((3, 3, 4, 6), 3)}}
OTHER = {"a": {"kernel": module((5, 4), 1, 0.5)}, "c": {"kernel": module((1, 1, 6, 2))}}


def test_a_matrix():
    """W + w · (alpha / r) · down @ up; all else stays."""
    got = lora.merged(PARAMS, [(LORA, 0.25)])
    own = LORA["a"]["kernel"]
    wanted = PARAMS["a"]["kernel"] + 0.25 * 3 / 2 * own["down"] @ own["up"]
    np.testing.assert_allclose(got["a"]["kernel"], wanted, rtol=1e-6, atol=1e-6)
    for path in ("a/bias", "c/kernel", "c/embedding"):
        np.testing.assert_array_equal(trees.flatten(got)[path], trees.flatten(PARAMS)[path])


def test_a_convolution():
    """The merged convolution is the plain one and, beside it, down (3×3) and then up (1×1)."""
    x, own = random(2, 6, 5, 4), LORA["b"]["kernel"]
    convolved = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    up = np.einsum("bhwr,ro->bhwo", convolved(x, own["down"]), own["up"][0, 0])
    wanted = convolved(x, PARAMS["b"]["kernel"]) + 0.5 * 3 / 3 * up
    got = convolved(x, lora.merged(PARAMS, [(LORA, 0.5)])["b"]["kernel"])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_several_are_the_sum():
    """With traced weights, in one compiled program; in any order; weights of 0 leave everything as it is."""
    run = jax.jit(lambda weights: lora.merged(PARAMS, [(LORA, weights[0]), (OTHER, weights[1])]))
    got = trees.flatten(run(jnp.asarray([0.5, -2.0])))
    first, second = (trees.flatten(lora.merged(PARAMS, [each])) for each in ((LORA, 0.5), (OTHER, -2.0)))
    for path, leaf in trees.flatten(PARAMS).items():
        np.testing.assert_allclose(got[path], first[path] + second[path] - leaf, rtol=1e-5, atol=1e-5)
    for path, leaf in trees.flatten(run(jnp.zeros(2))).items():
        np.testing.assert_array_equal(leaf, trees.flatten(PARAMS)[path])
    assert trees.flatten(lora.merged(PARAMS, []))["a/kernel"] is PARAMS["a"]["kernel"]


def test_types_of_kernels():
    """The sum is float32, however the kernel and the LoRA are stored."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), OTHER)
    got = lora.merged(half, [(LORA, 1.0), (stored, 1)])["a"]["kernel"]
    own = [jax.tree.map(lambda leaf: leaf.astype("f4"), each["a"]["kernel"]) for each in (LORA, OTHER)]
    own[1] = {name: leaf.astype("f2").astype("f4") for name, leaf in own[1].items()}
    added = sum(each["alpha"] / each["down"].shape[1] * each["down"] @ each["up"] for each in own)
    assert got.dtype == jnp.bfloat16
    wanted = (half["a"]["kernel"].astype("f4") + added).astype(jnp.bfloat16)
    assert (got == wanted).mean() > 0.9
    np.testing.assert_allclose(got.astype("f4"), wanted.astype("f4"), rtol=1e-2)


def test_small_differences_to_half_precision():
    """In training they are not rounded away, whatever the type of the base's parameters."""
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), PARAMS)
    got = lora.merged(half, [(LORA, 1e-5)], keep_type=False)
    wanted = lora.merged(jax.tree.map(np.float32, half), [(LORA, 1e-5)])
    assert got["a"]["kernel"].dtype == jnp.float32 and got["c"]["kernel"].dtype == np.float16
    np.testing.assert_array_equal(got["a"]["kernel"], wanted["a"]["kernel"])
    assert (lora.merged(half, [(LORA, 1e-5)])["a"]["kernel"] == half["a"]["kernel"]).mean() > 0.9


def test_initial_values():
    """Nothing changes yet; down is normal with a deviation of 1/r; each kernel has its own numbers."""
    params = {"a": {"kernel": np.zeros((400, 30), "f4")}, "b": {"kernel": np.zeros((400, 30), "f4")}}
    own = lora.init(params, lora.LINEAR, 5, jax.random.key(1), 7.0)
    for path, each in lora.modules(own).items():
        assert each["alpha"] == 7 and not each["up"].any() and each["up"].shape == (5, 30)
        assert abs(each["down"].std() - 1 / 5) < 0.02 and abs(each["down"].mean()) < 0.02
        np.testing.assert_array_equal(lora.merged(params, [(own, 1.0)])[path[0]]["kernel"], 0)
    assert np.abs(own["a"]["kernel"]["down"] - own["b"]["kernel"]["down"]).max() > 0.1
    assert lora.init(params, lora.LINEAR, 5, jax.random.key(1))["a"]["kernel"]["alpha"] == 5


UNET = LatentUNetConfig(
    channels=8, multipliers=(1, 2), blocks=(1, 1), transformer_layers=(0, 1), heads=(1, 2), cross_only=(False, False),
    norm_groups=4,
)  # fmt: skip
TOWER = CLIPConfig(TextTowerConfig(width=8, layers=1, heads=2, feed_forward=12, vocab=10, length=3), None, None)
TEXT = TextConditioner(8, 3, 0.0)
BASE = DiffusionModel(unet=UNET, side=4, conditioners=(TEXT,))


@pytest.mark.parametrize(
    ("targets", "count", "shown"),
    [
        # Transformers: two in the up path, one in the down path, one in the middle; one layer each.
        (lora.ATTENTION, 4 * 8, "down_1_0_attention/block_0/cross/k/kernel"),
        (lora.TRANSFORMERS, 4 * 12, "down_1_0_attention/in/kernel"),
        (lora.LINEAR, 4 * 10 + 2 + 8, "time/Dense_0/kernel"),
        (lora.ALL, 4 * 12 + 2 + 8 * 3 + 5 + 4, "down_0_0/conv_1/kernel"),
        (Targets("stem/kernel", 3), 1, "stem/kernel"),
    ],
)
def test_targets(targets, count, shown):
    paths = targets.paths(jax.eval_shape(BASE.init, jax.random.key(0))[0])
    assert len(paths) == count and shown in paths and paths == sorted(paths)


def test_targets_of_text_towers():
    shapes = TextTower(replace(TOWER, width=5)).shapes()
    assert len(lora.TEXT_ATTENTION.paths(shapes)) == 4 and len(lora.TEXT_LINEAR.paths(shapes)) == 6
    assert len(lora.ALL.paths(shapes)) == 7


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: lora.init(PARAMS, lora.ATTENTION, 2, jax.random.key(0)), "none of 1 kernels of a fitting size"),
        (lambda: lora.init(PARAMS, lora.ALL, 0, jax.random.key(0)), "rank 0"),
        (lambda: lora.merged({"b": PARAMS["b"]}, [(LORA, 1.0)]), "a/kernel, which the network does not have"),
        (lambda: lora.merged({"a": PARAMS["c"], "b": PARAMS["b"]}, [(LORA, 1.0)]), "does not fit its kernel"),
        (lambda: lora.merged(PARAMS, [({"a": {"kernel": {"down": random(5, 2)}}}, 1.0)]), "at a/kernel down"),
        (lambda: lora.merged(PARAMS, [({"a": {"bias": module((5, 4))}}, 1.0)]), "a/bias"),
        (lambda: DiffusionLoRA(BASE, towers=(TextTower(TOWER),) * 2), "text of width 8, but towers of width 16"),
        (lambda: DiffusionLoRA(BASE, towers=(TextTower(TOWER),) * 3), "3 text towers: at most 2"),
        (lambda: TextTower(replace(TOWER, text=None, image=CLIPConfig().image)), "no text tower"),
        (lambda: DiffusionLoRA(replace(BASE, conditioners=(EMPTY,)), towers=(TextTower(TOWER),)), "`empty`"),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()


EMPTY = replace(TEXT, null=NullText.EMPTY, dropout=0.5)


def test_the_gradient_of_one_layer():
    """Against its closed form: with G = ∂L/∂W', ∂L/∂down = s · G @ upᵀ and ∂L/∂up = s · downᵀ @ G."""
    x, own = random(6, PARAMS["a"]["kernel"].shape[0]), LORA["a"]["kernel"]
    wanted_output = random(6, 4)

    def loss(own):
        kernel = lora.merged({"kernel": PARAMS["a"]["kernel"]}, [({"kernel": own}, 0.5)])["kernel"]
        return jnp.square(x @ kernel - wanted_output).sum() / 2

    got = jax.grad(loss)(jax.tree.map(jnp.asarray, own))
    scale = 0.5 * 3 / 2
    gradient = x.T @ (x @ (PARAMS["a"]["kernel"] + scale * own["down"] @ own["up"]) - wanted_output)
    np.testing.assert_allclose(got["down"], scale * gradient @ own["up"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["up"], scale * own["down"].T @ gradient, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Base:
    """A model with all that a trainable may have: two optimizers, an extra, frozen arrays, a compute type."""

    def init(self, key):
        return {"a": {"kernel": jnp.zeros((5, 4))}, "b": {"kernel": jnp.zeros((4, 3))}}, {"count": jnp.zeros(())}

    def loss(self, params, extra, frozen, batch, key, step):
        output = jnp.tanh(batch["x"] @ params["a"]["kernel"]) @ params["b"]["kernel"]
        loss = jnp.square(output - batch["x"] @ frozen).mean().astype(jnp.float32)
        return loss, ({"type": jnp.float32(output.dtype == jnp.bfloat16)}, {"count": extra["count"] + 1})

    def labels(self, params):
        return {"a": {"kernel": "first"}, "b": {"kernel": "second"}}

    def cast(self, params):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def batch_spec(self, batch_size, side):
        return {"x": jax.ShapeDtypeStruct((batch_size, 5), jnp.bfloat16)}


def trained(model, frozen, batch, optimizers, steps):
    """The losses, the last metrics, and the states before and after."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(model, optimizers, jax.random.key(1), mesh)
        frozen, losses = place_frozen(frozen, mesh), []
        placements = placements_of(abstract_state(model, optimizers, mesh))
        step = make_step(model, optimizers, placements, frozen=placements_of(frozen), ema_warmup=False)
        first = jax.tree.map(np.array, state.params)
        for _ in range(steps):
            state, metrics = step(state, batch, jax.random.key(2), frozen)
            losses.append(float(metrics["loss"]))
    return losses, metrics, first, jax.device_get(state)


def steady(kind, rate):
    return OptimizerConfig(kind, learning_rate=rate, warmup=0, decay=Decay.CONSTANT, clip=None)


def test_training_of_any_model():
    """Only down and up change; the base's labels, extra, frozen arrays and compute type are in use."""
    model = LoRAModel(Base(), Targets("kernel"), rank=2, alpha=4.0)
    assert isinstance(model, Trainable) and not isinstance(model, HasHeldOutLosses)
    assert model.batch_spec(3, 8) == Base().batch_spec(3, 8)
    frozen = {"model": {"a": {"kernel": random(5, 4)}, "b": {"kernel": random(4, 3)}}, "frozen": random(5, 3)}
    batch = {"x": jnp.asarray(random(16, 5), jnp.bfloat16)}
    optimizers = {"first": steady(AdamW(weight_decay=0.1), 0.05), "second": steady(SGD(), 1e-30)}
    losses, metrics, first, state = trained(model, frozen, batch, optimizers, 20)
    assert losses[-1] < 0.7 * losses[0] and metrics["type"] == 1 and state.extra["count"] == 20
    before, after = lora.modules(first["model"]), lora.modules(state.params["model"])
    for path, optimized in (("a/kernel", True), ("b/kernel", False)):
        assert before[path]["alpha"] == after[path]["alpha"] == 4
        for part in ("down", "up"):
            assert (np.abs(before[path][part] - after[path][part]).max() > 1e-6) == optimized
    assert state.ema["model"]["a"]["kernel"]["alpha"] == 4


def diffusion_batch(**changes):
    batch = {"image": random(2, 8, 8, 4), "text": random(2, 3, 8), "text_mask": np.ones((2, 3), bool)}
    return {name: jnp.asarray(value) for name, value in (batch | changes).items() if value is not None}


@dataclass(frozen=True)
class Shallow(LatentUNetConfig):
    """A network that reads pixels, tokens and vector, and compiles in no time."""

    def module(self):
        return _Shallow()


class _Shallow(nn.Module):
    @nn.compact
    def __call__(self, x, time, given):
        y = nn.Dense(16, name="in")(x) + nn.Dense(16, name="text")(given.tokens).mean(1)[:, None, None]
        if given.vector is not None:
            y += nn.Dense(16, name="vector")(given.vector)[:, None, None]
        return nn.Dense(4, name="out")(nn.silu(y) * time[:, None, None, None] / 1000)


SMALL = DiffusionModel(Shallow(), side=8, product=LatentSpec(4), conditioners=(TEXT,))
KEY, STEP = jax.random.key(3), jnp.int32(0)


def test_a_diffusion_model():
    """The loss and the held-out losses are those of the base with merged parameters. Training lowers the loss."""
    model, base = DiffusionLoRA(SMALL, lora.LINEAR, rank=2), filled(jax.eval_shape(SMALL.init, KEY)[0])
    assert isinstance(model, Trainable) and isinstance(model, HasHeldOutLosses)
    params = filled(jax.eval_shape(model.init, KEY)[0], 1)
    frozen, batch = {"model": base}, diffusion_batch()
    merged = lora.merged(base, [(params["model"], 1.0)])

    @jax.jit
    def both(params, base, merged):
        numbers = jnp.asarray([3, -1])
        ours = model.loss(params, (), {"model": base}, batch, KEY, STEP)[0]
        held_out = model.held_out_losses(params, (), {"model": base}, batch, numbers, KEY)
        theirs = SMALL.loss(merged, (), (), batch, KEY, STEP)[0]
        return (ours, held_out), (theirs, SMALL.held_out_losses(merged, (), (), batch, numbers, KEY))

    ours, theirs = both(params, base, merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert float(both(params, base, base)[1][0]) != pytest.approx(float(ours[0]), rel=1e-3)
    _, _, first, state = trained(model, frozen, batch, steady(AdamW(), 0.02), 100)
    numbers = jnp.asarray([7, 15])  # of much noise: the input predicts it
    held_out = lambda p: model.held_out_losses(p, (), frozen, batch, numbers, KEY)["held_out_loss"][0]  # noqa: E731
    assert held_out(state.params) < 0.7 * held_out(first)
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state.params))]
    paths = list(trees.flatten(first))
    assert [path for path, moved in zip(paths, changed) if not moved] == [p for p in paths if p.endswith("alpha")]


def test_text_towers_inside_the_loss():
    """Token ids in the batch: the loss is that of the embeddings, and its gradient reaches both towers' LoRAs."""
    second = replace(TOWER, width=5)
    towers = (
        TextTower(replace(TOWER, text=replace(TOWER.text, layers=2)), 1, False, empty=(1, 9, 9)),
        TextTower(second, pooling=Pooling.EMBEDDING, targets=lora.TEXT_LINEAR, empty=(1, 9, 0)),
    )
    text = TextConditioner(16, 3, 0.5, NullText.EMPTY, pooled=5)
    base = replace(SMALL, conditioners=(text,))
    model = DiffusionLoRA(base, lora.LINEAR, rank=2, towers=towers)
    params = filled(jax.eval_shape(model.init, KEY)[0], 1)
    frozen = {"model": filled(jax.eval_shape(base.init, KEY)[0]), "text": filled(towers[0].shapes(), 2)}
    frozen = jax.tree.map(jnp.asarray, frozen | {"text_2": filled(towers[1].shapes(), 3)})
    ids = np.asarray([[1, 4, 9], [1, 7, 8]]), np.asarray([[1, 4, 0], [1, 7, 8]])
    batch = diffusion_batch(text=None, text_mask=None, ids=ids[0], ids_2=ids[1])
    spec = model.batch_spec(2, 8)
    assert {name: shape.shape for name, shape in spec.items()} == {name: value.shape for name, value in batch.items()}

    def embedded(number, ids):
        name, tower = (("text", towers[0]), ("text_2", towers[1]))[number]
        network = {"params": lora.merged(frozen[name], [(params[name], 1.0)])}
        skip = (1, False) if number == 0 else (0, True)
        embed = jax.jit(lambda network, ids: CLIP(tower.config).apply(network, ids, *skip, method="embed_text"))
        return embed(network, jnp.asarray(ids))

    tokens = [jnp.concatenate([embedded(0, a).states, embedded(1, b).states], -1) for a, b in
              (ids, ([towers[0].empty], [towers[1].empty]))]  # fmt: skip
    wanted = diffusion_batch(
        text=tokens[0], null_text=tokens[1][0], text_pooled=embedded(1, ids[1]).embedding,
        null_pooled=embedded(1, [towers[1].empty]).embedding[0],
    )  # fmt: skip
    wanted |= {"image": batch["image"]}
    merged = lora.merged(frozen["model"], [(params["model"], 1.0)])
    gradient = jax.jit(jax.value_and_grad(lambda p: model.loss(p, (), frozen, batch, KEY, STEP)[0]))
    loss, grads = gradient(params)
    np.testing.assert_allclose(loss, jax.jit(base.loss)(merged, (), (), wanted, KEY, STEP)[0], rtol=1e-5)
    for name, count in (("text", 8), ("text_2", 6)):
        assert len(lora.modules(grads[name])) == count
        for path, each in lora.modules(grads[name]).items():
            # The first tower's states are those before its last block.
            assert (np.abs(each["down"]).max() > 0) == (name == "text_2" or "block_0" in path), path
    labels = model.labels(params)
    assert set(jax.tree.leaves(labels)) == {"all", "none"}
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="needs ids_2, the token ids"):
        model.loss(params, (), frozen, {name: value for name, value in batch.items() if name != "ids_2"}, KEY, STEP)

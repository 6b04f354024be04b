"""Training split over devices is training on one: losses, gradients and parameters of a real stage on every mesh.

Meshes of one axis, and what the fast tests do at once taken one by one, are slow tests.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import TEXT, executed, random_params

from jaxdiff.models.conditioners import LowResConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig
from jaxdiff.training.mesh import BATCH_AXES, make_mesh, to_devices
from jaxdiff.training.optimizer import SGD, Adafactor, AdamW, Decay, OptimizerConfig
from jaxdiff.training.param_sharding import ParamSharding, Rule
from jaxdiff.training.state import abstract_state, init_state, placements_of
from jaxdiff.training.step import make_step

UNET = EfficientUNetConfig(
    channels=8,
    multipliers=(1, 2),
    blocks=(1, 2),
    attention=AttentionConfig((False, True), (False, True), heads=2, feed_forward=1),
    conditioning=ConditioningConfig(16, MaskedText(8)),
)
MODEL = DiffusionModel(unet=UNET, side=16, conditioners=(TEXT, LowResConditioner()))
RATE = 0.05
PLAIN = OptimizerConfig(kind=SGD(), learning_rate=RATE, warmup=0, decay=Decay.CONSTANT, clip=None)
RULES = tuple(Rule(*rule) for rule in UNET.tensor_rules())
ROWS = ActivationSharding(BATCH_AXES, ("tensor",))


@dataclass(frozen=True)
class Shapes(SingleOptimizer):
    """Arrays of all the shapes that a network has, on which an optimizer's state depends, and little between them."""

    side: int = 8

    def init(self, key):
        shapes = {
            "conv": {"kernel": (3, 3, 4, 128), "bias": (128,)},
            "q": {"kernel": (128, 2, 8)},
            "out": {"kernel": (2, 8, 128)},
            "up": {"kernel": (128, 256), "scale": (256,)},  # Adafactor keeps a row and a column of it
            "down": {"kernel": (256, 4), "bias": (4,)},
        }
        return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)), ()

    def loss(self, params, extra, frozen, batch, key, step):
        conv, q, out, up, down = (params[name] for name in ("conv", "q", "out", "up", "down"))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(batch["x"], conv["kernel"], (2, 2), "SAME", dimension_numbers=numbers)
        x = jnp.tanh(x + conv["bias"])
        x = x + jnp.einsum("...hd,hdc->...c", jnp.tanh(jnp.einsum("...c,chd->...hd", x, q["kernel"])), out["kernel"])
        x = jnp.tanh((x @ up["kernel"]) * up["scale"]) @ down["kernel"] + down["bias"]
        return jnp.mean((x - batch["y"]) ** 2), ({}, extra)

    def batch_spec(self, batch_size, side):
        return {
            "x": jax.ShapeDtypeStruct((batch_size, side, side, 4), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch_size, side // 2, side // 2, 4), jnp.float32),
        }


SHAPES = Shapes()
SHAPES_RULES = tuple(Rule(*rule) for rule in (("q/kernel", 1), ("out/kernel", 0), ("up/kernel", 1), ("down/kernel", 0)))


def batches(stage, count, rows=16):
    rng = np.random.default_rng(0)
    for _ in range(count):
        spec = stage.batch_spec(rows, stage.side)
        batch = {name: rng.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in spec.items()}
        if "text_mask" in batch:
            batch["text_mask"] = np.arange(4) < rng.integers(0, 5, (rows, 1))
        yield batch


def trained(sizes, steps=3, sharding=None, optimizer=PLAIN, accumulate=1, stage=MODEL, **how):
    """Losses of so many steps, and the parameters before, after the first and after the last."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    rules = SHAPES_RULES
    if stage is MODEL:
        sharding = ActivationSharding(BATCH_AXES) if sharding is None else sharding
        stage = replace(MODEL, unet=executed(UNET, sharding=sharding, **how))
        rules = () if sharding.spatial else RULES
    placement = ParamSharding(rules, minimum=64)
    state = init_state(stage, optimizer, jax.random.key(0), mesh, random_params(stage), placement)
    abstract = abstract_state(stage, optimizer, mesh, placement)
    step = make_step(stage, optimizer, placements_of(abstract), accumulate=accumulate)
    seen, losses = [jax.device_get(state.params)], []
    with jax.set_mesh(mesh):
        for batch in batches(stage, steps):
            state, metrics = step(state, to_devices(batch, mesh), jax.random.key(2))
            losses.append(float(metrics["loss"]))
            seen.append(jax.device_get(state.params))
    placed = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, abstract)
    assert all(jax.tree.leaves(placed))
    return losses, (seen[0], seen[1], seen[-1])


@pytest.fixture(scope="module")
def one_device():
    kept = {}

    def of(**settings):
        key = repr(settings)
        if key not in kept:
            kept[key] = trained((1, 1, 1), sharding=ActivationSharding(), **settings)
        return kept[key]

    return of


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def furthest(a, b):
    return largest(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, a, b))


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((2, 2, 2), {"accumulate": 4, "scan": True, "remat": "blocks"}),
        # Rows of images over `tensor`: the gradient of a strided convolution is where XLA goes wrong by itself.
        pytest.param((1, 4, 2), {"sharding": ROWS, "scan": True, "remat": "outputs"}, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((2, 2, 2), {}),
                ((8, 1, 1), {}),
                ((1, 8, 1), {}),
                ((8, 1, 1), {"accumulate": 4}),
                ((1, 8, 1), {"accumulate": 4}),
                ((2, 2, 2), {"accumulate": 4}),
                ((2, 2, 2), {"sharding": ROWS}),
                ((1, 4, 2), {"scan": True, "remat": "blocks"}),
            )
        ),
    ],
    ids=str,
)
def test_eight_devices_are_one(one_device, sizes, settings):
    wanted, (before, first, last) = one_device(accumulate=settings.get("accumulate", 1))
    losses, found = trained(sizes, **settings)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    gradient = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) - b) / RATE, before, first)
    assert largest(gradient) > 0.1
    assert furthest(found[1], first) / RATE < 1e-5 * largest(gradient)
    assert furthest(found[2], last) < 1e-5 * largest(jax.tree.map(lambda a, b: a - b, before, last))


@pytest.mark.parametrize("kind", [AdamW(), Adafactor()])
def test_optimizers_with_moments_lose_nothing_by_it(one_device, kind):
    """Parameters may differ where a gradient is zero but for rounding; losses must not."""
    optimizer = OptimizerConfig(kind=kind, learning_rate=1e-3, warmup=2, total=100)
    losses, _ = trained((2, 2, 2), steps=10, optimizer=optimizer, stage=SHAPES)
    np.testing.assert_allclose(losses, one_device(steps=10, optimizer=optimizer, stage=SHAPES)[0], rtol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("side", "devices"), [(8, 2), (16, 4), (16, 3)])
def test_too_few_rows_for_a_device_are_refused(side, devices):
    """With one row of the smallest map a device, XLA's gradients of strided convolutions are wrong by themselves."""
    stage = replace(MODEL, side=side, unet=executed(UNET, sharding=ROWS))
    batch, key, step = stage.batch_spec(2, side), jax.random.key(0), jnp.int32(0)
    with (
        jax.set_mesh(make_mesh(1, 1, devices, devices=jax.devices()[:devices])),
        pytest.raises(ValueError, match=f"rows cannot be split over {devices} devices"),
    ):
        jax.eval_shape(lambda params, batch: stage.loss(params, (), (), batch, key, step), random_params(MODEL), batch)

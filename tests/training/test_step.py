"""The step: the same on every mesh, clipping after the mean, accumulation, averages, and losses that are not finite.

Gradients are read from Adam's first moment, which after one step is (1 - b1) times the clipped gradient: comparing
parameters instead would compare rounding, since Adam normalises gradients that are zero but for rounding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from training_toy import Stream, Toy

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.training.mesh import make_mesh, to_devices
from jaxdiff.training.optimizer import Adafactor, OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state, placements_of
from jaxdiff.training.step import make_step

WIDE = Toy(width=8192)  # its kernels are just large enough to be split
MESHES = {"one": (1, 1), "data=8": (8, 1), "fsdp=8": (1, 8), "data=2 fsdp=4": (2, 4)}
UNCLIPPED = OptimizerConfig(learning_rate=1e-2, warmup=0, total=100, clip=None)


def mesh_of(data: int, fsdp: int):
    return make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])


def start(stage, config, mesh, initial=None, **options):
    placements = placements_of(abstract_state(stage, config, mesh))
    state = init_state(stage, config, jax.random.key(1), mesh, initial)
    return state, make_step(stage, config, placements, **options)


def first_moment(state):
    return next(part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(part))


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def one_step(stage, config, mesh, batch, **options):
    state, step = start(stage, config, mesh, **options)
    with jax.set_mesh(mesh):
        state, metrics = step(state, to_devices(batch, mesh), jax.random.key(2))
    return state, jax.device_get(first_moment(state)), jax.device_get(metrics)


def relative(a, b):
    """Largest difference of two trees, relative to the largest entry of each array."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y)) / np.max(np.abs(y)), a, b)))


@pytest.mark.slow  # test_sharded_training.py trains one
def test_a_stage_of_imagen_has_the_same_gradient_on_eight_devices():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32),
        "low_res": rng.uniform(-1, 1, (8, 4, 4, 3)).astype(np.float32),
        "text": rng.normal(size=(8, small.LENGTH, 6)).astype(np.float16),
        "text_mask": np.ones((8, small.LENGTH), bool),
    }
    (_, one, alone), (_, eight, spread) = (
        one_step(small.SR, UNCLIPPED, mesh_of(*MESHES[name]), batch, initial=small.random_params(small.SR))
        for name in ("one", "data=8")
    )
    assert spread["loss"] == pytest.approx(float(alone["loss"]), rel=1e-5)
    assert spread["grad_norm"] == pytest.approx(float(alone["grad_norm"]), rel=1e-4)
    # Some gradients are 0 but for rounding, such as those of keys' biases: they are compared on the others' scale.
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * largest), one, eight)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))


def test_loss_and_gradient_are_the_same_on_every_mesh():
    batch = next(Stream())
    results = {name: one_step(WIDE, UNCLIPPED, mesh_of(*sizes), batch) for name, sizes in MESHES.items()}
    _, moment, metrics = results["one"]
    for name, (_, other_moment, other_metrics) in results.items():
        assert relative(other_moment, moment) < 1e-5, name
        assert other_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5), name
        assert other_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5), name
        assert other_metrics["largest_error"] == pytest.approx(metrics["largest_error"], rel=1e-5), name
    split = results["fsdp=8"][0]
    for tree in (split.params, split.ema, first_moment(split)):  # never whole on one device
        assert tree["first"]["kernel"].addressable_shards[0].data.shape == (8, 1024)


def test_the_gradient_is_that_of_the_global_mean():
    batch = next(Stream())
    stage = Toy(draws=False)
    mesh = mesh_of(8, 1)
    params = jax.device_get(init_state(stage, UNCLIPPED, jax.random.key(1), mesh).params)
    expected = jax.grad(lambda p: small.loss_of(stage, p, {k: batch[k] for k in ("x", "noise")}, None)[0])(params)
    _, moment, _ = one_step(stage, UNCLIPPED, mesh, batch)
    assert relative(moment, jax.tree.map(lambda g: 0.1 * g, expected)) < 1e-5


def test_clipping_comes_after_the_mean_over_devices():
    # Rows of the first device are a hundred times the others', so that clipping each device's own gradient first
    # would give another direction.
    batch = next(Stream())
    batch["noise"][:2] *= 100
    stage, mesh = Toy(draws=False), mesh_of(8, 1)
    clipped = OptimizerConfig(learning_rate=1e-2, warmup=0, total=100, clip=0.5)
    _, raw, metrics = one_step(stage, UNCLIPPED, mesh, batch)
    _, moment, clipped_metrics = one_step(stage, clipped, mesh, batch)
    assert metrics["grad_norm"] > 10
    assert clipped_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"])  # logged before clipping
    assert relative(moment, jax.tree.map(lambda m: m * 0.5 / metrics["grad_norm"], raw)) < 1e-5


@pytest.mark.parametrize("sizes", [(1, 1), (1, 4)])
def test_accumulation_equals_the_full_batch(sizes):
    batch, mesh = next(Stream()), mesh_of(*sizes)
    stage = Toy(width=8192, draws=False)
    _, moment, metrics = one_step(stage, UNCLIPPED, mesh, batch)
    _, parts, part_metrics = one_step(stage, UNCLIPPED, mesh, batch, accumulate=4)
    assert relative(parts, moment) < 1e-5
    for name in ("loss", "grad_norm", "largest_error"):
        assert part_metrics[name] == pytest.approx(metrics[name], rel=1e-5)


def test_accumulated_parts_draw_different_noise():
    rows = {"x": np.zeros((8, 8), np.float32)}
    _, _, whole = one_step(Toy(), UNCLIPPED, mesh_of(1, 1), {"x": rows["x"][:4]})
    _, _, twice = one_step(Toy(), UNCLIPPED, mesh_of(1, 1), rows, accumulate=2)
    assert abs(twice["loss"] - whole["loss"]) > 1e-3


def test_each_step_draws_its_own_noise_and_reuses_memory():
    mesh = mesh_of(1, 1)
    config = OptimizerConfig(learning_rate=1e-12, warmup=0, total=100)
    state, step = start(Toy(), config, mesh)
    batch = to_devices(next(Stream()), mesh)
    new, first = step(state, batch, jax.random.key(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    _, second = step(new, batch, jax.random.key(2))
    assert abs(float(first["loss"]) - float(second["loss"])) > 1e-3


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_closed_form(warmup):
    mesh = mesh_of(1, 1)
    state, step = start(Toy(), UNCLIPPED, mesh, ema_decay=0.9, ema_warmup=warmup)
    seen = [np.asarray(state.params["first"]["kernel"], np.float64)]
    for batch in (next(Stream(index=i)) for i in range(30)):
        state, _ = step(state, to_devices(batch, mesh), jax.random.key(2))
        seen.append(np.asarray(state.params["first"]["kernel"], np.float64))
    decay = [min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in range(1, 31)]
    weights = [np.prod(decay)] + [(1 - decay[i]) * np.prod(decay[i + 1 :]) for i in range(30)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(weight * value for weight, value in zip(weights, seen))
    np.testing.assert_allclose(state.ema["first"]["kernel"], expected, atol=2e-6)
    assert np.max(np.abs(expected - seen[-1])) > 1e-3


def test_a_loss_that_is_not_finite_changes_counters_only():
    mesh = mesh_of(1, 1)
    state, step = start(Toy(), UNCLIPPED, mesh)
    stream = Stream(bad=frozenset({2, 3, 5}))
    counts = []
    for index in range(7):
        kept = jax.device_get((state.params, state.ema, state.opt_state))
        state, metrics = step(state, to_devices(next(stream), mesh), jax.random.key(2))
        now = jax.device_get((state.params, state.ema, state.opt_state))
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, kept, now)))
        assert same == (index in stream.bad), index
        assert np.isfinite(metrics["loss"]) == (index not in stream.bad)
        counts.append(
            (int(state.step), int(state.skipped), int(state.consecutive_skips), int(state.max_consecutive_skips))
        )
    assert counts == [(1, 0, 0, 0), (2, 0, 0, 0), (3, 1, 1, 1), (4, 2, 2, 2), (5, 2, 0, 2), (6, 3, 1, 2), (7, 3, 0, 2)]


@dataclass(frozen=True)
class Cusp(SingleOptimizer):
    """A finite loss whose gradient is not: sqrt at 0."""

    def init(self, key):
        return {"w": jnp.ones(4)}, ()

    def loss(self, params, extra, frozen, batch, key, step):
        return jnp.sqrt(jnp.sum(0.0 * params["w"])) + jnp.mean(batch["x"]), ({}, extra)

    def batch_spec(self, batch_size, side):
        return Toy().batch_spec(batch_size, side)


def test_a_gradient_that_is_not_finite_is_skipped_too():
    mesh = mesh_of(1, 1)
    state, step = start(Cusp(), UNCLIPPED, mesh)
    state, metrics = step(state, to_devices(next(Stream()), mesh), jax.random.key(2))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.params["w"], 1.0)


def test_skipped_steps_do_not_move_the_learning_rate():
    mesh = mesh_of(1, 1)
    config = OptimizerConfig(learning_rate=1.0, warmup=10, total=100)
    state, step = start(Toy(), config, mesh)
    stream, rates = Stream(bad=frozenset({1, 2})), []
    for _ in range(5):
        state, metrics = step(state, to_devices(next(stream), mesh), jax.random.key(2))
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([0.0, 0.1, 0.1, 0.1, 0.2])


def test_adafactor_trains_split_over_devices():
    mesh = mesh_of(1, 2)
    config = OptimizerConfig(kind=Adafactor(), learning_rate=0.01, warmup=0, total=100)
    state, step = start(Toy(width=8192, draws=False), config, mesh)
    batch, losses = to_devices(next(Stream()), mesh), []
    for _ in range(20):
        state, metrics = step(state, batch, jax.random.key(2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0], losses


def test_other_parameters_to_start_from():
    mesh, config = mesh_of(1, 8), UNCLIPPED
    given = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), WIDE.init(jax.random.key(0))[0])
    state = init_state(WIDE, config, jax.random.key(1), mesh, given)
    np.testing.assert_array_equal(state.params["first"]["kernel"], 0.5)
    np.testing.assert_array_equal(state.ema["second"]["kernel"], 0.5)
    given["second"]["kernel"] = np.zeros((3, 3))
    with pytest.raises(ValueError, match=r"initial parameters does not fit .*second/kernel \(3, 3\), not \(8192, 8\)"):
        init_state(WIDE, config, jax.random.key(1), mesh, given)


def test_an_update_that_is_not_finite_is_skipped_too():
    """It would be saved, and every run from there on would diverge."""
    mesh = mesh_of(1, 1)
    huge = OptimizerConfig(learning_rate=3e38, warmup=0, total=100, clip=None)
    state, step = start(Toy(), huge, mesh)
    kept = jax.device_get(state.params)
    state, metrics = step(state, to_devices(next(Stream()), mesh), jax.random.key(2))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and int(state.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, kept)

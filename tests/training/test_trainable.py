"""What a loss may hold beside parameters of one optimizer: several optimizers, an updated extra, frozen arrays.

Each is trained by `train`, resumed bit by bit, the same on one device and on eight, and unharmed by a NaN.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trainable_toys import CASES, CODES, DECAY, HALVES, TEACHER, Adversarial, Counting, Quantized, Student, steady
from training_toy import Stream, config

from jaxdiff.training import param_sharding
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import Layout, Loaded, train
from jaxdiff.training.mesh import make_mesh, to_devices
from jaxdiff.training.metrics import read
from jaxdiff.training.optimizer import SGD, AdamW, Muon
from jaxdiff.training.param_sharding import ParamSharding
from jaxdiff.training.plan import estimated_costs
from jaxdiff.training.state import abstract_state, init_state, place_frozen, placements_of
from jaxdiff.training.step import make_step

SMALL = ParamSharding(minimum=64)  # all that has two axes is split
ROWS = 32
MESHES = [(8, 1), (2, 4)]
KEY = jax.random.key(2)


def mesh_of(data=1, fsdp=1):
    return make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])


def begun(case, mesh, **options):
    """The first state, and the step of state and batch."""
    state = init_state(case.trainable, case.optimizer, jax.random.key(1), mesh, placement=SMALL)
    placements = placements_of(abstract_state(case.trainable, case.optimizer, mesh, SMALL))
    frozen = place_frozen(case.frozen, mesh, SMALL)
    step = make_step(case.trainable, case.optimizer, placements, frozen=placements_of(frozen), **options)
    return state, lambda state, batch: step(state, to_devices(batch, mesh), KEY, frozen)


def stepped(case, sizes=(1, 1), steps=5, **options):
    """The losses and the state after so many steps."""
    mesh, stream, losses = mesh_of(*sizes), Stream(rows=ROWS), []
    with jax.set_mesh(mesh):
        state, step = begun(case, mesh, **options)
        for _ in range(steps):
            state, metrics = step(state, next(stream))
            losses.append(float(metrics["loss"]))
    return losses, state


def changed_by(state):
    return jax.device_get((state.params, state.extra, state.ema, state.opt_state))


def same_bits(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def assert_near(a, b, tolerance=1e-5):
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)  # noqa: E731
    jax.tree.map(near, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def alone():
    """Losses and state on one device, by the name of the case and the number of parts."""
    kept = {}

    def of(name, accumulate=1):
        if (name, accumulate) not in kept:
            kept[name, accumulate] = stepped(CASES[name], accumulate=accumulate)
        return kept[name, accumulate]

    return of


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_are_one(alone, name, sizes):
    losses, state = stepped(CASES[name], sizes)
    expected, one = alone(name)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_near((state.params, state.ema, state.extra), (one.params, one.ema, one.extra))


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_same_on_eight_devices(alone, name):
    losses, state = stepped(CASES[name], (2, 4), accumulate=4)
    expected, one = alone(name, accumulate=4)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_near((state.params, state.extra), (one.params, one.extra))
    if not jax.tree.leaves(one.extra):  # where nothing is handed on, parts are the full batch
        assert_near(one.params, alone(name)[1].params, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_nan_changes_nothing(name):
    stream, mesh = Stream(rows=ROWS, bad=frozenset({2})), mesh_of()
    state, step = begun(CASES[name], mesh)
    for index in range(4):
        kept = changed_by(state)
        state, _ = step(state, next(stream))
        assert same_bits(changed_by(state), kept) == (index == 2)
    assert int(state.skipped) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_dies_goes_on_bit_by_bit(name, tmp_path):
    """Through `train`: it dies two steps after a checkpoint, which has extra and all optimizers and nothing frozen."""
    case, layout = CASES[name], Layout(mesh_of(2, 4), SMALL)
    settings = config(optimizer=case.optimizer, steps=9, save_every=4)

    def run(out, before=None):
        loaded = Loaded(frozen=case.frozen)
        return train(case.trainable, Stream(rows=ROWS, before=before), settings, out, layout=layout, loaded=loaded)

    def die(index):
        if index == 8:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "dies", die)
    assert [path.name for path in (tmp_path / "dies" / "checkpoints").iterdir()] == ["4"]
    state, expected = run(tmp_path / "dies"), run(tmp_path / "lives")
    assert same_bits(jax.device_get(state), jax.device_get(expected))
    lines = read(tmp_path / "dies" / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [line["loss"] for line in read(tmp_path / "lives" / "metrics.jsonl")]
    rates = {name: value for name, value in lines[-1].items() if name.startswith("learning_rate")}
    if name == "adversarial":
        assert rates == pytest.approx({"learning_rate_generator": 1e-2, "learning_rate_discriminator": 0.05})
    else:
        assert rates == pytest.approx({"learning_rate": 1e-2})


def test_two_optimizers_are_those_of_optax(alone):
    """Each half of the loss alone, with its own optimizer and its own clipping, in a loop written by hand."""
    toy = Adversarial()
    rules = {
        "generator": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        "discriminator": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05)),
    }
    gradients = {
        "generator": jax.grad(toy.generator_loss),
        "discriminator": jax.grad(toy.discriminator_loss, argnums=1),
    }
    params = jax.device_get(init_state(toy, HALVES, jax.random.key(1), mesh_of()).params)
    states, stream, norms = {half: rules[half].init(params[half]) for half in rules}, Stream(rows=ROWS), []
    for _ in range(5):
        x, new = jnp.asarray(next(stream)["x"]), {}
        for half, rule in rules.items():
            gradient = gradients[half](params["generator"], params["discriminator"], x)
            updates, states[half] = rule.update(gradient, states[half])
            new[half] = optax.apply_updates(params[half], updates)
        norms.append(float(optax.tree.norm(gradient)))
        params = new
    assert min(norms) > 0.1  # so the discriminator's is clipped
    assert_near(alone("adversarial")[1].params, params)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_codebook_of_averages_is_the_closed_form(accumulate):
    """In numpy, part after part. The encoder stays as it is, to the bit, in the average too."""
    case = replace(CASES["quantized"], trainable=Quantized(fixed=True))
    first, _ = begun(case, mesh_of())
    first = jax.device_get(first)
    _, state = stepped(case, accumulate=accumulate)
    sums, counts, stream = first.extra["sums"], first.extra["counts"], Stream(rows=ROWS)
    for _ in range(5):
        x = next(stream)["x"]
        for part in range(accumulate):
            z = x[part::accumulate] @ first.params["encoder"]["kernel"]
            taken = np.eye(CODES)[np.linalg.norm(z[:, None] - sums / counts[:, None], axis=-1).argmin(-1)]
            counts = DECAY * counts + (1 - DECAY) * taken.sum(0)
            sums = DECAY * sums + (1 - DECAY) * taken.T @ z
    assert_near(state.extra, {"sums": sums, "counts": counts, "batches": 5 * accumulate})
    assert np.abs(sums - first.extra["sums"]).max() > 0.1
    for tree in (state.params, state.ema):
        np.testing.assert_array_equal(tree["encoder"]["kernel"], first.params["encoder"]["kernel"])
    assert np.abs(state.params["decoder"]["kernel"] - first.params["decoder"]["kernel"]).max() > 1e-3


def test_extra_lies_split_like_parameters():
    state = stepped(CASES["quantized"], (1, 8), steps=1)[1]
    assert state.extra["sums"].addressable_shards[0].data.shape == (16, 2)
    assert state.extra["batches"].sharding.is_fully_replicated


def test_an_extra_that_is_not_finite_is_a_skipped_step():
    case = replace(CASES["student"], trainable=Counting(), frozen=())
    state, step = begun(case, mesh_of())
    stream = Stream(rows=ROWS, bad=frozenset({1}))
    state, _ = step(state, next(stream))
    kept = changed_by(state)
    state, metrics = step(state, next(stream))
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 1 and same_bits(changed_by(state), kept)


def test_a_teacher_is_read_and_never_changed_nor_saved(tmp_path):
    case, mesh = CASES["student"], mesh_of(1, 8)
    state, _ = begun(case, mesh)
    frozen = place_frozen(TEACHER, mesh, SMALL)
    assert frozen["teacher"].addressable_shards[0].data.shape == (8, 2)
    with jax.set_mesh(mesh):
        step = make_step(case.trainable, case.optimizer, placements_of(state), frozen=placements_of(frozen))
        stream = Stream(rows=ROWS)
        for number in range(60):
            state, metrics = step(state, to_devices(next(stream), mesh), KEY, frozen)
            assert metrics["seen"] == number  # the loss is told the step
    np.testing.assert_array_equal(frozen["teacher"], TEACHER["teacher"])  # it was not donated either
    assert metrics["loss"] < 0.3
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(60, state, {})
    names = "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("_METADATA"))
    assert "student" in names and "teacher" not in names


def test_another_teacher_is_refused(tmp_path):
    def run(frozen):
        settings = config(optimizer=CASES["student"].optimizer, steps=1)
        return train(Student(), Stream(), settings, tmp_path, layout=Layout(mesh_of()), loaded=Loaded(frozen=frozen))

    run(TEACHER)
    run(jax.tree.map(jnp.asarray, TEACHER))
    with pytest.raises(ValueError, match=r"saved with other settings: frozen was 'arrays of hash \w{12}' and is") as no:
        run({"teacher": 2 * TEACHER["teacher"]})
    assert "\n" not in str(no.value)


def test_labels_and_optimizers_fit_or_are_refused():
    mesh, one = mesh_of(), steady(SGD(), 0.1)
    for optimizer, words in [
        (one, "one optimizer for arrays labelled discriminator, generator: give one for each label"),
        ({"generator": one}, "optimizers for generator, and arrays labelled discriminator, generator"),
        ({**HALVES, "codebook": one}, "optimizers for codebook, discriminator, generator, and arrays labelled"),
    ]:
        with pytest.raises(ValueError, match=words):
            abstract_state(Adversarial(), optimizer, mesh)


@pytest.mark.parametrize("kind", [AdamW(), Muon()])
def test_moments_of_each_label_lie_where_its_parameters_do(kind):
    optimizers = {"generator": steady(kind, 0.1), "discriminator": steady(SGD(0.9), 0.1)}
    state = abstract_state(Adversarial(), optimizers, mesh_of(1, 8), SMALL)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if leaf.size >= 64:
            assert "fsdp" in leaf.sharding.spec, param_sharding.name_of(path)


def test_an_estimate_counts_extra_and_frozen_arrays():
    mesh = make_mesh(data=1, fsdp=8)

    def of(case):
        state = abstract_state(case.trainable, case.optimizer, mesh, SMALL)
        frozen = place_frozen(case.frozen, mesh, SMALL)
        return state, estimated_costs(case.trainable, state, case.trainable.batch_spec(4, 1), frozen)

    state, costs = of(CASES["student"])
    kernel = 4 * state.params["student"].size
    assert costs.collectives["all-gather"]["bytes"] == 2 * kernel * 7 / 8  # its own and the teacher's
    assert costs.collectives["reduce-scatter"]["bytes"] == kernel * 7 / 8
    assert costs.argument_bytes == param_sharding.bytes_on_a_device(state) + kernel // 8
    state, costs = of(CASES["quantized"])
    gathered = sum(4 * leaf.size for leaf in jax.tree.leaves((state.params, state.extra)))
    assert costs.collectives["all-gather"]["bytes"] == gathered * 7 / 8

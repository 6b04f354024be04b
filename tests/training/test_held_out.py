"""Held-out losses: the same number however the examples are batched and spread, logged beside the training loss."""

import os
import re
import signal
import sys
import time

import held_out_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import trainable_toys
from held_out_toys import EXAMPLES, ByExample, batches
from processes import Processes
from training_toy import Stream, Toy, config

from jaxdiff.training.held_out import HeldOut
from jaxdiff.training.interruption import Preempted
from jaxdiff.training.iteration import Iteration
from jaxdiff.training.loop import Hooks, Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read
from jaxdiff.training.param_sharding import ParamSharding
from jaxdiff.training.state import abstract_state, init_state, place_frozen, placements_of

pytestmark = pytest.mark.usefixtures("shared_steps")
ONE = make_mesh(devices=jax.devices()[:1])
OPTIMIZER = config().optimizer
BY_EXAMPLE = ByExample()
SMALL = ParamSharding(minimum=64)


def evaluated(trainable, held_out, mesh=ONE, optimizer=OPTIMIZER, frozen=()):
    """The metrics of fresh parameters."""
    state = init_state(trainable, optimizer, jax.random.key(1), mesh, placement=SMALL)
    placements = placements_of(abstract_state(trainable, optimizer, mesh, SMALL))
    with jax.set_mesh(mesh):
        frozen = place_frozen(frozen, mesh, SMALL)
        evaluate = HeldOut(trainable, placements, frozen, mesh, held_out)
        found = evaluate(state)
        assert evaluate(state) == found or any(np.isnan(list(found.values())))
    return found, state


def wanted(trainable, params):
    """One example at a time."""
    totals = [
        trainable.held_out_losses(
            params, (), (), {"x": held_out_toys.examples()["x"][i : i + 1]}, jnp.array([i]), jax.random.key(0)
        )["held_out_loss"][0]
        for i in range(EXAMPLES)
    ]
    return {"held_out_loss": np.mean(totals), "held_out_loss_odd": np.mean(totals[1::2])}


def test_the_number_depends_on_neither_batches_nor_devices():
    toy = ByExample()
    found, state = evaluated(toy, lambda: batches(8))
    expected = wanted(toy, jax.device_get(state.ema))
    assert np.isnan(found.pop("held_out_loss_none"))  # no example is of that kind
    assert found == pytest.approx(expected, rel=1e-5)
    for rows, mesh in ((EXAMPLES, ONE), (5, ONE), (8, make_mesh(data=2, fsdp=4)), (3, make_mesh(fsdp=8))):
        again, _ = evaluated(toy, lambda rows=rows: batches(rows), mesh)
        del again["held_out_loss_none"]
        assert again == pytest.approx(expected, rel=1e-5), (rows, mesh.shape)


def test_other_trainables_are_evaluated_by_their_loss_with_a_key_of_the_batch():
    found, state = evaluated(Toy(), lambda: list(batches(8)))
    params, losses, largest = jax.device_get(state.ema), [], []
    for number, batch in enumerate(batches(8)):
        key = jax.random.fold_in(jax.random.key(0), number)
        loss, (metrics, _) = Toy().loss(params, (), (), batch, key, jnp.int32(0))
        losses += [float(loss)] * len(batch["x"])
        largest += [float(metrics["largest_error"])] * len(batch["x"])
    expected = {"held_out_loss": np.mean(losses), "held_out_largest_error": np.mean(largest)}
    assert found == pytest.approx(expected, rel=1e-5)


def test_extra_and_frozen_arrays_are_read_and_stay():
    for name in ("quantized", "student"):
        case = trainable_toys.CASES[name]
        full = lambda: list(batches(8))[:4]  # noqa: E731
        one, state = evaluated(case.trainable, full, ONE, case.optimizer, case.frozen)
        before = jax.device_get(state.extra)
        eight, _ = evaluated(case.trainable, full, make_mesh(data=2, fsdp=4), case.optimizer, case.frozen)
        assert eight == pytest.approx(one, rel=1e-5) and one["held_out_loss"] > 0
        assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(state.extra)))


@pytest.mark.parametrize(
    ("trainable", "held_out", "words"),
    [
        (BY_EXAMPLE, list, "no held-out examples"),
        (Toy(), list, "no held-out examples"),
        (Toy(), lambda: batches(8), "held-out batch 4: a batch of 5 does not divide over 8 devices"),
        (
            ByExample(),
            lambda: [{"x": np.zeros((4, 8)), "y": np.zeros((3, 8))}],
            r"held-out batch 0: arrays of \[3, 4\]",
        ),
        (ByExample(), lambda: [{"x": np.zeros((0, 8))}], r"held-out batch 0: arrays of \[0\] rows"),
    ],
)
def test_examples_that_cannot_be_evaluated_are_named(trainable, held_out, words):
    with pytest.raises(ValueError, match=words):
        evaluated(trainable, held_out, make_mesh(fsdp=8))


@pytest.mark.slow  # tests/models/test_diffusion.py has formulas in place of the network
def test_a_diffusion_models_losses_are_the_same_on_eight_devices():
    rng = np.random.default_rng(0)
    spec = small.SR.batch_spec(20, 16)
    batch = {name: rng.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in spec.items()}
    parts = lambda rows: [{n: v[i : i + rows] for n, v in batch.items()} for i in range(0, 20, rows)]  # noqa: E731
    one, _ = evaluated(small.SR, lambda: parts(20))
    eight, _ = evaluated(small.SR, lambda: parts(8), make_mesh(data=2, fsdp=4))
    assert len(one) == 9 and eight == pytest.approx(one, rel=1e-4)


# In a run


def run(out, held_out=lambda: batches(8), trainable=BY_EXAMPLE, stream=None, **changes):
    changes = {"steps": 10, "evaluate_every": 4} | changes
    hooks = Hooks(held_out=held_out)
    return train(trainable, stream or Stream(), config(**changes), out, layout=Layout(ONE), hooks=hooks)


def curve(out, name="held_out_loss"):
    return {line["step"]: line[name] for line in read(out / "metrics.jsonl") if name in line}


def training(out):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, run(out)


def test_a_run_logs_them_every_so_many_steps_and_at_the_end(finished, tmp_path):
    out, state = finished
    assert sorted(curve(out)) == sorted(curve(out, "held_out_loss_odd")) == [4, 8, 10]
    assert curve(out)[10] == pytest.approx(wanted(ByExample(), jax.device_get(state.ema))["held_out_loss"], rel=1e-5)
    assert curve(out, "held_out_loss_none")[10] is None
    train(ByExample(), Stream(), config(steps=10), tmp_path, layout=Layout(ONE))
    assert training(tmp_path) == training(out)  # nothing else has changed
    assert (out / "loss.png").stat().st_size > (tmp_path / "loss.png").stat().st_size  # one curve more


def test_a_run_without_either_setting_evaluates_nothing(tmp_path):
    run(tmp_path, steps=4, evaluate_every=0, held_out=lambda: pytest.fail("asked for"))
    run(tmp_path, steps=5, held_out=None)
    assert not curve(tmp_path)


def test_a_finished_run_is_left_as_it_is_unless_its_last_evaluation_is_missing(finished, tmp_path):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    run(out, lambda: pytest.fail("asked for"))
    assert (out / "metrics.jsonl").read_bytes() == before
    run(tmp_path, held_out=None)
    run(tmp_path)
    assert curve(tmp_path) == {10: curve(out)[10]} and training(tmp_path) == training(out)


@pytest.mark.parametrize("at", [8, 10])
def test_a_signal_breaks_an_evaluation_off_and_running_again_makes_up_for_it(finished, tmp_path, at):
    asked = []

    def told():
        asked.append(None)
        for number, batch in enumerate(batches(8)):
            if len(asked) == (2 if at == 8 else 3) and number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("went on")
            yield batch

    with pytest.raises(Preempted) as caught:
        run(tmp_path, told)
    assert f"stopped by SIGTERM after step {at}, saved" in caught.value.message
    assert at not in curve(tmp_path) and read(tmp_path / "metrics.jsonl")[-1]["step"] == at
    run(tmp_path)
    assert curve(tmp_path) == curve(finished[0]) and training(tmp_path) == training(finished[0])


def test_a_stop_at_the_last_step_does_not_wait_for_its_evaluation(finished, tmp_path, monkeypatch):
    def told_at_the_end(self, *arguments):
        metrics = advance(self, *arguments)
        if self.number == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    advance = Iteration.advance
    with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
        patch.setattr(Iteration, "advance", told_at_the_end)
        run(tmp_path, lambda: pytest.fail("asked for"), evaluate_every=100)
    assert "stopped by SIGTERM after step 10, saved" in caught.value.message
    run(tmp_path, evaluate_every=100)
    assert curve(tmp_path) == {10: curve(finished[0])[10]}


def test_its_time_is_none_of_the_speed(tmp_path, capsys):
    def slow():
        time.sleep(1)
        return batches(8)

    run(tmp_path, slow, steps=12, log_every=3, evaluate_every=6, save_every=50, progress=True, unit="pairs")
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(line["pairs_per_second"] > 80 for line in lines)  # 48 rows in 1 s and more would be 48 at most
    shown = capsys.readouterr().err
    assert "evaluating 00:00" in shown
    last = shown.split("\r")[-1]
    assert re.search(r"loss [\d.]+, held-out [\d.]+, \d[\d.e+]* pairs/s", last)
    assert f"held-out {curve(tmp_path)[12]:.4g}" in last


def test_several_processes_have_the_numbers_of_one(tmp_path):
    """37 examples over two processes, 19 and 18 of them, in batches of 9: one has a batch more."""
    alone, out = tmp_path / "alone", tmp_path / "two"
    run(alone, steps=6)
    with Processes([sys.executable, held_out_toys.__file__, out, 9], 2) as processes:
        assert processes.wait(120) == [0, 0], processes.words()
    assert sorted(curve(out)) == [4, 6]
    for name in ("held_out_loss", "held_out_loss_odd"):
        assert curve(out, name) == pytest.approx(curve(alone, name), rel=1e-5)


def test_one_of_several_told_to_stop_in_an_evaluation_stops_all_before_the_same_batch(tmp_path):
    with Processes([sys.executable, held_out_toys.__file__, tmp_path, 1, 1], 2) as processes:
        assert processes.wait(120) == [75, 75], processes.words()
        assert "after step 4, saved" in processes.err(0)
    assert not curve(tmp_path) and read(tmp_path / "metrics.jsonl")[-1]["step"] == 4


def test_what_is_evaluated_is_the_average_in_the_networks_type(tmp_path):
    class Cast(ByExample):
        def cast(self, params):
            return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)

    toy = Cast()
    state = run(tmp_path, trainable=toy, steps=4)
    expected = wanted(toy, toy.cast(jax.device_get(state.ema)))["held_out_loss"]
    assert curve(tmp_path)[4] == pytest.approx(expected, rel=1e-5)
    assert abs(curve(tmp_path)[4] - wanted(toy, jax.device_get(state.ema))["held_out_loss"]) > 1e-5

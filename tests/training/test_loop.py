"""Whole runs: resumed after SIGKILL and SIGTERM bit by bit, divergence, logs and images of the loss."""

import os
import re
import signal
import struct
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import training_toy
from processes import Processes
from tensorboardX.proto.event_pb2 import Event
from training_toy import Stream, Toy, config

from jaxdiff.training.checkpoints import Checkpoints, load_ema
from jaxdiff.training.compilation_cache import enable_compilation_cache, without_compilation_cache
from jaxdiff.training.loop import Diverged, Hooks, Layout, Loaded, Preempted, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read

pytestmark = pytest.mark.usefixtures("shared_steps")
ONE = make_mesh(devices=jax.devices()[:1])


def run(out, stream=None, **changes):
    return train(Toy(), stream or Stream(), config(**changes), out, layout=Layout(ONE))


def losses(out):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read(out / "metrics.jsonl")]


def same_bits(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 30 steps in one go."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, run(out, steps=30)


def test_a_killed_run_resumes_bit_by_bit(uninterrupted, tmp_path):
    with Processes([sys.executable, training_toy.__file__, tmp_path, 30, 19], 1) as child:
        child.until(lambda: (tmp_path / "checkpoints" / "15").exists() and len(losses(tmp_path)) >= 16)
        child.kill(signal.SIGKILL)
        assert child.wait(20) == [-signal.SIGKILL]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')  # as if killed while writing
    state = run(tmp_path, steps=30)
    assert losses(tmp_path) == losses(uninterrupted[0])
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 31))
    assert same_bits(state, uninterrupted[1])


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_saves_and_resumes_bit_by_bit(uninterrupted, tmp_path, capsys, which):
    handler = signal.getsignal(which)
    stream = Stream(before=lambda index: os.kill(os.getpid(), which) if index == 12 else None)
    with pytest.raises(Preempted) as caught:
        run(tmp_path, stream, steps=30)
    assert caught.value.code == 75
    assert which.name in caught.value.message and "run again to go on" in caught.value.message
    assert caught.value.message in capsys.readouterr().err
    assert signal.getsignal(which) is handler
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 10 < saved < 15 and f"after step {saved}," in caught.value.message
    assert same_bits(run(tmp_path, steps=30), uninterrupted[1])
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_a_grain_iterator_resumes_where_it_was(tmp_path):
    def stream():
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, training_toy.FEATURES)).astype(np.float32)
        data = grain.MapDataset.source([{"x": row} for row in x]).shuffle(seed=3).repeat().batch(16)
        return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    whole = run(tmp_path / "whole", stream(), steps=12)
    run(tmp_path / "parts", stream(), steps=7)
    assert same_bits(run(tmp_path / "parts", stream(), steps=12), whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    out, state = uninterrupted
    before = (out / "metrics.jsonl").read_text()
    again = run(out, Stream(before=lambda index: pytest.fail("asked for data")), steps=30)
    assert same_bits(again, state)
    assert (out / "metrics.jsonl").read_text() == before


def test_ten_in_a_row_stop_with_the_last_good_checkpoint(uninterrupted, tmp_path):
    with pytest.raises(Diverged, match=r"^10 steps in a row by step 22 had a loss, .* not finite") as caught:
        run(tmp_path, Stream(bad=frozenset(range(12, 22))), steps=30, save_every=11)
    assert "\n" not in str(caught.value) and (tmp_path / "loss.png").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["11"]
    assert [line["loss"] is None for line in read(tmp_path / "metrics.jsonl")] == [False] * 12 + [True] * 10
    assert same_bits(run(tmp_path, steps=30, save_every=11), uninterrupted[1])  # with good data it goes on


def test_nothing_is_saved_while_losses_are_not_finite(tmp_path):
    """What made them so may be in the parameters already: the last checkpoint is of a good step."""
    with pytest.raises(Diverged):
        run(tmp_path / "lost", Stream(bad=frozenset(range(12, 30))), steps=30, save_every=4)
    assert sorted(int(path.name) for path in (tmp_path / "lost" / "checkpoints").iterdir()) == [4, 8, 12]
    run(tmp_path / "mended", Stream(bad=frozenset(range(14, 18))), steps=21, save_every=8)
    saved = sorted(int(path.name) for path in (tmp_path / "mended" / "checkpoints").iterdir())
    assert saved == [8, 19, 21]  # that of 16 came after the first good step


def test_ten_in_a_row_are_seen_though_the_loss_recovered_before_the_next_line(tmp_path):
    with pytest.raises(Diverged, match="10 steps in a row by step 25"):
        run(tmp_path, Stream(bad=frozenset(range(3, 13))), steps=30, log_every=25, save_every=30)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_nine_in_a_row_are_skipped_and_counted(tmp_path):
    bad = frozenset(range(3, 12)) | {13}
    state = run(tmp_path, Stream(bad=bad), log_every=5)
    assert int(state.skipped) == 10
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 13, 15, 20]  # after step 13 it is saved
    assert [line["skipped"] for line in lines] == [2, 7, 9, 10, 10]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False]


def test_a_line_is_the_mean_over_its_interval(uninterrupted, tmp_path):
    run(tmp_path, steps=30, log_every=10, save_every=15)
    every = [loss for _, loss, _ in losses(uninterrupted[0])]
    lines = losses(tmp_path)
    assert [step for step, *_ in lines] == [10, 15, 20, 30]  # a save ends an interval too
    means = [np.mean(part) for part in (every[:10], every[10:15], every[15:20], every[20:])]
    assert [loss for _, loss, _ in lines] == pytest.approx(means, rel=1e-6)


def events(folder: Path):
    """(step, tag, value) of every scalar in TensorBoard's event files: length, checksum, message, checksum."""
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def test_a_run_leaves_metrics_events_and_a_plot(uninterrupted):
    out, _ = uninterrupted
    lines = read(out / "metrics.jsonl")
    names = {"step", "loss", "grad_norm", "largest_error", "learning_rate", "images_per_second", "skipped"}
    assert all(set(line) == names for line in lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["images_per_second"] > 0
    written = {(step, value) for step, tag, value in events(out / "tensorboard") if tag == "loss"}
    assert written == {(line["step"], float(np.float32(line["loss"]))) for line in lines}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_progress_bar_shows_step_loss_and_speed(tmp_path, capsys):
    train(Toy(), Stream(), config(progress=True, description="toy"), tmp_path, layout=Layout(ONE))
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"toy: 100%.* 20/20 .*loss \d.*images/s", shown)


def test_samples_are_drawn_from_the_average(tmp_path):
    seen = []
    state = train(
        Toy(),
        Stream(),
        config(sample_every=8),
        tmp_path,
        layout=Layout(ONE),
        hooks=Hooks(lambda step, averaged, extra: seen.append((step, jax.device_get(averaged)))),
    )
    assert [step for step, _ in seen] == [8, 16, 20]
    assert same_bits(seen[-1][1], state.ema) and same_bits(seen[-1][1], load_ema(tmp_path / "checkpoints"))
    assert not same_bits(seen[0][1], seen[1][1])


def test_the_whole_loop_on_eight_devices(uninterrupted, tmp_path):
    mesh = make_mesh(data=2, fsdp=4)
    train(Toy(), Stream(), config(steps=10), tmp_path, layout=Layout(mesh))
    one = [loss for _, loss, _ in losses(uninterrupted[0])][:10]
    assert [loss for _, loss, _ in losses(tmp_path)] == pytest.approx(one, rel=1e-4)


def test_training_goes_on_from_other_parameters(uninterrupted, tmp_path):
    averaged = load_ema(uninterrupted[0] / "checkpoints")
    train(Toy(), Stream(), config(steps=1), tmp_path, layout=Layout(ONE), loaded=Loaded(averaged))
    assert losses(tmp_path)[0][1] < 0.9 * losses(uninterrupted[0])[0][1]


def test_saving_does_not_disturb_what_is_saved(uninterrupted, tmp_path):
    # The next steps reuse (donate) the memory of the state that is being written in the background.
    run(tmp_path, steps=15)
    with Checkpoints(tmp_path / "checkpoints", {}) as saved:
        assert saved.latest() == 15
    early = load_ema(tmp_path / "checkpoints")
    out = tmp_path / "long"
    run(out, steps=30, save_every=15, keep=2)
    (out / "checkpoints" / "30").rename(tmp_path / "moved")
    assert same_bits(load_ema(out / "checkpoints"), early)


@pytest.mark.parametrize(
    ("stream", "changes", "words"),
    [
        (Stream(rows=6), {"accumulate": 4}, "a batch of 6 does not divide over 1 devices × 4 parts"),
        (Stream(length=3), {}, "the data ended after 3 batches of the 20 still to come"),
    ],
)
def test_data_that_does_not_fit_is_named(tmp_path, stream, changes, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, stream, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"log_every": 0},
        {"save_every": 0},
        {"keep": 0},
        {"sample_every": -1},
        {"evaluate_every": -1},
        {"stall": -1.0},
        {"stall_exit": -1.0},
        {"seed": -1},
        {"ema_decay": 1.0},
        {"ema_decay": float("nan")},
        {"unit": ""},
    ],
)
def test_bad_settings_are_named(changes):
    """The message begins with the name of the field, so that a command can say its flag."""
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"^{name} {re.escape(repr(value))}: must be "):
        config(**changes)


def test_compiled_programs_are_kept_where_told(tmp_path, monkeypatch):
    set_values = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_values.update({name: value}))
    kept = jax.config.jax_compilation_cache_dir
    enable_compilation_cache(tmp_path)
    if kept is None:
        assert set_values["jax_compilation_cache_dir"] == str(tmp_path)
    else:  # the user's own choice, here that of the tests, stays
        assert not set_values


def test_what_is_compiled_anew_is_neither_read_nor_kept(tmp_path):
    ours = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    kept = {name: getattr(jax.config, name) for name in ours}
    try:
        for name, value in ours.items():
            jax.config.update(name, value)
        with without_compilation_cache():
            jax.jit(lambda x: x + 41).lower(1.0).compile()
        assert not any(tmp_path.iterdir())
        jax.jit(lambda x: x + 41).lower(1.0).compile()
        assert any(tmp_path.iterdir())
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
        with without_compilation_cache():  # forgets the folder
            pass

"""A signal at an unlucky moment: waiting for data, before the first step, in a sample, while saving."""

import os
import signal
import threading
import time

import jax
import pytest
from training_toy import Stream, Toy, config

from jaxdiff.training import multihost
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.interruption import Interruption, InterruptRequested, Preempted
from jaxdiff.training.loop import Hooks, Layout, train
from jaxdiff.training.mesh import make_mesh

ONE = make_mesh(devices=jax.devices()[:1])


def run(out, stream=None, hook=None, **changes):
    return train(Toy(), stream or Stream(), config(**changes), out, layout=Layout(ONE), hooks=Hooks(hook))


def saved(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_data_that_never_comes_does_not_keep_a_run_from_stopping(tmp_path):
    def hang(index):
        if index == 12:
            threading.Timer(0.5, tell).start()
            time.sleep(100)

    begun = time.monotonic()
    with pytest.raises(Preempted, match="75") as caught:
        run(tmp_path, Stream(before=hang))
    assert "stopped by SIGTERM after step 11, saved in" in caught.value.message
    assert time.monotonic() - begun < 60 and saved(tmp_path) == [5, 10, 11]
    run(tmp_path)
    assert saved(tmp_path)[-1] == 20


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    with pytest.raises(Preempted) as caught:
        run(tmp_path, Stream(before=lambda index: tell()))
    assert "after step 0, before anything was to be saved" in caught.value.message and saved(tmp_path) == []


def test_while_a_checkpoint_is_read_a_signal_stops_at_once(tmp_path, monkeypatch):
    run(tmp_path, steps=5)

    class Slow(Stream):
        def set_state(self, state):
            tell()
            pytest.fail("went on")

    with pytest.raises(Preempted) as caught:
        run(tmp_path, Slow())
    assert "before a step was taken" in caught.value.message and saved(tmp_path) == [5]


def test_a_sample_is_broken_off_and_the_state_saved(tmp_path):
    def hook(step, averaged, extra):
        tell()
        pytest.fail("went on")

    with pytest.raises(Preempted) as caught:
        run(tmp_path, hook=hook, sample_every=7)
    assert "after step 7, saved" in caught.value.message and saved(tmp_path) == [5, 7]


def test_a_second_signal_does_not_disturb_the_saving(tmp_path, monkeypatch):
    save = Checkpoints.save

    def told_again(self, *arguments):
        tell()
        save(self, *arguments)
        tell()

    monkeypatch.setattr(Checkpoints, "save", told_again)
    with pytest.raises(Preempted):
        run(tmp_path, Stream(before=lambda index: tell() if index == 3 else None))
    assert saved(tmp_path) == [2]


def test_a_second_interrupt_from_the_keyboard_is_one(tmp_path):
    with Interruption() as interruption:
        tell(signal.SIGINT)
        assert interruption.reached() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            tell(signal.SIGINT)
    with Interruption() as interruption:
        with pytest.raises(InterruptRequested), interruption.at_once():
            tell()
        tell()  # noted only, outside
        with pytest.raises(InterruptRequested), interruption.at_once():
            pytest.fail("went on")


def test_processes_that_joined_without_us_keep_their_handler(monkeypatch):
    """Of `jax.distributed.initialize` alone: SIGTERM is still jax's."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setattr(multihost, "count", lambda: 2)
    try:
        with Interruption():
            tell()
        tell()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 2

"""Two starts on one folder, folders that are deleted, disks that are full: with real runs of the toy."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import time

import jax
import joined_toy
import pytest
import training_toy
from processes import Processes
from training_toy import Stream, Toy, config

from jaxdiff.training import lock as lock_module
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.lock import NAME, FolderLock
from jaxdiff.training.loop import Hooks, Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read
from jaxdiff.training.multihost import FolderInUseError
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import init_state

pytestmark = pytest.mark.usefixtures("shared_steps")
ONE = make_mesh(devices=jax.devices()[:1])


def run(out, before=None, **changes):
    return train(Toy(), Stream(before=before), config(**changes), out, layout=Layout(ONE))


def tree(folder):
    """Every file and when it was changed, the lock aside: the first run goes on giving signs of life."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != NAME}


def losses(out):
    return [(line["step"], line["loss"]) for line in read(out / "metrics.jsonl")]


def test_a_second_start_is_refused_and_a_killed_first_one_is_followed_at_once(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(whole)
    with Processes([sys.executable, training_toy.__file__, out, 20, 9], 1) as first:
        first.until(lambda: (out / "checkpoints" / "5").exists() and len(losses(out)) >= 5)
        (out / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()  # what a start would take for a dead one's
        there = tree(out)
        with pytest.raises(FolderInUseError, match=f"in use by process {first[0].pid} on .*name another folder"):
            run(out)
        assert tree(out) == there and first[0].poll() is None
        first.kill(signal.SIGKILL)
        first.wait(20)
    assert json.loads((out / NAME).read_text())["process"] == first[0].pid
    run(out)
    assert losses(out) == losses(whole) and not (out / NAME).exists()


def test_of_several_processes_one_is_refused_for_all(tmp_path):
    with FolderLock(tmp_path):
        there = tree(tmp_path)
        command = [sys.executable, joined_toy.__file__, "--out", tmp_path, "--steps", 3]
        with Processes(command, 2) as processes:
            codes, said = processes.wait(120), [processes.err(index) for index in range(2)]
        assert codes == [73, 73], said
        assert said[0].count("error: ") == 1 and f"in use by process {os.getpid()}" in said[0]
        assert "error: " not in said[1] and "Traceback" not in "".join(said)
        assert tree(tmp_path) == there


def at(index, act):
    return lambda asked: act() if asked == index else None


def settled(folder):
    """Until the checkpoint of step 10, which may be being written, is there."""
    until = time.monotonic() + 60
    while not (folder / "checkpoints" / "10").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return folder


def replace_by_a_file(folder):
    shutil.rmtree(settled(folder))
    folder.write_text("mine")


def delete_amid_a_save(folder):
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


CHANGES = {
    "deleted": (lambda out: shutil.rmtree(settled(out)), "run: was deleted while the run wrote to it; stopped"),
    "deleted amid a save": (delete_amid_a_save, "run: was deleted while the run wrote to it; stopped"),
    "moved": (lambda out: settled(out).rename(out.with_name("moved")), "run: was deleted"),
    "a file instead": (replace_by_a_file, "run: was replaced by a file"),
    "its checkpoints deleted": (
        lambda out: shutil.rmtree(settled(out) / "checkpoints"),
        "run/checkpoints: was deleted",
    ),
}


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("case", CHANGES)
def test_a_folder_that_goes_is_noticed_soon_and_not_made_again(tmp_path, monkeypatch, case, log_every):
    act, words = CHANGES[case]
    monkeypatch.setattr(lock_module, "EVERY", 1000.0 if log_every == 1 else 0.0)
    out, asked = tmp_path / "run", []

    def before(index):
        asked.append(index)
        if index == 12:
            act(out)

    # The save in the background may create the folder again, without the lock.
    other = (FolderInUseError,) if case == "deleted amid a save" else ()
    with pytest.raises((FileNotFoundError, *other)) as stopped:
        run(out, before, steps=1000, log_every=log_every, sample_every=0)
    assert max(asked) <= 15
    if isinstance(stopped.value, FolderInUseError):
        assert "run.lock: was removed" in str(stopped.value)
    else:
        assert words in str(stopped.value)
        assert not out.is_dir() or not (out / "checkpoints").exists()
    if case == "deleted":
        assert not list(tmp_path.iterdir())


def test_a_folder_deleted_before_it_is_drawn_into(tmp_path):
    out, drawn = tmp_path / "run", []

    def draw(step, *_):
        drawn.append(step)
        (out / "samples").mkdir(parents=True, exist_ok=True)

    settings = config(steps=100, sample_every=7, log_every=50, save_every=50)
    with pytest.raises(FileNotFoundError, match="was deleted while the run wrote"):
        stream = Stream(before=at(10, lambda: shutil.rmtree(out)))
        train(Toy(), stream, settings, out, layout=Layout(ONE), hooks=Hooks(draw))
    assert drawn == [7] and not out.exists()


def test_a_run_whose_lock_another_has_stops_without_writing(tmp_path):
    """As when it was stopped for longer than the other waited, and then continued."""
    other = {"token": "another", "machine": "elsewhere", "host": "host-b", "process": 7}
    content = dataclasses.replace(lock_module._this_process(tmp_path), **other).content(0)

    def take_over():
        (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
        (tmp_path / NAME).write_bytes(content)

    with pytest.raises(FolderInUseError, match="held by process 7 on host-b"):
        run(tmp_path, at(17, take_over), log_every=50)
    assert (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").is_dir()
    assert not (tmp_path / "checkpoints" / "20").exists() and (tmp_path / NAME).read_bytes() == content


def test_a_checkpoint_gets_no_name_once_the_lock_is_lost(tmp_path):
    """The check comes in the background, when all of it is written."""
    held = []

    def check():
        if held:
            raise FolderInUseError("run.lock: is held by another")

    state = init_state(Toy(), OptimizerConfig(), jax.random.key(0), ONE)
    folder = tmp_path / "checkpoints"
    with pytest.raises(FolderInUseError, match="held by another"), Checkpoints(folder, {}, 3, check) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
        assert (folder / "1").is_dir()
        held.append(True)
    (rest,) = [path.name for path in folder.iterdir() if path.name != "1"]
    assert rest.endswith(".orbax-checkpoint-tmp") and rest.startswith("2.")

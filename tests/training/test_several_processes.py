"""Runs of several real processes on this machine: the same losses as one, and what becomes of all when one fails."""

import signal
import sys
import time

import jax
import joined_toy
import pytest
from processes import Processes, free_port
from training_toy import Toy, config

from jaxdiff.training.loop import Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read

STEPS = 24


def started(out, *arguments, count=2, steps=STEPS):
    return Processes([sys.executable, joined_toy.__file__, "--out", out, "--steps", steps, *arguments], count)


def ended(out, *arguments, count=2, steps=STEPS):
    """The exit codes, and what each has said on standard error."""
    with started(out, *arguments, count=count, steps=steps) as processes:
        return processes.wait(120), [processes.err(index) for index in range(count)]


def losses(out):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read(out / "metrics.jsonl")]


def saved(out):
    return max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process that reads all rows."""
    out = tmp_path_factory.mktemp("one")
    mesh = make_mesh(devices=jax.devices()[:1])
    train(Toy(), joined_toy.Share(count=1), config(steps=STEPS), out, layout=Layout(mesh))
    return losses(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two that nothing disturbed."""
    out = tmp_path_factory.mktemp("two")
    codes, said = ended(out)
    assert codes == [0, 0], said
    return out


def alike(found, wanted):
    assert [step for step, *_ in found] == [step for step, *_ in wanted]
    for (_, loss, norm), (_, wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert (loss, norm) == pytest.approx((wanted_loss, wanted_norm), rel=1e-5)


def test_two_processes_have_the_losses_of_one(one, two):
    alike(losses(two), one)
    assert not list(two.glob("stall-*")) and not list(two.glob(".process-*"))


def test_four_processes_have_the_losses_of_one(one, tmp_path):
    codes, said = ended(tmp_path, count=4, steps=6)
    assert codes == [0] * 4, said
    alike(losses(tmp_path), one[:6])


@pytest.mark.parametrize(
    ("fault", "who"),
    [("kill", 1), ("kill", 0), pytest.param("SIGSTOP", 1, marks=pytest.mark.slow), ("SIGSTOP", 0)],
)
def test_a_process_that_is_gone_ends_the_others_and_the_run_resumes_bit_by_bit(two, tmp_path, fault, who):
    with started(tmp_path, "--fault", fault, "--at", 12, "--who", who, "--heartbeat", 8) as processes:
        gone, other = processes[who], processes[1 - who]
        processes.until(lambda: gone.poll() is not None or (tmp_path / "checkpoints" / "5").exists())
        assert other.wait(60) == 71, processes.words()
        said = processes.err(1 - who)
        assert said.count("error: ") == said.count("another process is gone") == 1, said
        assert "terminate called" not in said and "@ 0x" not in said and "Traceback" not in said
        if fault == "SIGSTOP":  # who goes on finds out too
            gone.send_signal(signal.SIGCONT)
            assert gone.wait(60) == 71, processes.words()
    assert saved(tmp_path) in (5, 10)  # that of 10 may have been on its way
    if (fault, who) == ("kill", 1):
        codes, said = ended(tmp_path)
        assert codes == [0, 0], said
        assert losses(tmp_path) == losses(two)


@pytest.mark.parametrize(
    ("fault", "at", "who", "line"),
    [
        ("raise", 7, 0, "error: image 7 is torn"),
        ("end", 7, 1, "the data ended on process 1"),
        ("short", 7, 1, "noise is float32[7, 8], was float32[8, 8] in the first"),
        ("short", 0, 1, "the first batch: noise is 'float32[8, 8]' on process 0 and 'float32[7, 8]' on process 1"),
        ("seed", 0, 1, "settings: seed is 0 on process 0 and 1 on process 1"),
    ],
)
def test_what_is_wrong_on_one_process_is_said_once_and_ends_all(tmp_path, fault, at, who, line):
    codes, said = ended(tmp_path, "--fault", fault, "--at", at, "--who", who)
    together = "".join(said)
    assert codes == [2, 2], together
    assert together.count(line) == 1 and together.count("error: ") == 1, together
    assert "Traceback" not in together
    assert together.count("failed") == 1 and "stopped, because process" in together


@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
def test_one_told_to_stop_stops_all_after_the_same_step(two, tmp_path, which):
    codes, said = ended(tmp_path, "--fault", which, "--at", 8, "--who", 1)
    assert codes == [75, 75], said
    assert f"after step {saved(tmp_path)}, saved" in said[0] and "run again" not in said[1]
    assert 8 <= saved(tmp_path) < STEPS and saved(tmp_path) == losses(tmp_path)[-1][0]
    if which == "SIGTERM":
        codes, said = ended(tmp_path)
        assert codes == [0, 0], said
    assert losses(tmp_path) == losses(two)[: saved(tmp_path)]


def test_losses_not_finite_on_one_process_are_so_for_all(tmp_path):
    codes, said = ended(tmp_path, "--fault", "nan", "--at", 5, "--who", 1)
    assert codes == [1, 1], said
    assert said[0].count("10 steps in a row by step 15") == 1 and "steps in a row" not in said[1]
    assert [line["skipped"] for line in read(tmp_path / "metrics.jsonl")] == [0] * 5 + list(range(1, 11))
    assert saved(tmp_path) == 5


def test_one_that_hangs_is_reported_and_ends_the_run_where_asked(tmp_path):
    codes, said = ended(tmp_path, "--fault", "hang", "--at", 12, "--who", 1, "--stall", 3, "--stall-exit", 8)
    assert codes == [71, 71], said
    assert "process 1" in said[1] and "s waiting for the data of step" in said[1]
    assert "in meet" in (tmp_path / "stall-1.txt").read_text()  # where it hangs
    assert "in step" in (tmp_path / "stall-0.txt").read_text()


FOLDERS = """
import sys
import time
from pathlib import Path
import processes
from jaxdiff.training import distributed, multihost
processes.join()
root = Path(sys.argv[1])
own = root / f"own-{multihost.index()}"

def prepare(made):
    if made.exists():
        return "found"
    made.touch()
    return "made"

print("shared", distributed.once(root / "shared", lambda: prepare(root / "shared" / "made")))
print("own", distributed.once(own, lambda: prepare(own / "made")))
print("zero", distributed.on_process_0(lambda: "here"))
distributed.alike({"steps": 5, "cluster": distributed.Cluster("auto", "a:1", 2, multihost.index())})
try:
    distributed.alike({"steps": multihost.index()})
except ValueError as error:
    print(error)
begun = time.monotonic()
time.sleep(2 * multihost.index())
distributed.all_done()
print("together", time.monotonic() - begun > 1.5, flush=True)
distributed.check_shared(root / "shared")
distributed.check_shared(own)
"""


def test_what_processes_share_is_prepared_by_one_of_them(tmp_path):
    with Processes([sys.executable, "-c", FOLDERS, tmp_path], 2) as processes:
        assert processes.wait(100) == [2, 2], processes.words()
        differ = "command line: steps is '0' on process 0 and '1' on process 1: all processes must be started alike"
        for index, words in ((0, "shared made, own made, zero here"), (1, "shared found, own made, zero None")):
            *lines, alike, together = processes.out(index).splitlines()
            assert ", ".join(lines) == words and alike.startswith(differ) and together == "together True"
        assert "is not the folder that process 0 writes to" in processes.err(1)
        assert "stopped, because process 1" in processes.err(0)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["made"]


PREPARES = """
import time
import processes
from jaxdiff.training import multihost
processes.join()
print("ready", flush=True)
multihost.barrier("prepared", 100) if multihost.index() == 0 else time.sleep(100)
"""


def test_before_the_loop_a_signal_ends_a_process_whatever_it_waits_for():
    with Processes([sys.executable, "-c", PREPARES], 2) as processes:
        processes.until(lambda: all("ready" in processes.out(index) for index in range(2)))
        time.sleep(0.5)
        processes.kill(signal.SIGTERM)
        assert processes.wait(5) == [-signal.SIGTERM] * 2


JOIN = """
import sys
from jaxdiff.training.distributed import Cluster, start
start(Cluster("auto", sys.argv[1], 2, int(sys.argv[2]), join_timeout=1))
"""


@pytest.mark.parametrize("process", [0, 1])
def test_others_that_do_not_come_are_waited_for_so_long_and_no_longer(process):
    address = f"127.0.0.1:{free_port()}"
    with Processes([sys.executable, "-c", JOIN, address, process], 1) as alone:
        assert alone.wait(100) == [71]
        said = alone.err(0)
    assert said.count("\n") == 1 and f"waited 1 s for {'all others' if process == 0 else 'process 0'}" in said
    assert address in said

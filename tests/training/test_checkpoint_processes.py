"""Checkpoints of several processes: each writes its part and keeps its place in the data; damage stops all of them."""

import json
import shutil
import sys
from pathlib import Path

import checkpointing
import jax
import pytest
from processes import Processes

from jaxdiff.training import manifest
from jaxdiff.training.checkpoints import Checkpoints, load_ema
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.state import abstract_state

SCRIPT = Path(checkpointing.__file__)


def run(what, folder):
    """Two processes of two devices each: their exit codes, and the last line that each has printed."""
    with Processes([sys.executable, SCRIPT, what, folder], 2, devices=2) as processes:
        codes = processes.wait(120)
        lines = [processes.out(index).strip().splitlines() for index in range(2)]
        assert all(lines), processes.words()
        return codes, [json.loads(printed[-1]) for printed in lines]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of two processes, and what each of these says of the newest."""
    folder = tmp_path_factory.mktemp("shared") / "checkpoints"
    codes, said = run("save", folder)
    assert codes == [0, 0], said
    return folder, said


def test_two_processes_get_back_what_each_saved(saved):
    folder, said = saved
    codes, found = run("restore", folder)
    assert codes == [0, 0], found
    for index, restored in enumerate(found):
        assert restored["latest"] == 10 and restored["split"]
        assert restored["state"] == said[index]["state"] == said[0]["state"]
        assert restored["place"] == checkpointing.place(10, index)


def test_one_process_gets_the_same_state_and_is_told_of_the_data(saved):
    folder, said = saved
    manifest.verify(folder / "10")
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    abstract = abstract_state(checkpointing.STAGE, checkpointing.OPTIMIZER, mesh)
    with Checkpoints(folder, {"a": 1}) as checkpoints:
        state = checkpoints.restore_state(abstract)
        assert checkpointing.digests(state) == said[0]["state"]
        with pytest.raises(ValueError, match="the number of processes was 2 and is 1 here"):
            checkpoints.restore(abstract)
    assert checkpointing.digests(load_ema(folder)) == checkpointing.digests(state.ema)


def test_all_processes_report_the_same_damage(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    # The smallest file of all: whichever process it falls to, the other knows nothing of it.
    victim = min((path for path in (folder / "10").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"?" * victim.stat().st_size)
    codes, found = run("restore", folder)
    assert codes == [2, 2]
    assert found[0] == found[1]
    line = found[0]["error"]
    assert f"checkpoint of step 10 cannot be restored: {victim} is damaged" in line
    assert line.endswith(f"delete {folder / '10'} to go on from step 5, which is intact")


def test_all_processes_stop_where_one_cannot_write(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    codes, found = run("fail", folder)
    assert codes == [2, 2]
    for printed in found:
        assert f"{folder}: checkpoint of step 15 not saved, the older ones are intact: " in printed["error"]
        assert "File too large" in printed["error"]
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"5", "10"}
    manifest.verify(folder / "10")

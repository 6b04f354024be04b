"""Every command that writes a folder for long refuses one that another run of it writes to: one line, exit code 73."""

import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from experiments import convert, embed, train
from jaxdiff.training import lock


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        Image.new("RGB", (64, 64), (25 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a dark red square number {i}")
    return folder


COMMANDS = {
    "imagen.sr256": (train, ("imagen.sr256",)),
    "clip": (train, ("clip",)),
    "t5": (train, ("t5",)),
    "classifier": (train, ("classifier",)),
    "convert": (convert, None),
    "embed": (embed, ()),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_start_is_refused_and_changes_nothing(name, standin, photos, tmp_path, command):
    what, arguments = COMMANDS[name]
    out = tmp_path / "out"
    if name == "classifier":
        arguments = (*arguments, "--data-dir", tmp_path / "data")
    elif arguments is not None:
        arguments = (*arguments, "--data", f"folder:{photos}", "--data-dir", tmp_path / "data")
    if name == "convert":
        (tmp_path / "list.csv").write_text("path,caption\n")
        arguments = (tmp_path / "list.csv",)
    if name == "embed":
        arguments = (*arguments, "--text-encoder", standin / "text", "--length", 16)
    (out / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with subprocess.Popen(["sleep", "100"]) as other:
        owner = lock._this_process(out)
        owner = replace(owner, token="another", process=other.pid, started=lock._start_time(other.pid))
        file = out / ("shard-0-of-1.lock" if name == "embed" else lock.NAME)
        file.write_bytes(owner.content(0))
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        done = command(what, *(arguments or ()), "--out", out)
        other.kill()
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 73 and len(errors) == 1, done.err
    assert f"{out}: in use by process {other.pid}" in errors[0] and "Traceback" not in done.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

"""Whole files or none, on a full disk too."""

import json
import os
import subprocess

import pytest

from jaxdiff.core.files import is_alive, remove_leftovers, remove_leftovers_of_the_dead, replacing, write_json


def test_a_full_disk_leaves_the_old_file(tmp_path, small_disk):
    write_json(tmp_path / "y.json", "old")
    with pytest.raises(OSError):
        write_json(tmp_path / "y.json", "x" * 2_000_000)
    assert json.loads((tmp_path / "y.json").read_text()) == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_modes_of_files_are_the_users(tmp_path):
    """Whatever the writer gave them: safetensors makes its own readable to their owner alone."""
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("whole")
            temporary.chmod(0o600)
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    write_json(tmp_path / "kept.json", {"é": 1})
    with replacing(tmp_path / "other.json") as temporary:
        temporary.write_text("half")
        remove_leftovers(tmp_path)
        temporary.write_text("whole")
    assert json.loads((tmp_path / "kept.json").read_text()) == {"é": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.json", "other.json"]


def test_leftovers_of_the_dead_alone_are_removed(tmp_path):
    with replacing(tmp_path / "mine.json") as temporary:
        temporary.write_text("half")
        gone = subprocess.Popen(["true"])
        gone.wait()
        dead = temporary.with_name(temporary.name.replace(str(os.getpid()), str(gone.pid)))
        dead.write_text("half")
        remove_leftovers_of_the_dead(tmp_path)
        assert temporary.exists() and not dead.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]


def test_who_is_alive():
    with subprocess.Popen(["sleep", "100"]) as other:
        assert is_alive(other.pid) and is_alive(os.getpid()) and is_alive(1)
        other.kill()
    assert not any(map(is_alive, (other.pid, 0, -1, 2**40)))

"""Files that are there whole or not at all: written under a temporary name, then renamed."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside `file`, which takes its place when the block ends well and is removed when it does not.

    The name is this process's own, so that two of them may write the same file: the last one's is kept, whole. What
    it holds is on the disk before it has its name: a machine that is taken away leaves no file that is cut off.
    """
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}{_SUFFIX}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable to their owner alone
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(file) as temporary:
        # Lone surrogates, in names of files that are no text, become the escapes that JSON has for them.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written in `folder`. For the end, when nothing there is to be written."""
    for file in folder.glob(f"*{_SUFFIX}"):
        file.unlink(missing_ok=True)


def remove_leftovers_of_the_dead(folder: Path) -> None:
    """The same for processes of this machine that are no more, while others may still be writing."""
    for file in folder.glob(f"*.{socket.gethostname()}-*{_SUFFIX}"):
        process = file.name.removesuffix(_SUFFIX).rpartition("-")[2]
        if process.isdigit() and not is_alive(int(process)):
            file.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine has this number, whoever's it is."""
    if process < 1:  # would mean a group of processes
        return False
    try:
        os.kill(process, 0)  # changes nothing
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def usable(folder: Path) -> Path:
    """The folder, made where it is missing. OSError, before minutes of work, where nothing can be written to it."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: a file, name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def usable_file(path: Path) -> Path:
    """The same for a file in its folder; what is there already is overwritten later."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, name a file")
    usable(path.parent)
    return path

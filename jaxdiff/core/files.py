"""Atomic writing of files: under a temporary name, then renamed."""

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
    """Yields a temporary path beside `file`, which replaces `file` on success and is deleted on failure.

    The path is unique to this process, so that several may write the same file; the last one wins. The contents are
    synced to disk before the rename, so that a lost machine leaves no truncated file.
    """
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}{_SUFFIX}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable only by their owner
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(file) as temporary:
        # Lone surrogates, from undecodable file names, become JSON escapes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Deletes partial files of killed processes in `folder`. Call it when no process writes there any more."""
    for file in folder.glob(f"*{_SUFFIX}"):
        file.unlink(missing_ok=True)


def remove_leftovers_of_the_dead(folder: Path) -> None:
    """Deletes partial files of dead processes of this machine, while others may still be writing."""
    for file in folder.glob(f"*.{socket.gethostname()}-*{_SUFFIX}"):
        process = file.name.removesuffix(_SUFFIX).rpartition("-")[2]
        if process.isdigit() and not is_alive(int(process)):
            file.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether this machine has a process with this id, of any user."""
    if process < 1:  # would address a process group
        return False
    try:
        os.kill(process, 0)  # signal 0 only checks
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def usable(folder: Path) -> Path:
    """Creates `folder` if it is missing, and returns it. OSError if it is not writable, before any long work."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: a file, name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def usable_file(path: Path) -> Path:
    """As `usable`, for the folder of a file; an existing file will be overwritten later."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, name a file")
    usable(path.parent)
    return path

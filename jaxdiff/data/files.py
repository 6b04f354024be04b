"""Files that are there whole or not at all: written under a temporary name, then renamed."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside `file`, which takes its place when the block ends well and is removed when it does not.

    The name is this process's own, so that two of them may write the same file: the last one's is kept, whole.
    """
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}{_SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written in `folder`. For the end, when nothing there is to be written."""
    for file in folder.glob(f"*{_SUFFIX}"):
        file.unlink(missing_ok=True)

"""Files that are there whole or not at all: written under a temporary name, then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside `file`, which takes its place when the block ends well and is removed when it does not.

    The temporary name is fixed, so what a killed run left is overwritten by the next.
    """
    temporary = file.with_name(f"{file.name}.part")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

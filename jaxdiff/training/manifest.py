"""Folder manifests: the size and SHA-256 of every file, to detect changes."""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdiff.core import json_files

MANIFEST = "manifest.json"


def write(folder: str | Path) -> None:
    """Write the manifest of `folder` after syncing its files to disk."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    # Training continues meanwhile, so use only a quarter of the host's cores.
    files = _each(lambda path: (path.stat().st_size, _digest(path, sync=True)), paths, (os.cpu_count() or 1) // 4)
    listed = {path.relative_to(folder).as_posix(): list(file) for path, file in zip(paths, files, strict=True)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": _digest_of(listed), "files": listed}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(place)


def damage(folder: Path, only: Collection[str] | None = None, process: int = 0, processes: int = 1) -> str | None:
    """A description of the first file that does not match the manifest, None if all match.

    only: check these subfolders alone. processes: the files are split over them; `process` checks its own.
    """
    if not folder.is_dir():
        return f"{folder} is {'not a folder' if folder.exists() else 'gone'}"
    try:
        content = json_files.parse((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
        listed = content["files"]
        if content["sha256"] != _digest_of(listed):
            return f"{folder / MANIFEST} is damaged"
    except FileNotFoundError:
        return (
            f"{folder / MANIFEST} is missing (of a checkpoint that is from before there were manifests, and good, "
            "jaxdiff.training.manifest.write makes one)"
        )
    except OSError as error:
        return f"{folder / MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST} is damaged"
    names = [name for name in listed if only is None or "/" not in name or name.split("/")[0] in only]
    names.sort(key=lambda name: (-listed[name][0], name))  # the largest first, to balance the processes
    mine = names[process::processes]
    wrong = _each(lambda name: _wrong_size(folder / name, listed[name][0]), mine)
    if not any(wrong):
        wrong = _each(lambda name: _wrong_bytes(folder / name, listed[name][1]), mine)
    return next((text for text in wrong if text), None)


def verify(folder: str | Path) -> None:
    """Raises ValueError, naming the file, if one in `folder` does not match the manifest."""
    wrong = damage(Path(folder))
    if wrong:
        raise ValueError(wrong)


def sync(folder: Path) -> None:
    """Sync the directory entries of `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wrong_size(path: Path, size: int) -> str | None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if actual == size else f"{path} has {actual} bytes in place of {size}"


def _wrong_bytes(path: Path, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else f"{path} is damaged (its bytes are not those that were saved)"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(listed: object) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _each(do: Callable[[Any], Any], items: list[Any], threads: int = 16) -> list[Any]:
    """`do` of every item, in threads: reading and hashing release the GIL."""
    with ThreadPoolExecutor(max(1, min(threads, 16))) as pool:
        return list(pool.map(do, items))

"""Local and bucket paths: `://` uses fsspec (the `bucket` extra), everything else is a local file."""

import errno
from pathlib import Path, PurePosixPath
from typing import Any


def open_binary(path: str) -> Any:
    """A binary file object for reading (fsspec's is not a `BinaryIO`); OSError if it cannot be opened."""
    if not is_url(path):
        return open(path, "rb")
    filesystem, inner = _filesystem(path)
    return filesystem.open(inner, "rb")


def read_bytes(path: str) -> bytes:
    """A file's bytes."""
    with open_binary(path) as stream:
        return stream.read()


def is_absent(error: OSError) -> bool:
    """Whether the error means that the file does not exist, rather than that it is temporarily unavailable."""
    kinds = FileNotFoundError, IsADirectoryError, NotADirectoryError
    return isinstance(error, kinds) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


def size(path: str) -> int:
    """A file's size in bytes."""
    if not is_url(path):
        return Path(path).stat().st_size
    filesystem, inner = _filesystem(path)
    return filesystem.size(inner)


def expand(pattern: str) -> list[str]:
    """The sorted files that match a glob pattern; a path without wildcards is returned. OSError for no match."""
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    if is_url(pattern):
        filesystem, inner = _filesystem(pattern)
        files = sorted(filesystem.unstrip_protocol(file) for file in filesystem.glob(inner))
    else:
        root = Path(pattern).anchor
        files = sorted(str(file) for file in Path(root).glob(str(Path(pattern).relative_to(root))))
    if not files:
        raise FileNotFoundError(f"{pattern}: no file matches")
    return files


def beside(file: str, relative: str) -> str:
    """`relative` resolved against the folder of `file`; absolute paths and URLs are unchanged."""
    if is_url(relative) or PurePosixPath(relative).is_absolute():
        return relative
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{relative}"


def is_url(path: str) -> bool:
    return "://" in path


def _filesystem(path: str):
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"{path}: bucket paths need fsspec: pip install 'jaxdiff[bucket]'") from error
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error

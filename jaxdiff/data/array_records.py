"""Atomic writing of ArrayRecord files; its errors become OSError."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from array_record.python import array_record_module

from jaxdiff.core.files import replacing


@contextlib.contextmanager
def new_records(file: Path, compression: str = "zstd:3") -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record to a new ArrayRecord file, which is renamed into place on success.

    compression: ArrayRecord's option; "uncompressed" for incompressible data. OSError if writing fails, a full disk
    included.
    """
    with replacing(file) as temporary:
        with full_disk_is_an_os_error(file):
            writer = array_record_module.ArrayRecordWriter(
                str(temporary), f"group_size:1,{compression}"
            )  # read one at a time

        def write(record: bytes) -> None:
            with full_disk_is_an_os_error(file):
                writer.write(record)

        try:
            yield write
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        with full_disk_is_an_os_error(file):
            writer.close()


@contextlib.contextmanager
def full_disk_is_an_os_error(file: Path | str) -> Iterator[None]:
    """Turn ArrayRecord's RuntimeError on a failed write into an OSError that names `file`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{file}: cannot be written ({error})") from error

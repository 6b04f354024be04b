"""ArrayRecord files of equal size read as one sequence: what stored embeddings lie in, thousands of files perhaps."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from array_record.python import array_record_module

OPEN = 512
"""Files open at a time: processes may have 1024. In order at random, a set of more files opens one for most records."""


class Parts:
    """The records of files that hold `size` each, the last one the rest of `count`.

    Threads may share one; it pickles without its open files. A damaged file is a ValueError that names it.
    """

    def __init__(self, files: Sequence[Path], size: int, count: int):
        self._files, self._size, self._count = tuple(files), size, count
        self._open: dict[int, array_record_module.ArrayRecordReader] = {}  # the last used one is last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count}")
        number, place = divmod(index, self._size)
        with damage_is_a_value_error(self._files[number]):
            return self._reader(number).read([place])[0]

    def __reduce__(self) -> tuple:
        return Parts, (self._files, self._size, self._count)

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            reader = self._open.pop(number, None)
            if reader is not None:
                self._open[number] = reader
                return reader
        # Outside the lock, as it takes a while on remote disks. Two threads may open one file: the later one is kept.
        reader = open_part(self._files[number], part_size(number, self._size, self._count))
        with self._lock:
            self._open[number] = reader
            if len(self._open) > OPEN:
                self._open.pop(next(iter(self._open)))  # closed when the last thread that reads from it lets it go
        return reader


def part_size(number: int, size: int, count: int) -> int:
    """How many of `count` records the part of that number holds."""
    return min(size, count - number * size)


def open_part(file: Path, expected: int) -> array_record_module.ArrayRecordReader:
    """One file, to be read at random. ValueError where it does not hold the expected number of records."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    with damage_is_a_value_error(file):
        reader = array_record_module.ArrayRecordReader(
            str(file), options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        found = reader.num_records()  # 0 where the end is cut off
    if found != expected:
        raise damaged(file, f"{found} records where there should be {expected}")
    return reader


@contextlib.contextmanager
def damage_is_a_value_error(file: Path) -> Iterator[None]:
    """ArrayRecord keeps a hash of every record and raises RuntimeError where it does not fit."""
    try:
        yield
    except RuntimeError as error:
        raise damaged(file, str(error).split(";")[0].split("(")[0].strip()) from error


def damaged(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file}: damaged ({reason}); delete it and run the command that made it again: it makes this part alone"
    )

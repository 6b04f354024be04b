"""Several ArrayRecord files read as one sequence: stored embeddings and converted images."""

import bisect
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from array_record.python import array_record_module

AGAIN = "delete the file and run the command that made it again: it makes this part alone"

OPEN = 512
"""Files open at a time; the usual process limit is 1024. With more files, random access opens one for most records."""


_AT_RANDOM = "readahead_buffer_size:0"


class DamagedRecordError(OSError):
    """One unreadable record in an otherwise readable file; the message names the file and the record."""


class Parts:
    """The records of `files`, with `sizes` records each.

    Thread-safe; pickled without its open files. A damaged record raises DamagedRecordError; an unreadable file raises a
    ValueError that names it.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]):
        self._files, self._sizes = tuple(files), tuple(sizes)
        self._ends = list(itertools.accumulate(self._sizes))
        self._open: dict[int, array_record_module.ArrayRecordReader] = {}  # the most recently used one is last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        number, place = self._locate(index)
        reader = self._reader(number)
        try:
            return reader.read([place])[0]
        except RuntimeError as error:
            raise named(error, self._files[number], place, AGAIN) from error

    def __reduce__(self) -> tuple:
        return Parts, (self._files, self._sizes)

    def where(self, index: int) -> str:
        """`FILE, record N` for messages."""
        number, place = self._locate(index)
        return f"{self._files[number]}, record {place}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return number, int(index) - self._ends[number] + self._sizes[number]

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            reader = self._open.pop(number, None)
            if reader is not None:
                self._open[number] = reader
                return reader
        # Outside the lock, because it is slow on remote disks. If two threads open one file, the later reader is kept.
        reader = open_part(self._files[number], self._sizes[number])
        with self._lock:
            self._open[number] = reader
            if len(self._open) > OPEN:
                self._open.pop(next(iter(self._open)))  # closed with its last reference
        return reader


def part_size(number: int, size: int, count: int) -> int:
    """The number of records in a part, of `count` in all."""
    return min(size, count - number * size)


def check_parts(files: Sequence[Path], sizes: Sequence[int]) -> None:
    """ValueError or FileNotFoundError for the first file with an unexpected number of records."""
    with ThreadPoolExecutor(16) as threads:  # reads the end of each file, which is slow on remote disks
        for _ in threads.map(open_part, files, sizes):
            pass


def open_part(file: Path, expected: int) -> array_record_module.ArrayRecordReader:
    """Open one file for random access. ValueError if it does not hold the expected number of records."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    with damage_is_a_value_error(file):
        reader = array_record_module.ArrayRecordReader(str(file), options=_AT_RANDOM, file_reader_buffer_size=32768)
        records = reader.num_records()  # 0 if the end is truncated
    if records != expected:
        raise damaged(file, f"{records} records where there should be {expected}")
    return reader


def named(error: RuntimeError, file: Path | str, place: int, advice: str) -> OSError | ValueError:
    """The error for a failed read of a record. ArrayRecord stores a hash of each and raises RuntimeError for any
    failure.

    A hash mismatch is a DamagedRecordError. Anything else is a ValueError: a truncated file without readable records,
    or a failing disk, which must not lose its records one by one.
    """
    if "Corrupted" not in str(error):
        return ValueError(f"{file}: cannot be read ({_reason(error)})")
    with contextlib.suppress(RuntimeError):
        if not array_record_module.ArrayRecordReader(str(file), options=_AT_RANDOM).num_records():
            return ValueError(f"{file}: damaged (no records found); {advice}")
    return DamagedRecordError(f"{file}, record {place}: damaged ({_reason(error)}); {advice}")


@contextlib.contextmanager
def damage_is_a_value_error(file: Path) -> Iterator[None]:
    """Raise ValueError for any damage in a file that can be recomputed."""
    try:
        yield
    except RuntimeError as error:
        raise damaged(file, _reason(error)) from error


def damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: damaged ({reason}); {AGAIN}")


def _reason(error: RuntimeError) -> str:
    return str(error).split(";")[0].split("(")[0].strip()

"""ArrayRecord files read as one sequence: stored embeddings and converted images, in thousands of files perhaps."""

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
"""Files open at a time: processes may have 1024. In order at random, a set of more files opens one for most records."""


_AT_RANDOM = "readahead_buffer_size:0"


class DamagedRecordError(OSError):
    """One record that cannot be read, in a file whose other records can; the message names the file and the record."""


class Parts:
    """The records of `files`, which hold `sizes` records each.

    Threads may share one; it pickles without its open files. A damaged record is a DamagedRecordError; a file that
    cannot be read at all is a ValueError that names it.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]):
        self._files, self._sizes = tuple(files), tuple(sizes)
        self._ends = list(itertools.accumulate(self._sizes))
        self._open: dict[int, array_record_module.ArrayRecordReader] = {}  # the last used one is last
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
        # Outside the lock, as it takes a while on remote disks. Two threads may open one file: the later one is kept.
        reader = open_part(self._files[number], self._sizes[number])
        with self._lock:
            self._open[number] = reader
            if len(self._open) > OPEN:
                self._open.pop(next(iter(self._open)))  # closed when the last thread that reads from it lets it go
        return reader


def part_size(number: int, size: int, count: int) -> int:
    """How many of `count` records the part of that number holds."""
    return min(size, count - number * size)


def check_parts(files: Sequence[Path], sizes: Sequence[int]) -> None:
    """ValueError or FileNotFoundError for the first file that does not hold its number of records."""
    with ThreadPoolExecutor(16) as threads:  # a look at the end of each file, which takes a while on remote disks
        for _ in threads.map(open_part, files, sizes):
            pass


def open_part(file: Path, expected: int) -> array_record_module.ArrayRecordReader:
    """One file, to be read at random. ValueError where it does not hold the expected number of records."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    with damage_is_a_value_error(file):
        reader = array_record_module.ArrayRecordReader(str(file), options=_AT_RANDOM, file_reader_buffer_size=32768)
        records = reader.num_records()  # 0 where the end is cut off
    if records != expected:
        raise damaged(file, f"{records} records where there should be {expected}")
    return reader


def named(error: RuntimeError, file: Path | str, place: int, advice: str) -> OSError | ValueError:
    """What a failed read of a record means. ArrayRecord keeps a hash of each and raises RuntimeError for all failures.

    A hash that does not fit is a DamagedRecordError. Anything else is a ValueError: a file without its end, of which
    no record can be found, and a disk that fails, which must not cost so many records one by one.
    """
    if "Corrupted" not in str(error):
        return ValueError(f"{file}: cannot be read ({_reason(error)})")
    with contextlib.suppress(RuntimeError):
        if not array_record_module.ArrayRecordReader(str(file), options=_AT_RANDOM).num_records():
            return ValueError(f"{file}: damaged (no records found); {advice}")
    return DamagedRecordError(f"{file}, record {place}: damaged ({_reason(error)}); {advice}")


@contextlib.contextmanager
def damage_is_a_value_error(file: Path) -> Iterator[None]:
    """The same where one damaged record spoils the whole file, as it can be made again."""
    try:
        yield
    except RuntimeError as error:
        raise damaged(file, _reason(error)) from error


def damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: damaged ({reason}); {AGAIN}")


def _reason(error: RuntimeError) -> str:
    return str(error).split(";")[0].split("(")[0].strip()

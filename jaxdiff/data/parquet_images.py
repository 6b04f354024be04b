"""Random access to Parquet files that contain the images, as in Hugging Face datasets.

An image column holds file bytes, or a struct {bytes, path}; if the bytes are missing, the path names a file relative to
the Parquet file. There are two access paths:

    plain pages     neither compressed nor encoded, as written by recent versions of `datasets` (5.2 does): each image
                    is read at its own offset (`parquet_pages.py`), in any order
    anything else   Parquet is read by row groups (usually 100 to 1,000 rows). The most recent groups are cached, and
                    `blocks` makes the pipeline shuffle the groups first, then the rows within as many groups as fit in
                    the cache, so each group is read about once per epoch, not once per example
"""

import bisect
import dataclasses
import functools
import itertools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.messages import Note, reason
from jaxdiff.data import captions, columns, parquet_pages
from jaxdiff.data.columns import GUESSED, ColumnNames
from jaxdiff.data.example import Example
from jaxdiff.data.fault import Fault, Raw
from jaxdiff.data.orders import Blocks
from jaxdiff.data.parquet_columns import (
    as_bytes,
    chosen_columns,
    class_names,
    features,
    holds_images,
    image_of,
    is_list,
    opened,
    readable,
    text_of,
)

KEPT = 512 << 20
"""Bytes of row groups cached per process. Half of it is for examples read ahead beyond the end of a run."""
LARGE = 256 << 20
"""Bytes of a row group above which a warning recommends converting the files."""
_OPEN = 256
"""Files kept open, and footers cached."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One Parquet file.

    rows, sizes: rows of each row group, and its approximate bytes in the cache.
    image, caption: the columns; classes: class names of an integer caption column.
    plain: the index of the image column, if its pages are plain.
    """

    path: Path | str
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    image: str
    caption: str | None
    classes: tuple[str, ...] = ()
    plain: int | None = None

    def columns(self, image: bool = True) -> list[str]:
        return [*([self.image] if image else []), *([] if self.caption is None else [self.caption])]


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """The rows of Parquet files, in order. Thread-safe; pickled without its cache.

    A row without an image raises OSError; an unreadable row group raises a ValueError that names it.
    """

    tables: tuple[Table, ...]

    def __post_init__(self):
        object.__setattr__(self, "_kept", RowGroups())

    def __reduce__(self) -> tuple:
        return ParquetSource, (self.tables,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        group = bisect.bisect_right(self._starts, index) - 1
        table, number = self._groups[group]
        row = int(index) - self._starts[group]
        name = f"{table.path}, row {sum(table.rows[:number]) + row}"
        kept: RowGroup = self._kept(table, number)  # type: ignore[attr-defined]
        text = None if kept.texts is None else text_of(name, kept.texts[row].as_py(), table.classes)
        caption, fault = captions.clean(text)
        image = image_of(name, kept.cell(row), table.path)
        return {"image": image, "caption": caption, "name": name, "caption_fault": fault}

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """The row groups and the number that is cached; None if images are read one by one."""
        if all(table.plain is not None for table in self.tables):
            return None
        largest = max(max(table.sizes) for table in self.tables)
        rows = tuple(rows for table in self.tables for rows in table.rows)
        return Blocks(rows, max(1, KEPT // 2 // max(1, largest)))

    def fingerprint(self) -> str:
        stats = [(table.path, Path(table.path).stat()) for table in self.tables]
        files = [(str(path), file.st_size, file.st_mtime_ns) for path, file in stats]
        return f"parquet, {self.tables[0].image}: {files}"

    @functools.cached_property
    def _groups(self) -> list[tuple[Table, int]]:
        return [(table, number) for table in self.tables for number in range(len(table.rows))]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The start of each row group, and the end of the last one."""
        return [0, *itertools.accumulate(table.rows[number] for table, number in self._groups)]


class RowGroup(NamedTuple):
    """A cached row group: a function from a row to its image cell, and the captions (Arrow)."""

    cell: Callable[[int], Any]
    texts: Any


class RowGroups:
    """A cache of the most recent row groups, at most KEPT bytes; each is read by one thread."""

    def __init__(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0
        self._groups: OrderedDict[tuple[Path | str, int], tuple[int, Future]] = OrderedDict()
        self._footers: OrderedDict[Path | str, Any] = OrderedDict()
        self._files: OrderedDict[Path | str, _Handle] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def __call__(self, table: Table, number: int) -> RowGroup:
        key = table.path, number
        with self._lock:
            mine = key not in self._groups
            if mine:
                self._groups[key] = table.sizes[number], Future()
                self._bytes += table.sizes[number]
                while len(self._groups) > 1 and self._bytes > KEPT:
                    self._bytes -= self._groups.popitem(last=False)[1][0]
            self._groups.move_to_end(key)
            future = self._groups[key][1]
        if mine:
            try:
                future.set_result(self._read(table, number))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._bytes -= self._groups.pop(key, (0,))[0]
        return future.result()

    def _read(self, table: Table, number: int) -> RowGroup:
        with readable(table.path, f"row group {number}"):
            file = self._parquet(table.path)
            cell = self._cells(table, number, file)
            texts = None
            if names := table.columns(image=cell is None):
                group = file.read_row_group(number, columns=names, use_threads=False)
                texts = None if table.caption is None else as_bytes(group.column(table.caption))
            if cell is None:
                images = group.column(table.image)
                cell = lambda row: images[row].as_py()  # noqa: E731
        if file.metadata.row_group(number).num_rows != table.rows[number]:
            raise ValueError(f"{table.path}: changed since it was opened; start again")
        return RowGroup(cell, texts)

    def _cells(self, table: Table, number: int, file: Any) -> Callable[[int], Any] | None:
        """A function that reads single images; None if the row group has to be read."""
        if table.plain is None:
            return None
        levels = file.metadata.schema.column(table.plain).max_definition_level
        handle = self._handle(table.path)
        places = parquet_pages.places(handle.descriptor, file.metadata.row_group(number).column(table.plain), levels)
        return None if places is None else functools.partial(self._cell, table.path, places)

    def _cell(self, path: Path | str, places: np.ndarray, row: int) -> bytes:
        first, length = places[row].tolist()
        handle = self._handle(path)  # held open while it is read
        content = os.pread(handle.descriptor, length, first)
        if len(content) != length:
            raise ValueError(f"{path}: cut off since it was opened; start again")
        return content

    def _handle(self, path: Path | str) -> "_Handle":
        with self._lock:
            handle = self._files.pop(path, None) or _Handle(path)
            self._files[path] = handle
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)
            return handle

    def _parquet(self, path: Path | str) -> Any:
        """Open the file anew, because threads should not share one; its footer is cached."""
        import pyarrow.parquet

        with self._lock:
            footer = self._footers.pop(path, None)
        file = pyarrow.parquet.ParquetFile(path, memory_map=True, metadata=footer)
        with self._lock:
            self._footers[path] = file.metadata
            if len(self._footers) > _OPEN:
                self._footers.popitem(last=False)
        return file


class _Handle:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, path: Path | str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def read(files: Sequence[Path], named: ColumnNames = GUESSED, where: str | None = None) -> ParquetSource:
    """The rows of Parquet files with images. A note lists the selected columns; a warning recommends converting files
    with very large row groups. ValueError for files without images, or unreadable ones; files without rows are
    skipped."""
    where = where or str(files[0])
    with opened(files[0]) as first:
        schema = first.schema_arrow
        image, caption = chosen_columns(where, schema, named)

    def look(file: Path) -> Table:
        with opened(file) as open_file:
            return _table(file, open_file, image, caption)

    with ThreadPoolExecutor(16) as threads:
        tables = tuple(table for table in threads.map(look, files) if sum(table.rows))
    if not tables:
        raise ValueError(f"{where}: no rows in its Parquet files")
    rest = "; of several captions the first is taken" if caption and is_list(schema.field(caption).type) else ""
    warnings.warn(Note(columns.chosen(where, image, caption, rest)), stacklevel=2)
    largest, rows = max((size, count) for table in tables for size, count in zip(table.sizes, table.rows))
    if largest > LARGE:
        warnings.warn(
            f"{where}: row groups of up to {rows} rows and {largest >> 20} MiB, each of which is read for one image: "
            "slow, and little is shuffled; convert the files first (experiments.convert)",
            stacklevel=2,
        )
    return ParquetSource(tables)


def table_of(file: Path | str, named: ColumnNames, where: str | None = None) -> Table:
    """One file. ValueError as for `read`."""
    with opened(file) as open_file:
        return _table(file, open_file, *chosen_columns(where or str(file), open_file.schema_arrow, named))


def raw_rows(table: Table, groups: Sequence[int]) -> Iterator[Raw]:
    """Iterate over the rows of row groups for conversion, a few in memory at a time; a missing image is a fault."""
    with opened(table.path) as file:
        row = sum(table.rows[: groups[0]])
        batches = file.iter_batches(batch_size=64, row_groups=list(groups), columns=table.columns(), use_threads=False)
        while True:
            with readable(table.path, f"row {row} or one soon after it"):
                batch = next(batches, None)
            if batch is None:
                return
            texts = [None] * len(batch)
            if table.caption is not None:
                texts = as_bytes(batch.column(table.caption)).to_pylist()
            for image, text in zip(batch.column(table.image), texts, strict=True):
                name = f"{table.path}, row {row}"
                row += 1
                caption = text_of(name, text, table.classes)
                try:
                    yield name, image_of(name, image.as_py(), table.path), caption
                except OSError as error:
                    yield name, Fault("no image", reason(error)), caption


def _table(file: Path | str, open_file: Any, image: str, caption: str | None) -> Table:
    schema, footer = open_file.schema_arrow, open_file.metadata
    for name in filter(None, (image, caption)):
        if schema.names.count(name) != 1:
            count = schema.names.count(name)
            raise ValueError(f"{file}: {count or 'no'} columns are named {name!r}, of {', '.join(schema.names)}")
    if not holds_images(schema.field(image).type, features(schema).get(image)):
        raise ValueError(f"{file}: column {image!r} holds no images but {schema.field(image).type}")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    used_columns = [i for i, path in enumerate(paths) if path.split(".")[0] in (image, caption)]
    caption_columns = [i for i in used_columns if paths[i].split(".")[0] == caption]
    plain = next((i for i, path in enumerate(paths) if path in (image, f"{image}.bytes")), None)
    if plain is not None and not all(parquet_pages.is_plain(group.column(plain)) for group in groups):
        plain = None
    rows = tuple(group.num_rows for group in groups)
    own = caption_columns if plain is not None else used_columns
    kept = [sum(group.column(i).total_uncompressed_size for i in own) for group in groups]
    sizes = tuple(size + (16 * count if plain is not None else 0) for size, count in zip(kept, rows))
    classes = class_names(features(schema).get(caption or ""))
    return Table(file, rows, sizes, image, caption, classes, plain)

"""Parquet files that hold the images themselves, as Hugging Face stores datasets: read at random, by row groups.

A column of images holds the bytes of a file, or a struct {bytes, path}; where the bytes are missing the path is that of
a file beside. Parquet can be read by whole row groups alone (usually 100 to 1,000 rows), so the last ones read are
kept, and `blocks` has the pipeline shuffle the row groups first and then the rows of as many groups as are kept: each
is read about once an epoch, and not once an example.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdiff.core.messages import Note, quoted, reason
from jaxdiff.data import captions, columns, remote
from jaxdiff.data.columns import GUESSED, Named
from jaxdiff.data.example import Example
from jaxdiff.data.fault import Fault, Raw
from jaxdiff.data.orders import Blocks

KEPT = 512 << 20
"""Bytes of row groups that a process keeps. Half of it is for the examples that are read ahead of a run's end."""
LARGE = 256 << 20
"""Bytes of a row group above which converting the files first is worth it."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One Parquet file: for each row group its rows and the bytes of its images; the columns, and the class names of an
    integer column of captions."""

    path: Path | str
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    image: str
    caption: str | None
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """The rows of Parquet files, in order. Threads may share one; it pickles without what it keeps.

    A row without an image is an OSError; a row group that cannot be read a ValueError that names it.
    """

    tables: tuple[Table, ...]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        group = _last_before(self._starts, index)
        table, number = self._groups[group]
        row = int(index) - self._starts[group]
        name = f"{table.path}, row {sum(table.rows[:number]) + row}"
        images, texts = self._kept(table, number)
        caption, fault = captions.clean(text_of(name, texts[row].as_py(), table.classes) if texts is not None else None)
        image = image_of(name, images[row].as_py(), table.path)
        return {"image": image, "caption": caption, "name": name, "caption_fault": fault}

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The row groups, and how many of them are kept."""
        largest = max(max(table.sizes, default=0) for table in self.tables)
        rows = tuple(rows for table in self.tables for rows in table.rows)
        return Blocks(rows, max(1, KEPT // 2 // max(1, largest)))

    def fingerprint(self) -> str:
        stats = [(table.path, Path(table.path).stat()) for table in self.tables]
        files = [(str(path), file.st_size, file.st_mtime_ns) for path, file in stats]
        return f"parquet, {self.tables[0].image}: {files}"

    def __getstate__(self) -> dict[str, Any]:
        return {"tables": self.tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "tables", state["tables"])

    @functools.cached_property
    def _groups(self) -> list[tuple[Table, int]]:
        return [(table, number) for table in self.tables for number in range(len(table.rows))]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Where each row group begins, and where the last one ends."""
        return [0, *itertools.accumulate(table.rows[number] for table, number in self._groups)]

    @functools.cached_property
    def _kept(self) -> "_RowGroups":
        return _RowGroups()


class _RowGroups:
    """The columns of the row groups that were read last, at most KEPT bytes; each is read by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path | str, int], tuple[int, Future]] = OrderedDict()
        self._footers: OrderedDict[Path | str, Any] = OrderedDict()

    def __call__(self, table: Table, number: int) -> tuple[Any, Any]:
        key = table.path, number
        with self._lock:
            mine = key not in self._groups
            if mine:
                self._groups[key] = table.sizes[number], Future()
                while len(self._groups) > 1 and sum(size for size, _ in self._groups.values()) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            future = self._groups[key][1]
        if mine:
            try:
                future.set_result(self._read(table, number))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._groups.pop(key, None)
        return future.result()

    def _read(self, table: Table, number: int) -> tuple[Any, Any]:
        wanted = [table.image] if table.caption is None else [table.image, table.caption]
        with readable(table.path, f"row group {number}"):
            group = self._opened(table.path).read_row_group(number, columns=wanted, use_threads=False)
        if group.num_rows != table.rows[number]:
            raise ValueError(f"{table.path}: changed since it was opened; start again")
        texts = None if table.caption is None else _as_bytes(group.column(table.caption))
        return group.column(table.image), texts

    def _opened(self, path: Path | str) -> Any:
        """The file, opened anew, as threads should not share one; its footer is read once."""
        import pyarrow.parquet

        with self._lock:
            footer = self._footers.pop(path, None)
        file = pyarrow.parquet.ParquetFile(path, memory_map=True, metadata=footer)
        with self._lock:
            self._footers[path] = file.metadata
            if len(self._footers) > 256:
                self._footers.popitem(last=False)
        return file


def read(files: Sequence[Path], named: Named = GUESSED, where: str | None = None) -> ParquetSource:
    """The rows of Parquet files with images in them. A warning says which columns were chosen, and where row groups are
    so large that converting the files first is worth it. ValueError for files that hold no images, or cannot be read;
    one without rows counts for nothing."""
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
    rest = "; of several captions the first is taken" if caption and _is_list(schema.field(caption).type) else ""
    warnings.warn(Note(columns.chosen(where, image, caption, rest)), stacklevel=2)
    source = ParquetSource(tables)
    largest, rows = max((size, count) for table in tables for size, count in zip(table.sizes, table.rows))
    if largest > LARGE:
        warnings.warn(
            f"{where}: row groups of up to {rows} rows and {largest >> 20} MiB, each of which is read for one image: "
            "slow, and little is shuffled; convert the files first (experiments.data.convert)",
            stacklevel=2,
        )
    return source


def chosen_columns(where: str, schema: Any, named: Named) -> tuple[str, str | None]:
    """The columns of images and of captions of an Arrow schema. ValueError where none or several could be meant."""
    there, kinds = schema.names, _features(schema)
    images = [name for name in there if _holds_images(schema.field(name).type, kinds.get(name))]
    texts = text_columns(schema)
    classes = [name for name in there if _class_names(kinds.get(name))]
    image = columns.image_column(where, images, named.image, there)
    texts = [name for name in [*texts, *(classes if named.caption else [])] if name != image]
    return image, columns.caption_column(where, texts, named.caption, there)


def has_images(schema: Any) -> bool:
    """Whether a column of an Arrow schema may hold images, rather than paths of them."""
    kinds = _features(schema)
    return any(_holds_images(schema.field(name).type, kinds.get(name)) for name in schema.names)


def raw_rows(table: Table, groups: Sequence[int]) -> Iterator[Raw]:
    """The rows of some row groups in turn, a few at a time in memory, for conversion: a missing image is a fault."""
    wanted = [table.image] if table.caption is None else [table.image, table.caption]
    with opened(table.path) as file:
        row = sum(table.rows[: groups[0]])
        batches = file.iter_batches(batch_size=64, row_groups=list(groups), columns=wanted, use_threads=False)
        while True:
            with readable(table.path, f"row {row} or one soon after it"):
                batch = next(batches, None)
            if batch is None:
                return
            texts = [None] * len(batch) if table.caption is None else _as_bytes(batch.column(table.caption)).to_pylist()
            for image, text in zip(batch.column(table.image), texts, strict=True):
                name = f"{table.path}, row {row}"
                row += 1
                caption = text_of(name, text, table.classes)
                try:
                    yield name, image_of(name, image.as_py(), table.path), caption
                except OSError as error:
                    yield name, Fault("no image", reason(error)), caption


def image_of(name: str, value: Any, file: Path | str) -> bytes:
    """The bytes of an image in a cell of `file`. OSError where it has none."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is not None:
        return content
    if not isinstance(path, str) or not path:
        raise OSError(f"{name}: no image in this row")
    return remote.read_bytes(remote.beside(str(file), path))


def text_of(name: str, value: Any, classes: Sequence[str] = ()) -> str | None:
    """The caption in a cell: text, the first that is not blank of a list, or the name of a class. ValueError for
    anything else."""
    if isinstance(value, list):
        texts = (text_of(name, each, classes) for each in value)
        return next((text for text in texts if captions.present(text) is not None), None)
    if isinstance(value, bytes):
        return captions.decode(value)
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    if value is None or isinstance(value, str) or (isinstance(value, int) and classes):
        return value if isinstance(value, str) else None  # -1: of no class
    raise ValueError(f"{name}: the caption is no text but {quoted(value)}")


def table_of(file: Path | str, named: Named, where: str | None = None) -> Table:
    """One file. ValueError as for `read`."""
    with opened(file) as open_file:
        return _table(file, open_file, *chosen_columns(where or str(file), open_file.schema_arrow, named))


def text_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that hold text, or lists of it."""
    return [name for name in schema.names if _holds_text(schema.field(name).type)]


def text_rows(file: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Columns of text, row by row, still to be read by `text_of`: the first of them decoded."""
    with opened(file) as table:
        batches = table.iter_batches(columns=list(names), use_threads=False)
        while True:
            with readable(file):
                batch = next(batches, None)
            if batch is None:
                return
            cells = [_as_bytes(batch.column(name)).to_pylist() for name in names]
            for first, *rest in zip(*cells):
                text = captions.decode(first) if isinstance(first, bytes) else first
                yield dict(zip(names, [text, *rest]))


@contextlib.contextmanager
def opened(file: Path | str) -> Iterator[Any]:
    """A Parquet file, local or in a bucket. ValueError where it is none, or pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install 'jaxdiff[parquet]'") from error
    with remote.open_binary(str(file)) if remote.is_url(str(file)) else contextlib.nullcontext(file) as place:
        with readable(file, what="not a Parquet file"):
            table = pyarrow.parquet.ParquetFile(place, memory_map=place is file)
        with table:
            yield table


@contextlib.contextmanager
def readable(file: Path | str, part: str = "", what: str = "damaged, or cannot be read") -> Iterator[None]:
    """Arrow's errors as ValueErrors that name the file: it has OSError for damaged pages too."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        place = f", {part}" if part else ""
        raise ValueError(f"{file}{place}: {what} ({reason(error)})") from error


def _table(file: Path | str, open_file: Any, image: str, caption: str | None) -> Table:
    schema, footer = open_file.schema_arrow, open_file.metadata
    for name in filter(None, (image, caption)):
        if schema.names.count(name) != 1:
            count = schema.names.count(name)
            raise ValueError(f"{file}: {count or 'no'} columns are named {name!r}, of {', '.join(schema.names)}")
    if not _holds_images(schema.field(image).type, _features(schema).get(image)):
        raise ValueError(f"{file}: column {image!r} holds no images but {schema.field(image).type}")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    own = [i for i in range(footer.num_columns) if footer.schema.column(i).path.split(".")[0] == image]
    rows = tuple(group.num_rows for group in groups)
    sizes = tuple(sum(group.column(i).total_uncompressed_size for i in own) for group in groups)
    return Table(file, rows, sizes, image, caption, _class_names(_features(schema).get(caption or "")))


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says of each column, where it wrote the file."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _holds_images(kind: Any, feature: Any) -> bool:
    import pyarrow

    if isinstance(feature, dict) and feature.get("_type") in ("Audio", "Video", "Pdf", "Nifti"):
        return False
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


def _holds_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind) or _is_list(kind):
        return _holds_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _as_bytes(column: Any) -> Any:
    """Text by way of its bytes, as Arrow itself fails at those that are not UTF-8."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if _is_list(kind) and not _is_list(kind.value_type):
        return column.cast(pyarrow.large_list(pyarrow.large_binary()))
    return column.cast(pyarrow.large_binary()) if _holds_text(kind) else column


def _last_before(starts: Sequence[int], index: int) -> int:
    return bisect.bisect_right(starts, index) - 1

"""CSV and Parquet lists of image paths and captions, read as a stream.

CSV follows RFC 4180 with commas, and quotes are never guessed: an unclosed quote swallows the following rows, and an
unquoted comma splits a caption, so both are errors that name the line.
"""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from jaxdiff.core.messages import plain, quoted, reason
from jaxdiff.data import captions, remote
from jaxdiff.data.folder import SUFFIXES

_RULE = "a field with commas, quotes or line ends in it needs quotes around it, and the quotes in it doubled"
# A field is quoted entirely, or does not begin with a quote.
_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|(?![ \t]*")[^,\r\n]*+)'
_ROW = re.compile(rf"{_FIELD}(?:,{_FIELD})*+[\r\n]*")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; caption None: no captions."""

    image: str
    caption: str | None
    caption_required: bool = True


def rows(path: str, columns: Columns) -> Iterator[tuple[str | None, str | None]]:
    """Image paths (resolved relative to the list) and captions; None for a value that is not a string or not a path.

    ValueError, with the line of a CSV, for an invalid or damaged list.
    """
    read = _parquet_rows if path.endswith(".parquet") else csv_rows
    for image, caption in read(path, columns):
        named = isinstance(image, str) and image.strip()
        yield remote.beside(path, image) if named else None, (caption or None) if isinstance(caption, str) else None


@contextlib.contextmanager
def open_csv(path: str) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """The column names of a CSV, and its rows, each with the number of its first line."""
    with remote.open_binary(path) as stream, captions.reader(stream) as text:
        table = _table(path, text)
        _, header = next(table, (1, []))
        yield header, table


def csv_rows(path: str, columns: Columns) -> Iterator[tuple[str, str | None]]:
    """The image and caption columns of a CSV, unprocessed. ValueError as for `rows`."""
    with open_csv(path) as (header, table):
        _check_columns(path, header, columns)
        image = header.index(columns.image)
        caption = header.index(columns.caption) if columns.caption in header else None
        for line, row in table:
            where = f"{path}, line {line}"
            if len(row) != len(header):
                raise ValueError(f"{where}: the header has {len(header)} fields, this row {len(row)}; {_RULE}")
            if re.search(r"[\r\n]", row[image]):
                raise ValueError(
                    f"{where}: a line break within the image's name, {quoted(row[image])}: perhaps a quote is not "
                    f"closed; {_RULE}"
                )
            swallowed = next(_rows_within(row, image), None)
            if swallowed is not None:
                raise ValueError(
                    f"{where}: a quote that begins there holds a whole row, {plain(swallowed)}: "
                    f"perhaps it is not closed; {_RULE}"
                )
            yield row[image], None if caption is None else row[caption]


def _table(path: str, text: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The non-blank rows, each with the number of its first line."""
    lines: list[str] = []  # of the row in progress
    reader = csv.reader(_recorded(text, lines), strict=True)
    while True:
        first = reader.line_num + 1
        where = f"{path}, line {first}"
        lines.clear()
        try:
            row = next(reader, None)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {error}") from error
        except csv.Error as error:
            until = f", in a row that goes on to line {reader.line_num}" if reader.line_num > first else ""
            raise ValueError(f"{where}: {error}{until}: a quote is perhaps not closed; {_RULE}") from error
        if row is None:
            return
        written = "".join(lines)
        if "\0" in written:
            raise ValueError(f"{where}: a NUL byte; write the list as UTF-8, or as UTF-16 with a byte order mark")
        if '"' in written and not _ROW.fullmatch(written):
            raise ValueError(f"{where}: a quote behind blanks at the beginning of a field; {_RULE}")
        if len(row) > 1 or "".join(row).strip():
            yield first, row


def _recorded(text: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in text:
        lines.append(line)
        yield line


def _rows_within(row: list[str], image: int) -> Iterator[str]:
    """Lines within the fields of a row that are rows themselves: the same number of cells, an image in its column."""
    for column, value in enumerate(row):
        lines = re.split(r"[\r\n]+", value)
        for line in lines[1:] if column else lines:  # the first line continues the row
            cells = line.split(",")
            if len(lines) == 1 or len(cells) != len(row) or not _alike(cells[image], row[image]):
                continue
            blank = not any(cell.strip() for cell in cells[:image] + cells[image + 1 :])
            if not blank or " " not in cells[image].strip() or " " in row[image]:  # `see b.png,` is not a row
                yield line


def _alike(cell: str, image: str) -> bool:
    """Whether a cell names an image: by its suffix, or by the suffix, folder or scheme of the row's image."""
    cell, image = cell.strip('" '), image.strip()
    suffix = PurePosixPath(cell).suffix.lower()
    if suffix in SUFFIXES or (suffix and suffix == PurePosixPath(image).suffix.lower()):
        return True
    starts = {image[: image.rindex(sign) + len(sign)] for sign in ("://", "/") if sign in image}
    return bool(cell) and any(cell.startswith(start) for start in starts)


def _parquet_rows(path: str, columns: Columns) -> Iterator[tuple[Any, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'jaxdiff[parquet]'") from error
    with remote.open_binary(path) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({reason(error)})") from error
        _check_columns(path, table.schema_arrow.names, columns)
        names = [name for name in table.schema_arrow.names if name in (columns.image, columns.caption)]
        batches = table.iter_batches(columns=names)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:  # Arrow raises OSError for damaged pages too
                raise ValueError(f"{path}: damaged, or cannot be read ({reason(error)})") from error
            if batch is None:
                return
            values = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns)}
            captions_there = values.get(columns.caption or "", [None] * batch.num_rows)
            yield from zip(values[columns.image], captions_there)


def _values(column: Any) -> list:
    """The values of an Arrow column; text is decoded here, because Arrow fails on invalid UTF-8."""
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return [captions.decode(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _check_columns(path: str, header: list[str], columns: Columns) -> None:
    """ValueError for a missing or duplicate column."""
    required = (columns.image, *((columns.caption,) if columns.caption_required else ()))
    for name in filter(None, required):
        if name not in header:
            there = plain(", ".join(header), 400) or "none"
            raise ValueError(f"{path}: no column {name!r}, only {there}; name the right one")
    for name in filter(None, (columns.image, columns.caption)):
        if header.count(name) > 1:
            raise ValueError(f"{path}: {header.count(name)} columns are named {name!r}: keep one")

"""The metadata.csv, metadata.jsonl or metadata.parquet of an imagefolder: image names and captions."""

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jaxdiff.core.messages import Note, plain
from jaxdiff.data import captions, columns, lists, parquet_columns
from jaxdiff.data.columns import ColumnNames
from jaxdiff.data.folder import TABLES, file_name, json_row

_LOOKED_AT = 100
"""Rows used to infer column types in formats without types."""


@dataclasses.dataclass(frozen=True)
class MetadataRows:
    """(file name, caption) of each row; the number of rows without a file name."""

    entries: tuple[tuple[str, str | None], ...]
    without_name: int


def is_metadata(name: str) -> bool:
    path = PurePosixPath(name)
    return path.stem == "metadata" and path.suffix in TABLES


def by_folder(where: str, names: Iterable[str]) -> dict[str, str]:
    """The metadata file of each folder. ValueError for two in one folder."""
    tables: dict[str, str] = {}
    for name in names:
        inside = os.path.dirname(name)
        if inside in tables:
            raise ValueError(f"{where}: {tables[inside]} and {name} in one folder: keep one of them")
        tables[inside] = name
    return tables


def nearest(name: str, tables: Mapping[str, str]) -> str | None:
    """The nearest folder with metadata, from the image's own folder upwards."""
    parents = ("" if str(parent) == "." else str(parent) for parent in PurePosixPath(name).parents)
    return next((parent for parent in parents if parent in tables), None)


def read(file: Path, named: ColumnNames, where: str) -> MetadataRows:
    """The rows of a metadata file. A note lists the selected columns. ValueError, prefixed by `where`, for a damaged
    file, or missing or ambiguous columns."""
    open_rows = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix]
    there, texts, rows = open_rows(file, where)
    files = [name for name in there if name == "file_name" or name.endswith("_file_name")]
    image = _image_column(where, files, named.image, there)
    candidates = [name for name in texts if name not in files]
    caption = columns.caption_column(where, candidates, named.caption, there)
    warnings.warn(Note(columns.chosen(where, image, caption)), stacklevel=2)
    entries, without = [], 0
    for place, row in rows(image, caption):
        if row.get(image) is None or not str(row[image]).strip():
            without += 1
            continue
        try:
            name = file_name(row, image)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        text = None if caption is None else parquet_columns.text_of(place, row.get(caption))
        entries.append((name, captions.present(text)))
    return MetadataRows(tuple(entries), without)


def _image_column(where: str, files: Sequence[str], named: str | None, there: Sequence[str]) -> str:
    """`image_column` may be given with or without the suffix `_file_name`."""
    if named is not None and f"{named}_file_name" in files:
        return f"{named}_file_name"
    if named is None and "file_name" in files:
        return "file_name"
    if not files:
        raise ValueError(f"{where}: no column file_name or *_file_name, only {plain(', '.join(there), 400) or 'none'}")
    usual = {name.removesuffix("_file_name"): name for name in files}
    if named is None:
        return usual[columns.image_column(where, list(usual), None, there)]
    return columns.image_column(where, files, named, there)


Rows = Iterator[tuple[str, dict[str, Any]]]


def _csv(file: Path, where: str) -> tuple[list[str], list[str], Any]:
    with lists.open_csv(str(file)) as (header, rows):
        first = [row for _, row in itertools.islice(rows, _LOOKED_AT) if len(row) == len(header)]
    texts = [name for i, name in enumerate(header) if not first or not all(_is_number(row[i]) for row in first)]

    def read(image: str, caption: str | None) -> Rows:
        wanted = lists.Columns(image, caption, caption is not None)
        for number, (name, text) in enumerate(lists.csv_rows(str(file), wanted), 1):
            yield f"{where}, row {number}", {image: name} | ({} if caption is None else {caption: text})

    return header, texts, read


def _jsonl(file: Path, where: str) -> tuple[list[str], list[str], Any]:
    def lines() -> Rows:
        for number, line in enumerate(captions.decode(file.read_bytes()).split("\n"), 1):
            if line.strip():
                try:
                    yield f"{where}:{number}", json_row(line)
                except ValueError as error:
                    raise ValueError(f"{where}:{number}: {error}") from error

    first = [row for _, row in itertools.islice(lines(), _LOOKED_AT)]
    there = list(dict.fromkeys(itertools.chain.from_iterable(first)))
    texts = [name for name in there if any(_is_text(row.get(name)) for row in first)]
    return there, texts, lambda image, caption: lines()


def _parquet(file: Path, where: str) -> tuple[list[str], list[str], Any]:
    with parquet_columns.opened(file) as table:
        there = table.schema_arrow.names
        texts = parquet_columns.text_columns(table.schema_arrow)

    def read(image: str, caption: str | None) -> Rows:
        names = [image] if caption is None else [image, caption]
        for number, row in enumerate(parquet_columns.text_rows(file, names), 1):
            yield f"{where}, row {number}", row

    return there, texts, read


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(each, str) for each in value))

"""Large captioned sets, once, into the ArrayRecord files of records.py: tar shards, and lists of paths and captions.

    tar shards   the webdataset layout: members that share a name up to the first dot of their last part are one
                 example; KEY.jpg (png, webp, …) is the picture, KEY.txt its caption, or KEY.json with a caption in it
    lists        CSV or Parquet with a column of picture paths (relative ones are beside the list) and one of captions

The work is cut into pieces, a tar file or a run of a list's rows each, and every piece becomes one ArrayRecord file
and one small JSON report, both renamed into place when whole. A killed run therefore loses only the pieces in
progress; the same command does those again and nothing twice. A picture that is missing or damaged is left out and
counted; a file or bucket out of reach stops the command, so that it costs no pictures. `dataset.json` appears at the
end and lists the pieces that belong to the inputs given, so that leftovers of other inputs are never read. Paths with
`://` go through fsspec.
"""

import collections
import csv
import dataclasses
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any

from jaxdiff.data import captions, pictures, remote
from jaxdiff.data.files import new_records, remove_leftovers, write_json
from jaxdiff.data.folder import SUFFIXES
from jaxdiff.data.records import INDEX, pack


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why an example is left out: a kind to count by, and the detail."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


# An example on its way: name, the picture's bytes or what is wrong with them, caption.
Raw = tuple[str, bytes | Fault, str | None]


@dataclasses.dataclass(frozen=True)
class Tar:
    """One tar file."""

    path: str

    def identity(self) -> str:
        return f"tar\n{self.path}\n{remote.size(self.path)}"

    def examples(self, settings: "Settings") -> Iterator[Raw]:
        with remote.open_binary(self.path) as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|*") as archive:
                    yield from _tar_examples(self.path, archive, settings.caption_column)
            except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
                # What came before the damage is kept: one torn file among thousands must not stop the rest.
                yield self.path, Fault("damaged tar file", str(error)), None


@dataclasses.dataclass(frozen=True)
class Rows:
    """A run of rows of a list: (path, caption) each, from row `start` of `path`."""

    path: str
    start: int
    rows: tuple[tuple[str | None, str | None], ...]

    def identity(self) -> str:
        return f"rows\n{self.path}\n{self.start}\n{self.rows}"

    def examples(self, settings: "Settings") -> Iterator[Raw]:
        for number, (file, caption) in enumerate(self.rows, self.start):
            if file is None:
                yield f"{self.path}, row {number}", Fault("no path"), caption
                continue
            try:
                yield file, remote.read_bytes(file), caption
            except OSError as error:
                if not remote.is_absent(error):  # a bucket out of reach for a moment must not cost its pictures
                    raise
                yield file, Fault("not there", str(error)), caption


Piece = Tar | Rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to convert."""

    image_column: str = "path"
    """the column of picture paths in a list"""
    caption_column: str = "caption"
    """the column of captions in a list; the key of the caption in a tar file's KEY.json"""
    rows_per_file: int = 10_000
    """rows of a list that become one output file"""
    images_only: bool = False
    """keep pictures without a caption too (for super-resolution, which needs none)"""
    verify: bool = True
    """decode every picture, so that damaged ones are left out now and not met in training"""
    strict: bool = False
    """stop at the first damaged picture or missing caption"""
    retry: bool = False
    """do those pieces again in which something was left out, because it is there or repaired now"""

    def __post_init__(self):
        if self.rows_per_file < 1:
            raise ValueError(f"rows_per_file must be at least 1, got {self.rows_per_file}")


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of a piece: its file, the pictures in it, how many were left out by kind of fault, and the first."""

    file: str
    source: str
    images: int
    skipped: dict[str, int]
    first: dict[str, str]
    replaced: int = 0
    """captions of those pictures in which characters were replaced; `first` has one under REPLACED"""


REPLACED = "characters replaced"


def convert(
    inputs: Iterable[str],
    out: Path | str,
    settings: Settings = Settings(),
    *,
    processes: int = 1,
    progress: Callable[[Report], None] = lambda report: None,
) -> dict:
    """Converts `inputs` (.tar, .csv, .parquet; local or `://` paths) into the folder `out`.

    Returns what dataset.json says. `processes` pieces are done at a time (1: in this process). `progress` is told of
    each piece as it is finished, or found finished by an earlier run. ValueError or OSError for an input that cannot
    be read; what was done stays done, and an older dataset.json stays valid.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reports = []
    for report in _run(pieces(inputs, settings), out, settings, processes):
        progress(report)
        reports.append(report)
    index = _index(reports, settings)
    if not index["images"]:
        raise ValueError(f"no usable picture in the inputs; left out: {index['skipped'] or 'nothing'}")
    write_json(out / INDEX, index)
    remove_leftovers(out)
    return index


def _index(reports: list[Report], settings: Settings) -> dict:
    skipped: collections.Counter[str] = collections.Counter()
    for report in reports:
        skipped.update(report.skipped)
    return {
        "images": sum(report.images for report in reports),
        "skipped": dict(sorted(skipped.items())),
        "replaced": sum(report.replaced for report in reports),
        "first": {kind: line for report in reversed(reports) for kind, line in report.first.items()},
        "settings": dataclasses.asdict(settings),
        "shards": [{"file": report.file, "source": report.source, "images": report.images} for report in reports],
    }


def pieces(inputs: Iterable[str], settings: Settings) -> Iterator[Piece]:
    """The pieces of work, in order. Lists are read as a stream, never whole. A piece given twice is an error."""
    seen: set[str] = set()
    for path in inputs:
        if path in seen:
            raise ValueError(f"{path}: given twice")
        seen.add(path)
        suffixes = PurePosixPath(path).suffixes
        if ".tar" in suffixes or suffixes[-1:] == [".tgz"]:
            yield Tar(path)
        elif suffixes[-1:] in ([".csv"], [".parquet"]):
            rows = enumerate(_list_rows(path, settings))
            while run := list(itertools.islice(rows, settings.rows_per_file)):
                yield Rows(path, run[0][0], tuple(row for _, row in run))
        else:
            raise ValueError(f"{path}: neither a tar file nor a .csv or .parquet list")


def convert_piece(piece: Piece, out: Path, settings: Settings) -> Report:
    """One piece → one ArrayRecord file and its report, unless an earlier run left both."""
    file = out / f"{_name(piece, settings)}.array_record"
    done = file.with_suffix(".json")
    if done.is_file() and file.is_file():
        try:
            report = Report(**json.loads(done.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{done}: not a report of this converter ({error}); delete it") from error
        if settings.strict and report.first and not settings.retry:
            raise ValueError(f"{next(iter(report.first.values()))} (strict)")
        if not (settings.retry and report.first):
            return report
    skipped: collections.Counter[str] = collections.Counter()
    first: dict[str, str] = {}
    images = replaced = 0
    with new_records(file) as write:
        for name, image, raw in piece.examples(settings):
            caption, invalid = captions.clean(raw)
            fault = _fault(image, caption, settings)
            if fault is None and invalid is not None:
                fault = Fault(REPLACED, invalid) if settings.strict else None
                replaced += 1
                first.setdefault(REPLACED, f"{name}: {invalid}")
            if fault is None:
                write(pack(image, caption, name))
                images += 1
            elif settings.strict:
                raise ValueError(f"{name}: {fault} (strict)")
            else:
                skipped[fault.kind] += 1
                first.setdefault(fault.kind, f"{name}: {fault}")
    report = Report(file.name, piece.path, images, dict(skipped), first, replaced)
    write_json(done, dataclasses.asdict(report))  # last: only a file with its report counts as done
    return report


def _run(work: Iterator[Piece], out: Path, settings: Settings, processes: int) -> Iterator[Report]:
    """The reports in the order of the pieces, whichever ends first: the set's order must not depend on timing."""
    if processes <= 1:
        yield from (convert_piece(piece, out, settings) for piece in work)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (JAX's, fsspec's) can hang
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_die_with_parent) as pool:
        queue: collections.deque = collections.deque()
        try:
            for piece in work:
                queue.append(pool.submit(convert_piece, piece, out, settings))
                if len(queue) >= 4 * processes:  # bounded: the rows of the pieces ahead are held in memory
                    wait(queue, return_when=FIRST_COMPLETED)
                while queue and (queue[0].done() or len(queue) >= 8 * processes):
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def _die_with_parent() -> None:
    """Workers of a killed command would wait for work for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _fault(image: bytes | Fault, caption: str | None, settings: Settings) -> Fault | None:
    if isinstance(image, Fault):
        return image
    if not settings.images_only and caption is None:
        return Fault("no caption")
    if settings.verify:
        try:
            pictures.decode(image)
        except pictures.Unreadable as error:
            return Fault("unreadable", str(error))
    return None


def _name(piece: Piece, settings: Settings) -> str:
    """The output's name tells the content: the same piece has the same name in every run, any other has another."""
    what = (piece.identity(), settings.images_only, settings.verify, settings.caption_column)
    stem = PurePosixPath(piece.path).name.partition(".")[0]
    return f"{stem}-{hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()}"


def _tar_examples(path: str, archive: tarfile.TarFile, caption_key: str) -> Iterator[Raw]:
    files = (member for member in archive if member.isfile())
    for key, members in itertools.groupby(files, key=lambda member: _split(member.name)[0]):
        image: bytes | Fault = Fault("no picture")
        caption = None
        for member in members:
            extension = _split(member.name)[1]
            if extension not in (*SUFFIXES, ".txt", ".json"):
                continue
            content = archive.extractfile(member).read()
            if extension in SUFFIXES:
                image = content
            elif extension == ".txt":
                caption = captions.present(captions.decode(content)) or caption
            else:
                caption = caption or _caption_in(content, caption_key)
        if isinstance(image, bytes) or caption is not None:
            yield f"{path}/{key}", image, caption


def _split(name: str) -> tuple[str, str]:
    """webdataset's key and extension: `a/b.seg.jpg` → (`a/b`, `.seg.jpg`); a leading dot begins no extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base[1:].partition(".")
    return f"{folder}{slash}{base[:1]}{stem}", (dot + extension).lower()


def _caption_in(content: bytes, key: str) -> str | None:
    try:
        found = captions.from_json(content)
    except ValueError:
        return None
    found = found.get(key) if isinstance(found, dict) else found
    return captions.present(found) if isinstance(found, str) else None


def _list_rows(path: str, settings: Settings) -> Iterator[tuple[str | None, str | None]]:
    """Paths and captions; None for what is not a string, or no path."""
    rows = _parquet_rows if path.endswith(".parquet") else _csv_rows
    for image, caption in rows(path, settings):
        named = isinstance(image, str) and image.strip()
        yield remote.beside(path, image) if named else None, (caption or None) if isinstance(caption, str) else None


def _csv_rows(path: str, settings: Settings) -> Iterator[tuple[Any, Any]]:
    with remote.open_binary(path) as stream:
        reader = csv.DictReader(captions.reader(stream))
        try:
            _check_columns(path, list(reader.fieldnames or []), settings)
            for row in reader:
                yield row[settings.image_column], row.get(settings.caption_column)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet_rows(path: str, settings: Settings) -> Iterator[tuple[Any, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'jaxdiff[parquet]'") from error
    with remote.open_binary(path) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
        _check_columns(path, table.schema_arrow.names, settings)
        wanted = {settings.image_column, settings.caption_column} & set(table.schema_arrow.names)
        for rows in table.iter_batches(columns=sorted(wanted)):
            columns = {name: _values(column) for name, column in zip(rows.schema.names, rows.columns)}
            captioned = columns.get(settings.caption_column, [None] * rows.num_rows)
            yield from zip(columns[settings.image_column], captioned)


def _values(column: Any) -> list:
    """An Arrow column; text by way of its bytes, as Arrow itself fails at those that are not UTF-8."""
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return [captions.decode(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _check_columns(path: str, found: list[str], settings: Settings) -> None:
    """Pictures alone may have captions or not."""
    for column in (settings.image_column, *(() if settings.images_only else (settings.caption_column,))):
        if column not in found:
            raise ValueError(f"{path}: no column {column!r}, only {', '.join(found) or 'none'}; name the right one")

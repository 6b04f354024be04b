"""The pieces of a conversion: units of input that yield their examples."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from jaxdiff.core.messages import Note
from jaxdiff.data import folder, hugging_face, lists, parquet_columns, parquet_images, remote, tar_shards
from jaxdiff.data.columns import GUESSED, ColumnNames, chosen
from jaxdiff.data.fault import Fault, Raw


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to convert."""

    image_column: str | None = None
    """the column of image paths in a list (default `path`); of images in Parquet files, or of image names in a metadata
    file (default: selected by its name)"""
    caption_column: str | None = None
    """the caption column of a list, and the caption key of a tar file's KEY.json (default `caption`); of Parquet files
    with images and of metadata files (default: selected by its name)"""
    split: str = "train"
    """the split of a Hugging Face folder"""
    rows_per_file: int = 10_000
    """rows of a list, images of a folder or (about) rows of a Parquet file per output file"""
    images_only: bool = False
    """also keep images without a caption (for super-resolution)"""
    verify: bool = True
    """decode every image, so that damaged ones are skipped now rather than in training"""
    strict: bool = False
    """stop at the first damaged image, missing caption or other fault"""
    retry: bool = False
    """redo pieces with faults, for inputs that have been repaired"""

    def __post_init__(self):
        if self.rows_per_file < 1:
            raise ValueError(f"rows_per_file must be at least 1, got {self.rows_per_file}")

    @property
    def caption_key(self) -> str:
        """The caption key of lists and tar files."""
        return "caption" if self.caption_column is None else self.caption_column

    @property
    def named(self) -> ColumnNames:
        return ColumnNames(self.image_column, self.caption_column)


GUESSING = Settings()


@dataclasses.dataclass(frozen=True)
class Tar:
    """One tar file."""

    path: str

    def identity(self) -> str:
        return f"tar, rules 3\n{self.path}\n{remote.size(self.path)}"

    def examples(self, settings: Settings) -> Iterator[Raw]:
        with remote.open_binary(self.path) as stream:
            yield from tar_shards.examples(self.path, stream, settings.caption_key)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A run of rows (path, caption) of a list, from row `start` of `path`."""

    path: str
    start: int
    rows: tuple[tuple[str | None, str | None], ...]

    def identity(self) -> str:
        return f"rows\n{self.path}\n{self.start}\n{self.rows}"

    def examples(self, settings: Settings) -> Iterator[Raw]:
        for number, (file, caption) in enumerate(self.rows, self.start):
            if file is None:
                yield f"{self.path}, row {number}", Fault("no path"), caption
                continue
            try:
                yield file, remote.read_bytes(file), caption
            except OSError as error:
                if not remote.is_absent(error):  # a temporarily unreachable bucket must not lose its images
                    raise
                yield file, Fault("not there", str(error)), caption


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Row groups of a Parquet file that holds the images."""

    table: parquet_images.Table
    groups: tuple[int, ...]

    @property
    def path(self) -> str:
        return str(self.table.path)

    def identity(self) -> str:
        columns = self.table.image, self.table.caption
        return f"row groups\n{self.path}\n{remote.size(self.path)}\n{self.groups}\n{columns}"

    def examples(self, settings: Settings) -> Iterator[Raw]:
        yield from parquet_images.raw_rows(self.table, self.groups)


Piece = Tar | Rows | RowGroups


def pieces(inputs: Iterable[str], settings: Settings) -> Iterator[Piece]:
    """The pieces, in order. Lists are streamed. ValueError for an input given twice."""
    seen: set[str] = set()
    for path in inputs:
        if path in seen:
            raise ValueError(f"{path}: given twice")
        seen.add(path)
        suffixes = PurePosixPath(path).suffixes
        if not remote.is_url(path) and Path(path).is_dir():
            yield from _of_folder(path, settings)
        elif ".tar" in suffixes or suffixes[-1:] == [".tgz"]:
            yield Tar(path)
        elif suffixes[-1:] == [".parquet"] and _holds_images(path, settings):
            table = parquet_images.table_of(path, settings.named)
            warnings.warn(Note(chosen(path, table.image, table.caption)), stacklevel=2)
            yield from _of_table(table, settings)
        elif suffixes[-1:] in ([".csv"], [".parquet"]):
            image = "path" if settings.image_column is None else settings.image_column
            columns = lists.Columns(image, settings.caption_key or None, not settings.images_only)
            yield from _of_rows(path, lists.rows(path, columns), settings)
        else:
            raise ValueError(f"{path}: neither a folder, a tar file, nor a .csv or .parquet file")


def _holds_images(path: str, settings: Settings) -> bool:
    """Whether a Parquet file holds the images, rather than paths in the path column."""
    with parquet_columns.opened(path) as file:
        kinds = file.schema_arrow
        paths = "path" if settings.image_column is None else settings.image_column
        return parquet_columns.has_images(kinds) and paths not in parquet_columns.text_columns(kinds)


def _of_folder(path: str, settings: Settings) -> Iterator[Piece]:
    """ValueError or FileNotFoundError for a folder without images."""
    if hugging_face.is_layout(Path(path)) or settings.named != GUESSED or settings.split != GUESSING.split:
        source = hugging_face.read(path, settings.split, settings.named)
    else:
        source = folder.read(path)
    if isinstance(source, parquet_images.ParquetSource):
        for table in source.tables:
            yield from _of_table(table, settings)
    else:
        assert isinstance(source, folder.FolderSource)
        rows = ((str(source.path / name), source.text(i)) for i, (name, _) in enumerate(source.entries))
        yield from _of_rows(path, rows, settings)


def _of_rows(path: str, rows: Iterable[tuple[str | None, str | None]], settings: Settings) -> Iterator[Rows]:
    numbered = enumerate(rows)
    while run := list(itertools.islice(numbered, settings.rows_per_file)):
        yield Rows(path, run[0][0], tuple(row for _, row in run))


def _of_table(table: parquet_images.Table, settings: Settings) -> Iterator[RowGroups]:
    """Runs of row groups with at least `rows_per_file` rows."""
    groups: list[int] = []
    for group in range(len(table.rows)):
        groups.append(group)
        if sum(table.rows[each] for each in groups) >= settings.rows_per_file or group == len(table.rows) - 1:
            yield RowGroups(table, tuple(groups))
            groups = []

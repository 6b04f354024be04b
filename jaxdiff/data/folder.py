"""A folder of images with captions: `.txt` beside each image, or one metadata.jsonl for all.

photos/cat.jpg  photos/cat.txt                          any depth; the file's text is the caption
photos/metadata.jsonl                                   {"file_name": "a/cat.jpg", "text": "a cat"}, one a line;
                                                        "caption" is used if "text" is missing or blank

`walk` lists the images of a folder for training and evaluation alike.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from jaxdiff.core.messages import plain, quoted
from jaxdiff.data import captions
from jaxdiff.data.example import Example

METADATA = "metadata.jsonl"
TABLES = frozenset({".csv", ".jsonl", ".parquet"})
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
# Folders of programs and systems: thumbnails, resource forks, deleted files.
PROGRAMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
# Suffixes of files that usually accompany images. Other files are counted: they may be unsupported images.
COMPANIONS = frozenset(
    {".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npy", ".npz", ".safetensors", ".md", ".html", ".xml"}
    | {".yaml", ".yml", ".ini", ".log", ".db", ".py", ".sh"}
)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images in order of their paths (or of metadata.jsonl); a caption of None is read from a `.txt`."""

    path: Path
    entries: tuple[tuple[str, str | None], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def text(self, index: int) -> str | None:
        """The caption, not yet cleaned."""
        name, text = self.entries[index]
        return _text_beside(self.path / name) if text is None else text

    def open_image(self, index: int) -> BufferedReader:
        return (self.path / self.entries[index][0]).open("rb")

    def fingerprint(self) -> str:
        digest = hashlib.blake2b()
        for name, _ in self.entries:
            with contextlib.suppress(OSError):
                status = (self.path / name).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
            digest.update(os.fsencode(name) + b"\0")
        return f"folder {self.path.absolute()}: {digest.hexdigest()}"

    def __getitem__(self, index: int) -> Example:
        file = self.path / self.entries[index][0]
        caption, fault = captions.clean(self.text(index))
        return {"image": file.read_bytes(), "caption": caption, "name": str(file), "caption_fault": fault}


def read(path: Path | str) -> FolderSource:
    """The examples of a folder. Warns with the counts of skipped files. FileNotFoundError if the folder is missing or
    has no image; ValueError, naming the line, for a damaged metadata.jsonl."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"folder:{path}: no such folder")
    listing = walk(path)
    entries: tuple[tuple[str, str | None], ...] = tuple((name, None) for name in listing.images)
    left_out = listing.left_out()
    if (path / METADATA).is_file():
        entries = tuple(from_metadata((path / METADATA).read_bytes(), str(path / METADATA)))
        unlisted = sorted(set(listing.images) - {os.path.normpath(name) for name, _ in entries})
        left_out = (
            [counted(unlisted, f"image that {METADATA} does not list|images that {METADATA} does not list")]
            if unlisted
            else []
        )
    others = sorted(name for name in listing.tables if os.path.basename(name) in ("metadata.csv", "metadata.parquet"))
    if others:
        left_out.append(counted(others, "table that hf:PATH would read|tables that hf:PATH would read"))
    for line in left_out:
        warnings.warn(f"{path}: left out {line}", stacklevel=2)
    if not entries:
        raise FileNotFoundError(f"{path}: no images there ({', '.join(sorted(SUFFIXES))})")
    return FolderSource(path, entries)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The sorted relative paths of a folder's images, and what is skipped.

    hidden: folders and images whose names begin with a dot; folders of programs (`PROGRAMS`)
    unknown: files that are neither images nor companions (`COMPANIONS`), counted by suffix
    closed: unreadable folders, with the reason
    outward: links to an ancestor of the root or of the folder that contains the link
    tables: possible metadata files (.csv, .jsonl, .parquet)
    """

    images: tuple[str, ...]
    hidden: tuple[str, ...]
    unknown: tuple[tuple[str, int], ...]
    closed: tuple[str, ...]
    outward: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def left_out(self) -> list[str]:
        """One line per kind of skipped file, with its count."""
        lines = []
        if self.hidden:
            lines.append(counted(self.hidden, "hidden folder or image|hidden folders or images"))
        if self.unknown:
            kinds = [f"{count} {suffix}" for suffix, count in self.unknown]
            count = sum(count for _, count in self.unknown)
            lines.append(counted(kinds, "file of an unknown kind|files of unknown kinds", count))
        if self.closed:
            lines.append(counted(self.closed, "folder that cannot be read|folders that cannot be read"))
        if self.outward:
            lines.append(counted(self.outward, "link to a folder around it|links to folders around it"))
        return lines


def is_hidden(name: str, is_folder: bool = False) -> bool:
    """Whether a path (with `/`) is left out of a folder, a zip or a tar file: a component begins with a dot, or is a
    folder that a program keeps for itself."""
    path_parts = name.split("/")
    folders = path_parts if is_folder else path_parts[:-1]
    return any(part.startswith(".") and part not in (".", "..") for part in path_parts) or not PROGRAMS.isdisjoint(
        folders
    )


def walk(path: Path | str) -> Walk:
    """List everything below a folder. Links to folders are followed, but each folder is visited once, preferably by its
    own path, so link cycles end. A link to an ancestor folder is not followed: it leads out of the dataset. A link to a
    file counts as the file."""
    images, hidden, closed, outward, tables = [], [], [], [], []
    root = os.path.realpath(path)
    unknown: collections.Counter[str] = collections.Counter()
    folders = collections.deque([("", root)])  # relative and real paths
    links: collections.deque[tuple[str, str]] = collections.deque()
    visited = set()
    while folders or links:
        inside, real = (folders or links).popleft()
        if real in visited:
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except OSError as error:
            closed.append(f"{inside or path} ({error.strerror})")
            continue
        for entry in entries:
            name, suffix = inside + entry.name, os.path.splitext(entry.name)[1].lower()
            kind = _kind(entry)
            if is_hidden(entry.name, kind == stat.S_IFDIR):
                hidden += [name] if kind == stat.S_IFDIR or suffix in SUFFIXES else []
            elif kind == stat.S_IFDIR and entry.is_symlink():
                target = os.path.realpath(entry.path)
                if target not in visited and (_is_around(target, root) or _is_around(target, real)):
                    outward.append(name)
                else:
                    links.append((f"{name}/", target))
            elif kind == stat.S_IFDIR:
                folders.append((f"{name}/", entry.path))
            elif suffix in SUFFIXES and kind == stat.S_IFREG:
                images.append(name)
            elif suffix in TABLES and kind == stat.S_IFREG:
                tables.append(name)
            elif suffix not in COMPANIONS:
                unknown[(suffix or "without suffix") if kind == stat.S_IFREG else "neither file nor folder"] += 1
    kinds = tuple(unknown.most_common())
    return Walk(
        tuple(sorted(images)), tuple(sorted(hidden)), kinds, tuple(closed), tuple(outward), tuple(sorted(tables))
    )


def _is_around(outer: str, inner: str) -> bool:
    """Whether one real path contains the other."""
    return Path(inner).is_relative_to(outer)


def _kind(entry: os.DirEntry) -> int:
    """Folder, file or neither. A broken link counts as a file, which is counted when it is read."""
    if entry.is_symlink():
        try:
            return stat.S_IFMT(entry.stat().st_mode)
        except OSError:
            return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


def counted(names: Any, what: str, count: int | None = None) -> str:
    """`2 images that … (a.png, b.png)`: `what` is the singular and the plural."""
    count = len(names) if count is None else count
    one, several = what.split("|")
    shown = ", ".join(plain(name, 200) for name in names[:5])
    return f"{count} {one if count == 1 else several} ({shown}{', …' if len(names) > 5 else ''})"


def from_metadata(content: bytes, where: str) -> Iterator[tuple[str, str | None]]:
    """Image names and captions (None: missing). ValueError for a bad line, with `where` and the line number."""
    for number, line in enumerate(captions.decode(content).split("\n"), 1):
        if line.strip():
            try:
                yield _entry(line)
            except ValueError as error:
                raise ValueError(f"{where}:{number}: {error}") from error


def _entry(line: str) -> tuple[str, str | None]:
    """The image name and the caption of a line (None: missing). ValueError for a bad line."""
    row = json_row(line)
    return file_name(row), captions.chosen(row, ("text", "caption"))


def json_row(line: str) -> dict[str, Any]:
    """Parse a line of a metadata.jsonl. ValueError if it is not a JSON object."""
    try:
        row = captions.from_json(line)
    except ValueError as error:
        raise ValueError(f"not a JSON object with a file_name ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with a file_name")
    return row


def file_name(row: Mapping[str, Any], column: str = "file_name") -> str:
    """The image file name in a row. ValueError for an impossible file name."""
    if column not in row:
        raise ValueError(f"not a JSON object with a {column}")
    name = row[column]
    if name is None:
        raise ValueError(f"{column} is null")
    if not isinstance(name, str):
        raise ValueError(f"{column} is not a string but {quoted(name)}")
    try:
        possible = name.strip() and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"no file can have the {column} {quoted(name)}")
    return name


def _text_beside(file: Path) -> str | None:
    try:
        return captions.decode(file.with_suffix(".txt").read_bytes())
    except FileNotFoundError:
        return None

"""A zip of pictures, as datasets of EDM and ADM come: read like a folder, and never unpacked.

photos.zip: 00000/img00000000.png  00000/img00000000.txt     any depth; a `.txt` beside a picture is its caption
"""

import dataclasses
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from jaxdiff.data.example import Example
from jaxdiff.data.folder import SUFFIXES
from jaxdiff.data.pictures import Unreadable

LARGEST = 1 << 30
"""Bytes of a member that are unpacked at most: a zip may say of a few bytes that they are many."""


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A file in a zip, with what `Path` calls its parts."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    @property
    def name(self) -> str:
        return PurePosixPath(self.info.filename).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.info.filename).suffix

    def read_bytes(self) -> bytes:
        """Raises `Unreadable` for a member that is damaged, encrypted or too large."""
        if self.info.file_size > LARGEST:
            raise Unreadable(f"unpacks to {self.info.file_size} bytes")
        try:
            return self.archive.read(self.info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise Unreadable(f"damaged or encrypted in the zip ({error})") from error

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.info.filename}"


@dataclasses.dataclass(frozen=True, eq=False)
class ZipSource:
    """The pictures in order of their names. `left_out`: hidden ones, and those that macOS puts beside files."""

    path: Path
    members: tuple[Member, ...]
    captions: dict[str, Member]
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example:
        member = self.members[index]
        text = self.captions.get(_stem(member.info.filename))
        caption = None if text is None else text.read_bytes().decode("utf-8-sig", errors="replace").strip() or None
        return {"image": member.read_bytes(), "caption": caption, "name": str(member)}


def is_zip(path: Path) -> bool:
    """By its name, or because a file that is there begins as one."""
    return not path.is_dir() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def read(path: Path) -> ZipSource:
    """The pictures of a zip, which stays open. FileNotFoundError when it is not there or holds no picture; ValueError
    for a damaged one."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such zip") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no zip, or a damaged one ({error})") from error
    files = sorted((each for each in archive.infolist() if not each.is_dir()), key=lambda each: each.filename)
    shown = [each for each in files if not _is_hidden(each.filename)]
    hidden = tuple(each.filename for each in files if _is_hidden(each.filename) and _suffix(each.filename) in SUFFIXES)
    members = tuple(Member(archive, each) for each in shown if _suffix(each.filename) in SUFFIXES)
    captions = {_stem(each.filename): Member(archive, each) for each in shown if _suffix(each.filename) == ".txt"}
    if not members:
        raise FileNotFoundError(f"{path}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    return ZipSource(path, members, captions, hidden)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]

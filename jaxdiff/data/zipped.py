"""A zip of pictures, as datasets of EDM and ADM come: read like a folder, and never unpacked.

photos.zip: 00000/img00000000.png  00000/img00000000.txt     any depth; a `.txt` beside a picture is its caption
"""

import collections
import dataclasses
import os
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from jaxdiff.data import captions
from jaxdiff.data.example import Example
from jaxdiff.data.folder import COMPANIONS, PROGRAMS, SUFFIXES, Walk

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
        """OSError for a member that is damaged, encrypted or too large."""
        if self.info.file_size > LARGEST:
            raise OSError(f"unpacks to {self.info.file_size} bytes, of at most {LARGEST}")
        try:
            return self.archive.read(self.info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"damaged or encrypted in the zip ({error})") from error

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.info.filename}"


@dataclasses.dataclass(frozen=True, eq=False)
class ZipSource:
    """The pictures in order of their names."""

    path: Path
    members: tuple[Member, ...]
    captions: dict[str, Member]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example:
        member = self.members[index]
        text = self.captions.get(_stem(member.info.filename))
        caption, fault = captions.clean(None if text is None else captions.decode(text.read_bytes()))
        return {"image": member.read_bytes(), "caption": caption, "name": str(member), "caption_fault": fault}


def is_zip(path: Path) -> bool:
    """By its name, or because a file that is there begins as one."""
    return not path.is_dir() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def read(path: Path) -> ZipSource:
    """The pictures of a zip, which stays open. Warns of what is left out, counted, as for a folder. FileNotFoundError
    when it is not there or holds no picture; ValueError for a damaged one."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such zip") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no zip, or a damaged one ({error})") from error
    files = sorted((each for each in archive.infolist() if not each.is_dir()), key=lambda each: each.filename)
    shown = [each for each in files if not _is_hidden(each.filename)]
    hidden = [each.filename for each in files if _is_hidden(each.filename) and _suffix(each.filename) in SUFFIXES]
    members = tuple(Member(archive, each) for each in shown if _suffix(each.filename) in SUFFIXES)
    texts = {_stem(each.filename): Member(archive, each) for each in shown if _suffix(each.filename) == ".txt"}
    others = (suffix for each in shown if (suffix := _suffix(each.filename)) not in SUFFIXES | COMPANIONS)
    unknown = collections.Counter(suffix or "without suffix" for suffix in others)
    for line in Walk((), tuple(hidden), tuple(unknown.most_common()), ()).left_out():
        warnings.warn(f"{path}: left out {line}", stacklevel=2)
    if not members:
        raise FileNotFoundError(f"{path}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    return ZipSource(path, members, texts)


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") for part in parts) or any(part in PROGRAMS for part in parts[:-1])


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]

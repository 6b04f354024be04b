"""A zip of images, the format of the EDM and ADM datasets: read like a folder, without unpacking.

photos.zip: 00000/img00000000.png  00000/img00000000.txt     any depth; the `.txt` of the same name is the caption
photos.zip: metadata.jsonl                              the same as in a folder
"""

import collections
import dataclasses
import lzma
import os
import posixpath
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from jaxdiff.core.messages import quoted, reason
from jaxdiff.data import captions
from jaxdiff.data.example import Example
from jaxdiff.data.folder import COMPANIONS, METADATA, SUFFIXES, Walk, counted, from_metadata, is_hidden

LARGEST = 1 << 30
"""Maximum uncompressed bytes of a member: a guard against zip bombs."""


# Errors of the decompressors; MemoryError for a damaged LZMA dictionary size.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, MemoryError),
    *(NotImplementedError, RuntimeError),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A file in a zip, with part of the interface of `Path`."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    @property
    def name(self) -> str:
        return PurePosixPath(self.info.filename).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.info.filename).suffix

    def read_bytes(self) -> bytes:
        """The content. OSError for a member that is damaged, encrypted or too large."""
        if self.info.file_size > LARGEST:
            raise OSError(f"unpacks to {self.info.file_size} bytes, of at most {LARGEST}")
        try:
            return self.archive.read(self.info)
        except _DAMAGE as error:
            raise OSError(f"damaged or encrypted in the zip ({reason(error)})") from error

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.info.filename}"


@dataclasses.dataclass(frozen=True, eq=False)
class ZipSource:
    """The images in order of their names (or of metadata.jsonl, whose captions are `listed`)."""

    path: Path
    members: tuple[Member, ...]
    captions: dict[str, Member]
    listed: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example:
        member = self.members[index]
        text = self.listed[index] if self.listed else None
        beside = self.captions.get(_stem(member.info.filename)) if text is None else None
        caption, fault = captions.clean(text if beside is None else captions.decode(beside.read_bytes()))
        return {"image": member.read_bytes(), "caption": caption, "name": str(member), "caption_fault": fault}


def is_zip(path: Path) -> bool:
    """By suffix, or by content."""
    return not path.is_dir() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def read(path: Path) -> ZipSource:
    """The images of a zip, which stays open. Warns with the counts of skipped files, as for a folder. FileNotFoundError
    if it is missing or has no image; ValueError if it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such zip") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no zip, or a damaged one ({error})") from error
    files = sorted((each for each in archive.infolist() if not each.is_dir()), key=lambda each: each.filename)
    shown = [each for each in files if not is_hidden(each.filename)]
    hidden = [each.filename for each in files if is_hidden(each.filename) and _suffix(each.filename) in SUFFIXES]
    members = tuple(Member(archive, each) for each in shown if _suffix(each.filename) in SUFFIXES)
    texts = {_stem(each.filename): Member(archive, each) for each in shown if _suffix(each.filename) == ".txt"}
    others = (suffix for each in shown if (suffix := _suffix(each.filename)) not in SUFFIXES | COMPANIONS)
    unknown = collections.Counter(suffix or "without suffix" for suffix in others)
    left_out = Walk((), tuple(hidden), tuple(unknown.most_common()), ()).left_out()
    listed: tuple[str | None, ...] = ()
    by_name = {posixpath.normpath(each.filename): Member(archive, each) for each in files}
    if METADATA in by_name:
        members, listed, left_out = _from_metadata(by_name[METADATA], by_name, members)
    nested = [each.filename for each in shown if each.filename.endswith(f"/{METADATA}")]
    if nested and not listed:
        left_out.append(counted(nested, f"{METADATA} below the top|{METADATA} files below the top"))
    for line in left_out:
        warnings.warn(f"{path}: left out {line}", stacklevel=2)
    if not members:
        raise FileNotFoundError(f"{path}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return ZipSource(path, members, texts, listed)


def _from_metadata(
    metadata: Member, files: Mapping[str, Member], members: tuple[Member, ...]
) -> tuple[tuple[Member, ...], tuple[str | None, ...], list[str]]:
    """The images listed in a metadata.jsonl, their captions, and lines about skipped files. ValueError if damaged."""
    try:
        content = metadata.read_bytes()
    except OSError as error:
        raise ValueError(f"{metadata}: {error}") from error
    entries = [(posixpath.normpath(name), text) for name, text in from_metadata(content, str(metadata))]
    absent = [quoted(name) for name, _ in entries if name not in files]
    names = {name for name, _ in entries}
    unlisted = sorted(each.info.filename for each in members if posixpath.normpath(each.info.filename) not in names)
    left_out = [counted(absent, f"image of {METADATA} that is not there|images of {METADATA} that are not there")]
    left_out += [counted(unlisted, f"image that {METADATA} does not list|images that {METADATA} does not list")]
    present = [(files[name], text) for name, text in entries if name in files]
    lines = [line for line, names in zip(left_out, (absent, unlisted), strict=True) if names]
    return tuple(member for member, _ in present), tuple(text for _, text in present), lines


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]

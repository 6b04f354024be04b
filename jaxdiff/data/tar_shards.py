"""Captioned images in a tar file: KEY.jpg (png, webp, …) is an image; KEY.txt is its caption, or KEY.json contains it.

In webdataset a key ends at the first dot: `7.jpg`, `7.txt` and `7.seg.png` are one example. Names such as `22.05.jpg`
and `IMG.edited.jpg` need the last dot. Both are supported: consecutive members that share a name up to the first dot
form a group, in which

    an image with a caption of the same name up to the last dot is an example         22.05.jpg, 22.05.txt
    a single image takes the caption of the first-dot name                            7.rgb.png, 7.txt
    an image without a caption beside KEY.jpg is a feature of KEY, and is not used    7.seg.png

Skipped members are reported. Faults are: an image without a caption, a caption without an image, a second image or
caption of one key and a repeated key (the first is kept), a link, a member of an unknown kind, a truncated or damaged
file. Features beside an image (`7.cls`) and hidden files are harmless.
"""

import dataclasses
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from jaxdiff.data import captions
from jaxdiff.data.fault import Fault, Raw
from jaxdiff.data.folder import SUFFIXES, is_hidden

_CAPTIONS = (".txt", ".json")  # in the order of preference
_TOGETHER = 64
"""Maximum group size: a larger group does not share a webdataset key, and would fill memory."""

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_UNUSED = Fault("member not used", harmless=True)
_HIDDEN = Fault("hidden member", harmless=True)


@dataclasses.dataclass(frozen=True)
class _Member:
    name: str
    key: str
    """the path up to the first dot of the file name"""
    stem: str
    """the path up to the last dot"""
    suffix: str
    content: bytes
    """of an image or a caption"""


Keyed = dict[str, list[_Member]]


def examples(path: str, stream: Any, caption_key: str) -> Iterator[Raw]:
    """The examples and faults of the tar file that `stream` reads (compressed or not), named `path`/MEMBER.

    caption_key: the key of the caption in a KEY.json. OSError if reading fails; damage is a fault.
    """
    try:
        with _opened(stream) as archive:
            yield from _examples(path, archive, caption_key)
    except _DAMAGE as error:
        yield path, Fault("damaged tar file", str(error)), None


def _opened(stream: Any) -> tarfile.TarFile:
    buffered = io.BufferedReader(stream, 1 << 20)
    if buffered.peek(2)[:2] == b"\x1f\x8b":  # tarfile's own reader stops after the first gzip member
        return tarfile.open(fileobj=gzip.GzipFile(fileobj=buffered), mode="r|", tarinfo=_Header, ignore_zeros=True)
    return tarfile.open(fileobj=buffered, mode="r|*", tarinfo=_Header, ignore_zeros=True)


class _Header(tarfile.TarInfo):
    """A header that raises on damage: tarfile would treat it as the end, and drop all following members.

    Use it with `ignore_zeros`, because another tar file may follow the zeros at the end (`cat`).
    """

    @classmethod
    def fromtarfile(cls, archive: Any) -> "_Header":
        place = archive.offset
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed lacks it
            archive.has_end = True
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # typeshed lacks it
            if place and not getattr(archive, "has_end", False):
                raise tarfile.ReadError(f"cut off at byte {place}: no end mark") from error
            raise
        except (tarfile.HeaderError, ValueError) as error:
            raise tarfile.ReadError(f"{error} at byte {place}") from error
        archive.has_end = False
        return header


def _examples(path: str, archive: tarfile.TarFile, caption_key: str) -> Iterator[Raw]:
    seen: set[str] = set()  # stems of examples
    for run in _runs(archive):
        if not isinstance(run, list):
            name, fault = run
            yield f"{path}/{name}".rstrip("/"), fault, None
            continue
        new = []
        for name, image, caption in _of_run(run, seen, caption_key):
            yield f"{path}/{name}", image, caption
            if not isinstance(image, Fault):
                new.append(name.rpartition(".")[0])
        seen.update(new)  # only now: a run is compared with previous runs


def _runs(archive: tarfile.TarFile) -> Iterator[list[_Member] | tuple[str, Fault]]:
    """Runs of consecutive members of one key; and (name, fault) for other members."""
    run: list[_Member] = []
    empty = True
    try:
        for header in archive:
            empty = False
            if header.isdir():
                continue
            name = header.name
            while name.startswith("./"):
                name = name[2:]
            fault = _fault(name, header)
            if fault is not None:
                yield name, fault
                continue
            member = _member(name, archive, header)
            if run and (run[-1].key != member.key or (len(run) >= _TOGETHER and run[-1].stem != member.stem)):
                yield run
                run = []
            run.append(member)
        if empty:
            yield "", Fault("damaged tar file", "no members")
    except _DAMAGE:
        if run:  # members before the damage are kept: one truncated file among thousands must not stop the others
            yield run
        raise
    if run:
        yield run


def _fault(name: str, header: tarfile.TarInfo) -> Fault | None:
    if is_hidden(name):
        return _HIDDEN
    if header.islnk() or header.issym():
        return Fault("link", f"to {header.linkname}; pack what it points to: tar --dereference --hard-dereference")
    return None if header.isreg() else Fault("unknown member", "neither a file nor a folder")


def _member(name: str, archive: tarfile.TarFile, header: tarfile.TarInfo) -> _Member:
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    stem, suffix = (stem, f".{suffix.lower()}") if dot else (base, "")
    used = suffix in SUFFIXES or suffix in _CAPTIONS
    file = archive.extractfile(header) if used else None
    content = file.read() if file is not None else b""
    if file is not None and len(content) != header.size:
        raise tarfile.ReadError(f"cut off in {name}")
    return _Member(name, f"{folder}{slash}{base.partition('.')[0]}", f"{folder}{slash}{stem}", suffix, content)


def _of_run(run: list[_Member], seen: set[str], caption_key: str) -> Iterator[Raw]:
    """Member names with their image or fault, and caption."""
    key, stems = run[0].key, _by_stem(run)
    images = [member for member in run if member.suffix in SUFFIXES]
    has_main = any(image.stem == key for image in images)
    lone = images[0].stem if len(images) == 1 else key
    # A single image without a caption takes the key's caption.
    shared = [] if lone == key or _caption(stems[lone], caption_key) else stems.get(key, [])
    for stem, members in stems.items():
        own = [member for member in members if member.suffix in SUFFIXES]
        texts = [member for member in members if member.suffix in _CAPTIONS]
        feature = has_main and stem != key
        if stem in seen and (own or texts):
            fault = Fault("repeated key", "the first is kept; the members of one example must lie side by side")
            yield from ((member.name, fault, None) for member in own or texts[:1])
        elif own:
            caption = _caption(texts, caption_key) or _caption(shared, caption_key)
            if feature and caption is None:
                yield from ((member.name, _UNUSED, None) for member in members)
                continue
            yield own[0].name, own[0].content, caption
            yield from _further(own, texts)
        elif texts and feature:
            yield from ((member.name, _UNUSED, None) for member in texts)
        elif texts and members is not shared:
            yield texts[0].name, Fault("no image"), None
        others = [member for member in members if member.suffix not in SUFFIXES and member.suffix not in _CAPTIONS]
        unknown = _UNUSED if images or stem in seen else Fault("unknown member", "neither an image nor a caption")
        yield from ((member.name, unknown, None) for member in others)


def _further(images: list[_Member], texts: list[_Member]) -> Iterator[Raw]:
    """The faults of an example with several images, or several captions of one suffix."""
    names = {images[0].name}
    for image in images[1:]:
        kind = "repeated key" if image.name in names else "second image of a key"
        names.add(image.name)
        yield image.name, Fault(kind, f"{images[0].name} is kept"), None
    for suffix in _CAPTIONS:
        of_kind = [text for text in texts if text.suffix == suffix]
        for text in of_kind[1:]:
            yield text.name, Fault("second caption of a key", f"{of_kind[0].name} is kept"), None


def _by_stem(run: list[_Member]) -> Keyed:
    stems: Keyed = {}
    for member in run:
        stems.setdefault(member.stem, []).append(member)
    return stems


def _caption(members: list[_Member], key: str) -> str | None:
    """The first non-blank text, else the caption of the first JSON that has one."""
    for suffix in _CAPTIONS:
        for member in members:
            if member.suffix == suffix:
                text = captions.decode(member.content) if suffix == ".txt" else _caption_in(member.content, key)
                if captions.present(text) is not None:
                    return text
    return None


def _caption_in(content: bytes, key: str) -> str | None:
    try:
        value = captions.from_json(content)
    except ValueError:
        return None
    value = value.get(key) if isinstance(value, dict) else value
    return value if isinstance(value, str) else None

"""Captioned images in ArrayRecord, written by convert.py, with random access for training.

A folder holds `*.array_record` files and `dataset.json`, which lists them in order. A record is a 4-byte length, that
many bytes of JSON ({"caption": …, "name": …}) and the image's own bytes, untouched.
"""

import dataclasses
import functools
import json
import struct
from pathlib import Path
from typing import Any

from jaxdiff.core.json_files import parse_object, read_object
from jaxdiff.core.messages import quoted, reason
from jaxdiff.data.example import Example
from jaxdiff.data.parts import Parts, check_parts

INDEX = "dataset.json"
_LARGEST_INDEX = 2**30  # a few hundred bytes per file, for up to a million files


def pack(image: bytes, caption: str | None, name: str) -> bytes:
    """One example as the bytes of a record."""
    text = json.dumps({"caption": caption, "name": name}, ensure_ascii=False)
    header = text.encode("utf-8", "backslashreplace")  # file names may contain undecodable bytes
    return struct.pack("<I", len(header)) + header + image


def unpack(record: bytes) -> Example:
    """The inverse of `pack`. struct.error or ValueError for other bytes."""
    (length,) = struct.unpack_from("<I", record)
    header = parse_object(record[4 : 4 + length], "the header", "a name and a caption", len(record))
    caption, name = header.get("caption"), header.get("name")
    if not isinstance(caption, str | None) or not isinstance(name, str):
        raise ValueError(f"the header has the caption {quoted(caption)} and the name {quoted(name)}")
    return {"image": record[4 + length :], "caption": caption, "name": name}


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """The examples of a converted dataset: `sizes` of them in each of the files `shards`.

    A damaged record raises DamagedRecordError (an OSError, as for an image that cannot be opened).
    """

    path: Path
    shards: tuple[str, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except FileNotFoundError as error:  # concerns the whole file: no single example to skip
            raise ValueError(str(error)) from error
        try:
            return unpack(record)
        except (struct.error, ValueError) as error:
            where = self._records.where(index)
            raise ValueError(f"{where}: not written by experiments.convert ({reason(error)})") from error

    def fingerprint(self) -> str:
        files = [(self.path / shard).stat() for shard in self.shards]
        kept = [(shard, file.st_size, file.st_mtime_ns) for shard, file in zip(self.shards, files, strict=True)]
        return f"records {self.path.absolute()}: {kept}"

    @functools.cached_property
    def _records(self) -> Parts:
        return Parts([self.path / shard for shard in self.shards], self.sizes)


def read(path: Path | str) -> RecordSource:
    """Open a converted dataset. FileNotFoundError if the conversion is missing or unfinished, ValueError for a file
    with an unexpected number of records."""
    path = Path(path)
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path}: no {INDEX} there; run (or finish) experiments.convert")
    try:
        sizes = _sizes(read_object(path / INDEX, "the files of a dataset", _LARGEST_INDEX))
    except ValueError as error:
        raise ValueError(f"{path / INDEX}: not written by experiments.convert ({error})") from error
    missing = [shard for shard in sizes if not (path / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {quoted(missing[0])} is listed in {INDEX} but not there; run experiments.convert again"
        )
    if not sizes:
        raise ValueError(f"{path}: no images were converted")
    check_parts([path / shard for shard in sizes], list(sizes.values()))
    return RecordSource(path, tuple(sizes), tuple(sizes.values()))


def _sizes(index: dict[str, Any]) -> dict[str, int]:
    """Images by file, for files that hold any. ValueError for an index that `convert` did not write."""
    shards = index.get("shards")
    if not isinstance(shards, list):
        raise ValueError(f"its shards are {quoted(shards)}")
    sizes = {}
    for shard in shards:
        file, images = (shard.get("file"), shard.get("images")) if isinstance(shard, dict) else (None, None)
        if not isinstance(file, str) or not is_count(images):
            raise ValueError(f"a shard is {quoted(shard)}")
        if images:
            sizes[file] = images
    return sizes


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

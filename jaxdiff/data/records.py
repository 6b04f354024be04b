"""Captioned pictures in ArrayRecord: what convert.py writes once and training reads at random.

A folder holds `*.array_record` files and `dataset.json`, which lists them in order. A record is a 4-byte length, that
many bytes of JSON ({"caption": …, "name": …}) and the picture's own bytes, untouched.
"""

import dataclasses
import functools
import json
import struct
from pathlib import Path

from array_record.python import array_record_data_source

from jaxdiff.data.example import Example

INDEX = "dataset.json"


def pack(image: bytes, caption: str | None, name: str) -> bytes:
    """One example as the bytes of a record."""
    text = json.dumps({"caption": caption, "name": name}, ensure_ascii=False)
    header = text.encode("utf-8", "backslashreplace")  # names of files may hold bytes that are no text
    return struct.pack("<I", len(header)) + header + image


def unpack(record: bytes) -> Example:
    """The example that `pack` packed."""
    (length,) = struct.unpack_from("<I", record)
    header = json.loads(record[4 : 4 + length])
    return {"image": record[4 + length :], "caption": header["caption"], "name": header["name"]}


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """The examples of a converted set."""

    path: Path
    shards: tuple[str, ...]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return unpack(self._records[index])

    @functools.cached_property
    def _records(self) -> array_record_data_source.ArrayRecordDataSource:
        return array_record_data_source.ArrayRecordDataSource([str(self.path / shard) for shard in self.shards])


def read(path: Path | str) -> RecordSource:
    """A converted set; FileNotFoundError when the conversion is not there or was not finished."""
    path = Path(path)
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path}: no {INDEX} there; run (or finish) experiments.data.convert")
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        shards = tuple(shard["file"] for shard in index["shards"] if shard["images"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / INDEX}: not written by experiments.data.convert ({error!r})") from error
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path / missing[0]}: listed in {INDEX} but not there; run experiments.data.convert again"
        )
    if not shards:
        raise ValueError(f"{path}: no pictures were converted")
    return RecordSource(path, shards)

"""Text embeddings computed once and kept beside the images: an ArrayRecord entry for each example, in its order.

A directory holds `part-00000.array_record`, … and `embeddings.json`, which says what made them. Entry i is the digest
of caption i (16 bytes) and the embeddings of its tokens without padding: float16, (tokens, width), row by row. A
missing or empty caption has no tokens. (What T5 gives has gone through a norm: float16 holds it well.)

Which parts are done is told by the files alone: each gets its name when it is whole. embeddings.json is written before
the first and once more when all are there, so that any number of processes can fill a store, each its own parts, with
no word between them, and any of them can be killed and run again.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.files import remove_leftovers, remove_leftovers_of_the_dead, write_json
from jaxdiff.data.array_records import new_records
from jaxdiff.data.parts import DamagedRecordError, Parts, damage_is_a_value_error, damaged, open_part, part_size
from jaxdiff.text.encoder import TextEmbedding

SIDECAR = "embeddings.json"
_DIGEST = 16
_SETTINGS = {"encoder", "length", "width", "count", "part", "parts", "complete"}

# Of a text encoder that masks padding: the mask is true for the first tokens of each row.
Encode = Callable[[list[str]], TextEmbedding]
# Captions, prepared, in; for each its embeddings without padding, (tokens, width), and how many tokens it could have.
EncodeRows = Callable[[Any], tuple[list[np.ndarray], int]]


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """What turns captions into embeddings without padding.

    rows: gets at most `window` captions, or what `prepare` makes of them.
    fingerprint: changes with anything that changes the embeddings; a store holds those of one encoder alone.
    prepare: what is done with a window of captions on the host first, while the window before it is encoded.
    """

    rows: EncodeRows
    fingerprint: str
    prepare: Callable[[list[str]], Any] = list
    window: int = 4096


@dataclasses.dataclass(frozen=True)
class StoreProgress:
    """Who is called while embeddings are stored.

    begun: once, with how many captions of this shard are stored already and how many it has.
    encoded: with how many more captions are, again and again.
    """

    begun: Callable[[int, int], None] = lambda stored, total: None
    encoded: Callable[[int], None] = lambda count: None


@dataclasses.dataclass(frozen=True)
class Shard:
    """Of `count` processes that fill a store together, the one that makes the parts index, index + count, …"""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: the first number must be one of 0…{self.count - 1}")


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A finished store, random access by the example's place: (text (n d) float16, mask (n,) bool, caption digest).

    Rows behind the mask are zero. Threads may share it, and it pickles. Opened by `open_embeddings`.
    """

    path: Path
    encoder: str
    length: int
    width: int
    count: int
    part: int
    parts: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        try:
            entry = self._records[index]
        except DamagedRecordError as error:  # it can be made again, so nothing is left out for it
            raise ValueError(str(error)) from error
        rows = np.frombuffer(entry, np.float16, offset=_DIGEST).reshape(-1, self.width)
        text = np.zeros((self.length, self.width), np.float16)
        text[: len(rows)] = rows
        return text, np.arange(self.length) < len(rows), entry[:_DIGEST]

    @functools.cached_property
    def _records(self) -> Parts:
        sizes = [part_size(number, self.part, self.count) for number in range(len(self.parts))]
        return Parts([self.path / part for part in self.parts], sizes)


def digest(caption: str | None) -> bytes:
    """16 bytes that tell a caption from any other; a missing one counts as empty, outer blanks do not count."""
    return hashlib.blake2b((caption or "").strip().encode(), digest_size=_DIGEST).digest()


def open_embeddings(path: Path | str, encoder: str | None = None) -> Embeddings:
    """A finished store. `encoder`, when given, is the fingerprint that the model needs; another one is a ValueError."""
    path = Path(path)
    settings = _read_sidecar(path)
    if settings is None:
        raise FileNotFoundError(f"{path}: no {SIDECAR} there; store the embeddings first (experiments.embed)")
    if not settings["complete"]:
        raise ValueError(f"{path}: only {len(_stored(path))} parts, the rest is not stored yet; run the same again")
    there = _stored(path)
    missing = [name for name in settings["parts"] if name not in there]
    if missing:
        raise FileNotFoundError(
            f"{path / missing[0]}: missing ({len(missing)} of {len(settings['parts'])} parts); run the command that "
            "stored them again: it makes those alone"
        )
    if encoder is not None and settings["encoder"] != encoder:
        raise ValueError(f"{path}: made by the text encoder {settings['encoder']}, but the model needs {encoder}")
    fields = {name: settings[name] for name in ("encoder", "length", "width", "count", "part")}
    return Embeddings(path, **fields, parts=tuple(settings["parts"]))


def store_embeddings(
    captions: Sequence[str | None],
    encode: Encode,
    path: Path | str,
    *,
    encoder: str,
    batch: int = 64,
    part: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> Embeddings:
    """`store_rows` with an encoder that pads: `batch` captions at a time, in one process.

    `progress` is called with how many captions are stored already, then with how many more are.
    """
    rows = RowEncoder(functools.partial(_without_padding, encode, batch), encoder, window=batch)
    reported = StoreProgress(lambda stored, total: progress(stored), progress)
    stored = store_rows(captions, rows, path, part=part, progress=reported)
    assert stored is not None  # one process makes all parts
    return stored


def store_rows(
    captions: Sequence[str | None],
    encoder: RowEncoder,
    path: Path | str,
    *,
    part: int = 8192,
    shard: Shard = Shard(),
    verify: bool = False,
    progress: StoreProgress = StoreProgress(),
) -> Embeddings | None:
    """Encodes every caption and stores the result under `path`.

    Parts of `part` captions are written whole (temporary name, then renamed), so a killed run loses at most one and
    the same call continues. Of several processes each gives its `shard`; the one that finds all parts there finishes
    the store, for the others None comes back. A store made by another encoder or from other captions is a ValueError:
    nothing is overwritten. Of parts that are there already the size and the last caption are checked; with `verify` all
    that they hold.

    Reading and `encoder.prepare`, `encoder.rows`, and writing go on at the same time, each a window ahead of the next;
    the embeddings of two windows are in memory.
    """
    path = Path(path)
    if not len(captions):
        raise ValueError(f"{path}: no captions to encode")
    there = _stored(path)  # before the settings, which are written before any part
    settings = _begin(path, there, encoder.fingerprint, part, len(captions))
    mine = range(shard.index, settings.part_count, shard.count)
    done = [number for number in mine if _name(number) in there]
    _check_stored(path, settings, done, captions, verify)
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers_of_the_dead(path)
    kept, total = (sum(map(settings.size, numbers)) for numbers in (done, mine))
    progress.begun(kept, total)
    todo = [number for number in mine if _name(number) not in there]
    _store_parts(path, settings, todo, _Steps(captions, encoder), progress.encoded)
    return _finish(path, settings)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What all parts of a store share; length and width are the encoder's, known when it has said something."""

    encoder: str
    length: int | None
    width: int | None
    count: int
    part: int

    @property
    def part_count(self) -> int:
        return -(-self.count // self.part)

    def size(self, number: int) -> int:
        return part_size(number, self.part, self.count)


def _begin(path: Path, there: set[str], encoder: str, part: int, count: int) -> _Settings:
    """The settings of a new store, or of the one that is there: ValueError if it is another one."""
    sidecar = _read_sidecar(path)
    if sidecar is None:
        if there:
            raise ValueError(f"{path}: holds parts, but no {SIDECAR} says what made them; use a new path")
        return _Settings(encoder, None, None, count, part)
    if sidecar["encoder"] != encoder:
        raise ValueError(f"{path}: made by the text encoder {sidecar['encoder']}, not by {encoder}; use a new path")
    if not _half_done_before_shards(sidecar):
        if count > sidecar["count"]:
            state = "complete with" if sidecar["complete"] else "begun for"
            raise ValueError(f"{path}: {state} {sidecar['count']} captions, but there are more now; use a new path")
        if count < sidecar["count"]:
            raise ValueError(
                f"{path}: caption {sidecar['count'] - 1} is not the one stored there, as there are only {count} now; "
                "use a new path for new captions"
            )
    return _Settings(encoder, sidecar["length"], sidecar["width"], count, sidecar["part"])


def _half_done_before_shards(sidecar: dict) -> bool:
    """embeddings.json used to list the parts as they were stored; the count is of those then, not of all captions."""
    return bool(sidecar["parts"]) and not sidecar["complete"]


def _check_stored(
    path: Path, settings: _Settings, numbers: list[int], captions: Sequence[str | None], verify: bool
) -> None:
    """ValueError for a part that is damaged, or made from other captions."""

    def check(number: int) -> None:
        assert settings.width is not None  # known since the first part
        file, size = path / _name(number), settings.size(number)
        reader = open_part(file, size)
        for place in range(size) if verify else (size - 1,):
            with damage_is_a_value_error(file):
                entry = reader.read([place])[0]
            position = number * settings.part + place
            if entry[:_DIGEST] != digest(captions[position]):
                raise ValueError(
                    f"{path}: caption {position} is not the one stored there; use a new path for new captions"
                )
            if (len(entry) - _DIGEST) % (2 * settings.width):
                raise damaged(file, f"record {place} is not of width {settings.width}")

    with ThreadPoolExecutor(16) as threads:
        for _ in threads.map(check, numbers):
            pass


def _store_parts(
    path: Path, settings: _Settings, todo: list[int], steps: "_Steps", encoded: Callable[[int], None]
) -> None:
    windows = {number: steps.windows(number * settings.part, settings.size(number)) for number in todo}
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as encoding:
        read = _ahead(reading, steps.read, itertools.chain.from_iterable(windows.values()))
        stream = _ahead(encoding, steps.encode, read)
        for number, own in windows.items():
            with new_records(path / _name(number), "uncompressed") as write:
                for _ in own:
                    texts, rows, length = next(stream)
                    settings = _of_shape(path, settings, rows, length)
                    for text, row in zip(texts, rows, strict=True):
                        write(digest(text) + _bytes_of(row if text else row[:0]))
                    encoded(len(texts))
                _settle(path, settings)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """From the places of a window of captions to their embeddings, in two steps that can go on at the same time."""

    captions: Sequence[str | None]
    encoder: RowEncoder

    def windows(self, first: int, size: int) -> list[range]:
        places = range(first, first + size)
        window = self.encoder.window
        return [places[start : start + window] for start in range(0, size, window)]

    def read(self, places: range) -> tuple[list[str], Any]:
        texts = [(self.captions[place] or "").strip() for place in places]
        return texts, self.encoder.prepare(texts)

    def encode(self, read: tuple[list[str], Any]) -> tuple[list[str], list[np.ndarray], int]:
        texts, prepared = read
        return texts, *self.encoder.rows(prepared)


def _ahead(thread: ThreadPoolExecutor, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
    """`function` of each argument, in order; while one result is used the next is made."""
    pending = None
    for argument in arguments:
        following = thread.submit(function, argument)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()


def _of_shape(path: Path, settings: _Settings, rows: list[np.ndarray], length: int) -> _Settings:
    shape = (length, rows[0].shape[1])
    if settings.length is not None and shape != (settings.length, settings.width):
        held = (settings.length, settings.width)
        raise ValueError(f"{path}: holds embeddings of shape {held}, the encoder gives {shape}; use a new path")
    return dataclasses.replace(settings, length=shape[0], width=shape[1])


def _bytes_of(row: np.ndarray) -> bytes:
    with np.errstate(over="ignore"):
        row = np.asarray(row, np.float16)
    if not np.isfinite(row).all():
        raise ValueError("the encoder gave values that float16 cannot hold (not finite)")
    return row.tobytes()


def _settle(path: Path, settings: _Settings) -> None:
    """Before a part gets its name: the settings are written, and are those that other processes go by."""
    ours = dataclasses.asdict(settings)
    sidecar = _read_sidecar(path)
    if sidecar is None or _half_done_before_shards(sidecar):
        write_json(path / SIDECAR, {**ours, "parts": [], "complete": False})
        sidecar = _read_sidecar(path)
    assert sidecar is not None  # written above, if not before
    other = [name for name in ours if sidecar[name] != ours[name]]
    if other:
        raise ValueError(
            f"{path}: another process stores embeddings there whose {other[0]} is {sidecar[other[0]]}, not "
            f"{ours[other[0]]}; use a new path"
        )


def _finish(path: Path, settings: _Settings) -> Embeddings | None:
    names = [_name(number) for number in range(settings.part_count)]
    if not _stored(path).issuperset(names):
        return None
    sidecar = _read_sidecar(path)
    if sidecar is not None and not sidecar["complete"]:
        write_json(path / SIDECAR, {**sidecar, "count": settings.count, "parts": names, "complete": True})
    remove_leftovers(path)
    return open_embeddings(path, settings.encoder)


def _name(number: int) -> str:
    return f"part-{number:05d}.array_record"


def _stored(path: Path) -> set[str]:
    """The names of the parts that are there."""
    return {name for name in os.listdir(path) if _PART.fullmatch(name)} if path.is_dir() else set()


_PART = re.compile(r"part-\d{5,}\.array_record")


def _without_padding(encode: Encode, batch: int, captions: list[str]) -> tuple[list[np.ndarray], int]:
    """Padded to a full batch, so that a compiled encoder sees one shape."""
    encoded = encode(captions + [""] * (batch - len(captions)))
    with np.errstate(over="ignore"):  # what is not finite is found later
        text = np.asarray(encoded.tokens, np.float16)[: len(captions)]
    mask = np.asarray(encoded.mask, bool)[: len(captions)]
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("the encoder's mask has holes: only padding behind the tokens can be left out")
    return [row[:kept] for row, kept in zip(text, mask.sum(1))], text.shape[1]


def _read_sidecar(path: Path) -> dict | None:
    file = path / SIDECAR
    if not file.is_file():
        return None
    settings = json_files.read_object(file)
    if not settings.keys() >= _SETTINGS:
        raise ValueError(f"{file}: not the settings of stored embeddings")
    return settings

"""Stored text embeddings: one ArrayRecord entry per example, in the order of the dataset.

A directory holds `part-00000.array_record`, … and `embeddings.json`, which identifies the encoder. Entry i is the
digest of caption i (16 bytes) and its token embeddings without padding: float16, (tokens, width), row by row. A missing
or empty caption has no tokens. (T5's output is normalised, so float16 is precise enough.)

A part file that exists is complete, because it is renamed into place. embeddings.json is written before the first part
and again after the last, so that any number of processes can fill a store without communicating, each with its own
parts, and any of them can be killed and run again.
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

# A text encoder that masks padding: the mask is True for the first tokens of each row.
Encode = Callable[[list[str]], TextEmbedding]
# Prepared captions → the embeddings of each without padding, (tokens, width), and the maximum number of tokens.
EncodeRows = Callable[[Any], tuple[list[np.ndarray], int]]


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """Turns captions into embeddings without padding.

    rows: encodes at most `window` captions, as returned by `prepare`.
    fingerprint: changes with anything that changes the embeddings; a store belongs to one encoder.
    prepare: host-side preprocessing of a window of captions, run while the previous window is encoded.
    """

    rows: EncodeRows
    fingerprint: str
    prepare: Callable[[list[str]], Any] = list
    window: int = 4096


@dataclasses.dataclass(frozen=True)
class StoreProgress:
    """Callbacks while embeddings are stored.

    begun: called once with the number of captions of this shard that are already stored, and their total.
    encoded: called repeatedly with the number of captions stored since.
    """

    begun: Callable[[int, int], None] = lambda stored, total: None
    encoded: Callable[[int], None] = lambda count: None


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` processes that fill a store: it writes the parts index, index + count, …"""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: the first number must be one of 0…{self.count - 1}")


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A complete store with random access by example: (text (n d) float16, mask (n,) bool, caption digest).

    Masked rows are zero. Thread-safe and picklable. Opened by `open_embeddings`.
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
        except DamagedRecordError as error:  # it can be recomputed, so no example is skipped
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
    """A 16-byte hash of a caption without outer whitespace; a missing caption counts as empty."""
    return hashlib.blake2b((caption or "").strip().encode(), digest_size=_DIGEST).digest()


def open_embeddings(path: Path | str, encoder: str | None = None) -> Embeddings:
    """Open a complete store. encoder: the fingerprint that the model needs; ValueError if it differs."""
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
    """`store_rows` for an encoder that pads: `batch` captions at a time, in one process.

    progress: called with the number of captions that are already stored, then with the number stored since.
    """
    rows = RowEncoder(functools.partial(_without_padding, encode, batch), encoder, window=batch)
    reported = StoreProgress(lambda stored, total: progress(stored), progress)
    stored = store_rows(captions, rows, path, part=part, progress=reported)
    assert stored is not None  # one process writes all parts
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
    """Encode every caption and store the embeddings under `path`.

    Parts of `part` captions are written atomically, so a killed run loses at most one part and the same call resumes.
    Each process passes its `shard`; the process that completes the last part finishes the store, the others return
    None. ValueError if the store belongs to another encoder or other captions; nothing is overwritten. Existing parts
    are checked by size and last caption, or fully with `verify`.

    Reading with `encoder.prepare`, `encoder.rows`, and writing overlap, each one window ahead of the next; the
    embeddings of two windows are held in memory.
    """
    path = Path(path)
    if not len(captions):
        raise ValueError(f"{path}: no captions to encode")
    there = _stored(path)  # before the settings, which are written before any part is
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
    """Settings common to all parts of a store; length and width are None until the encoder has run."""

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
    """The settings of a new or an existing store. ValueError if the existing one does not match."""
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
    """An older format: embeddings.json listed the parts written so far, and `count` covered only those."""
    return bool(sidecar["parts"]) and not sidecar["complete"]


def _check_stored(
    path: Path, settings: _Settings, numbers: list[int], captions: Sequence[str | None], verify: bool
) -> None:
    """ValueError for a part that is damaged or has other captions."""

    def check(number: int) -> None:
        assert settings.width is not None  # known after the first part
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
    """Two pipelined steps from the indices of a window of captions to their embeddings."""

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
    """`function` of each argument, in order; the next result is computed while one is used."""
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
    """Called before a part is renamed: write the settings, and check them against other processes'."""
    ours = dataclasses.asdict(settings)
    sidecar = _read_sidecar(path)
    if sidecar is None or _half_done_before_shards(sidecar):
        write_json(path / SIDECAR, {**ours, "parts": [], "complete": False})
        sidecar = _read_sidecar(path)
    assert sidecar is not None  # written above or earlier
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
    """The names of the existing parts."""
    return {name for name in os.listdir(path) if _PART.fullmatch(name)} if path.is_dir() else set()


_PART = re.compile(r"part-\d{5,}\.array_record")


def _without_padding(encode: Encode, batch: int, captions: list[str]) -> tuple[list[np.ndarray], int]:
    """Pad to a full batch, so that the compiled encoder sees one shape."""
    encoded = encode(captions + [""] * (batch - len(captions)))
    with np.errstate(over="ignore"):  # non-finite values are detected later
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

"""Text embeddings computed once and kept beside the pictures: an ArrayRecord entry for each example, in its order.

A directory holds `part-00000.array_record`, … and `embeddings.json`, which says what made them. Entry i is the digest
of caption i (16 bytes) and the embeddings of its tokens without padding: float16, (tokens, width), row by row. A
missing or empty caption has no tokens.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from array_record.python import array_record_data_source

from jaxdiff.data.files import new_records, remove_leftovers, write_json
from jaxdiff.text.t5 import TextEncoder

SIDECAR = "embeddings.json"
_DIGEST = 16
_SETTINGS = {"encoder", "length", "width", "count", "part", "parts", "complete"}

# Captions in; embeddings (b n d) and mask (b n) out, the mask true for the first tokens of each row.
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A finished store, random access by the example's place: (text (n d) float16, mask (n,) bool, caption digest).

    Rows behind the mask are zero. Opened by `open_embeddings`.
    """

    path: Path
    encoder: str
    length: int
    width: int
    count: int
    parts: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        entry = self._records[index]
        rows = np.frombuffer(entry, np.float16, offset=_DIGEST).reshape(-1, self.width)
        text = np.zeros((self.length, self.width), np.float16)
        text[: len(rows)] = rows
        return text, np.arange(self.length) < len(rows), entry[:_DIGEST]

    @functools.cached_property
    def _records(self) -> array_record_data_source.ArrayRecordDataSource:
        return array_record_data_source.ArrayRecordDataSource([str(self.path / part) for part in self.parts])


def digest(caption: str | None) -> bytes:
    """16 bytes that tell a caption from any other; a missing one counts as empty, outer blanks do not count."""
    return hashlib.blake2b((caption or "").strip().encode(), digest_size=_DIGEST).digest()


def fingerprint(encoder: TextEncoder) -> str:
    """16 hexadecimal digits that change with anything that changes an encoder's embeddings: settings, vocabulary,
    parameters, tokens per caption, what is done with a caption before.
    """
    # What only the decoder or the memory plan depends on is left out: an exported encoder is the same encoder.
    config = dataclasses.replace(encoder.config, decoder_layers=0, tied=False, scale_logits=False, remat=False)
    told = hashlib.blake2b(repr((config, encoder.length)).encode(), digest_size=8)
    if encoder.whole or encoder.prepare is not str:
        told.update(f"{encoder.whole} {encoder.prepare.__qualname__}".encode())
    told.update(json.dumps(sorted(encoder.tokenizer.get_vocab().items())).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(encoder.params)[0]:
        values = np.ascontiguousarray(leaf)
        told.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        told.update(values.reshape(-1).view(np.uint8))
    return told.hexdigest()


def open_embeddings(path: Path | str, encoder: str | None = None) -> Embeddings:
    """A finished store. `encoder`, when given, is the fingerprint that the model needs; another one is a ValueError."""
    path = Path(path)
    settings = _read_sidecar(path)
    if settings is None:
        raise FileNotFoundError(f"{path}: no {SIDECAR} there; store the embeddings first (experiments.data.embed)")
    missing = [name for name in settings["parts"] if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path / missing[0]}: missing ({len(missing)} of {len(settings['parts'])} parts)")
    if not settings["complete"]:
        raise ValueError(f"{path}: only {settings['count']} embeddings, the rest is not stored yet; run the same again")
    if encoder is not None and settings["encoder"] != encoder:
        raise ValueError(f"{path}: made by the text encoder {settings['encoder']}, but the model needs {encoder}")
    fields = {name: settings[name] for name in ("encoder", "length", "width", "count")}
    return Embeddings(path, **fields, parts=tuple(settings["parts"]))


def store_embeddings(
    captions: Iterable[str | None],
    encode: Encode,
    path: Path | str,
    *,
    encoder: str,
    batch: int = 64,
    part: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> Embeddings:
    """Encodes every caption, in order, and stores the result under `path`. `encoder` is the encoder's fingerprint.

    Parts of `part` captions are written whole (temporary name, then renamed), so a killed run loses at most one and
    the same call continues. A store made by another encoder, or from other captions, is a ValueError: nothing is
    overwritten. `progress` is told how many captions were done, as they are.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = _read_sidecar(path) or {
        "encoder": encoder,
        "length": None,
        "width": None,
        "count": 0,
        "part": part,
        "parts": [],
        "complete": False,
    }
    _check_same_encoder(path, state, encoder)
    stream = iter(captions)
    _skip_stored(path, state, stream, progress)
    while chunk := list(itertools.islice(stream, state["part"])):
        if state["complete"]:
            raise ValueError(f"{path}: complete with {state['count']} captions, but there are more now; use a new path")
        name = f"part-{len(state['parts']):05d}.array_record"
        state |= _write_part(path / name, chunk, encode, state, batch, progress)
        state |= {"parts": [*state["parts"], name], "count": state["count"] + len(chunk)}
        write_json(path / SIDECAR, state)
    if not state["count"]:
        raise ValueError(f"{path}: no captions to encode")
    write_json(path / SIDECAR, {**state, "complete": True})
    remove_leftovers(path)
    return open_embeddings(path, encoder)


def _write_part(
    file: Path, captions: list[str | None], encode: Encode, state: dict, batch: int, progress: Callable[[int], None]
) -> dict:
    """Writes one part and returns the length and width that the encoder gave."""
    shape = (state["length"], state["width"])
    with new_records(file) as write:
        for start in range(0, len(captions), batch):
            chunk = captions[start : start + batch]
            text, mask = _encode(encode, chunk, batch)
            if None not in shape and text.shape[1:] != shape:
                raise ValueError(
                    f"{file.parent}: holds embeddings of shape {shape}, the encoder gives {text.shape[1:]}"
                )
            shape = text.shape[1:]
            for caption, rows, kept in zip(chunk, text, mask):
                write(digest(caption) + rows[: kept.sum()].tobytes())
            progress(len(chunk))
    return {"length": int(shape[0]), "width": int(shape[1])}


def _encode(encode: Encode, captions: Sequence[str | None], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded to a full batch, so that a compiled encoder sees one shape; checked before anything is written."""
    filled = [(caption or "").strip() for caption in captions]
    text, mask = encode(filled + [""] * (batch - len(filled)))
    text, mask = np.asarray(text, np.float16)[: len(filled)], np.asarray(mask, bool)[: len(filled)]
    mask = mask & (np.array([bool(caption) for caption in filled])[:, None])
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("the encoder's mask has holes: only padding behind the tokens can be left out")
    if not np.isfinite(text[mask]).all():
        raise ValueError("the encoder gave values that float16 cannot hold (not finite)")
    return text, mask


def _skip_stored(path: Path, state: dict, stream: Iterator, progress: Callable[[int], None]) -> None:
    """Moves past the captions that are stored already; the digest of each part's last one must still fit."""
    for number, name in enumerate(state["parts"]):
        chunk = list(itertools.islice(stream, state["part"]))
        records = array_record_data_source.ArrayRecordDataSource([str(path / name)])
        stored = len(records)
        last = records[stored - 1][:_DIGEST]
        if len(chunk) < stored or digest(chunk[stored - 1]) != last:
            position = number * state["part"] + stored - 1
            raise ValueError(f"{path}: caption {position} is not the one stored there; use a new path for new captions")
        if len(chunk) > stored:  # only the last part of a complete store is short
            raise ValueError(f"{path}: complete with {state['count']} captions, but there are more now; use a new path")
        progress(len(chunk))


def _check_same_encoder(path: Path, state: dict, encoder: str) -> None:
    if state["encoder"] != encoder:
        raise ValueError(f"{path}: made by the text encoder {state['encoder']}, not by {encoder}; use a new path")


def _read_sidecar(path: Path) -> dict | None:
    file = path / SIDECAR
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(settings, dict) or not settings.keys() >= _SETTINGS:
        raise ValueError(f"{file}: not the settings of stored embeddings")
    return settings

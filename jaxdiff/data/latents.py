"""Latents or codes of all images of a source, encoded once and stored, for models of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped

from jaxdiff.core.files import replacing
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import DataConfig, image_batches

BATCH = 64
"""Images per call of the encoder."""
Encode = Callable[[Float[np.ndarray, "b h w 3"]], Shaped[np.ndarray, "b h2 w2 ..."]]


def stored_latents(
    source: Source,
    side: int,
    encode: Encode,
    folder: Path,
    fingerprint: str,
    progress: Callable[[int], object] = lambda images: None,
    dtype: type = np.float16,
) -> Shaped[np.ndarray, "n h w ..."]:
    """The latents (n h w c) or codes (n h w) of the images of a source, at `side` pixels, read from a file in `folder`
    where they are needed.

    They are computed if the file is missing. Its name has the number of images, a digest of 64 of them and of the
    source's own fingerprint, if it has one, and `fingerprint`, which identifies the encoder. encode: of `BATCH` images
    at a time. progress: called with the number of images of each batch. OSError if writing fails; nothing half-written
    remains.
    """
    shown = next(image_batches(spread(source, min(BATCH, len(source))), _in_order(side)))["image"]
    digest = hashlib.blake2b(np.ascontiguousarray(shown).tobytes(), digest_size=8)
    stated = getattr(source, "fingerprint", lambda: None)()
    digest.update(str(stated).encode())
    path = (
        folder
        / f"{len(source)}-{side}-{digest.hexdigest()}-{''.join(c if c.isalnum() else '-' for c in fingerprint)}.npy"
    )
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _store(source, side, encode, temporary, progress, dtype)
    return np.load(path, mmap_mode="r")


def _in_order(side: int) -> DataConfig:
    return DataConfig(side, BATCH, captions=True, caption_optional=True, shuffle=False, repeat=False)


def _store(
    source: Source, side: int, encode: Encode, path: Path, progress: Callable[[int], object], dtype: type
) -> None:
    latents = None
    for batch in image_batches(source, _in_order(side)):
        image = batch["image"]
        padded = np.pad(image, ((0, BATCH - len(image)), (0, 0), (0, 0), (0, 0)))  # so that one program suffices
        rows: np.ndarray = np.asarray(encode(padded)).astype(dtype)[: len(image)]
        if latents is None:
            latents = np.lib.format.open_memmap(path, "w+", dtype, (len(source), *rows.shape[1:]))
        latents[batch["index"]] = rows
        progress(len(image))
    if latents is None:
        raise ValueError(f"{source}: no image can be read")
    latents.flush()


@runtime_checkable
class Stream(Protocol):
    """A stream of batches whose state can be saved, such as `pipeline.Batches`."""

    skipped: Any
    buckets: Any
    varying_shapes: Any

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict: ...

    def set_state(self, state: dict) -> None: ...


class ExtendedBatches:
    """The batches of a stream with further entries. entries: of a batch, computed on the host."""

    def __init__(self, stream: Stream, entries: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]):
        self._stream, self._entries = stream, entries
        self.skipped, self.buckets, self.varying_shapes = stream.skipped, stream.buckets, stream.varying_shapes

    def __iter__(self) -> "ExtendedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._stream)
        return batch | self._entries(batch)

    def get_state(self) -> dict:
        return self._stream.get_state()

    def set_state(self, state: dict) -> None:
        self._stream.set_state(state)


class IndexedBatches(ExtendedBatches):
    """Batches with further entries that are found by `index` or `caption`, which only the host has. stream: batches
    with `captions`."""

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in super().__next__().items() if name not in ("index", "caption")}


class LatentBatches(IndexedBatches):
    """Batches with the stored latents (float32) or codes (int32) of their images as `image`."""

    def __init__(self, stream: Stream, latents: Shaped[np.ndarray, "n h w ..."]):
        dtype = np.float32 if np.issubdtype(latents.dtype, np.floating) else np.int32
        super().__init__(stream, lambda batch: {"image": latents[batch["index"]].astype(dtype)})

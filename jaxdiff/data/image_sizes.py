"""Heights and widths of all images of a source, read once from their headers, for aspect-ratio buckets."""

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxdiff.core.files import replacing
from jaxdiff.core.messages import reason
from jaxdiff.data import images
from jaxdiff.data.example import Source, fingerprint_of, open_image

_RUN = 64
"""Neighbouring images read by one thread, for locality."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSizes:
    """(height, width) of each image, after orientation; (0, 0) if unreadable, with its name and the reason in `faults`,
    in order."""

    sizes: Int32[np.ndarray, "n 2"]
    faults: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)


def read_sizes(
    source: Source,
    cache: Path | str | None = None,
    *,
    threads: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> ImageSizes:
    """The sizes of all images, from headers only. An unreadable header does not affect other images.

    cache: a folder for the result, used for sources with a fingerprint (folders, converted datasets, Parquet files, and
    mixtures of those); sizes are read again when the files change. progress: called with the number read since. OSError
    if the cache cannot be written, ValueError for an empty source.
    """
    if not len(source):
        raise ValueError(f"{source}: no examples")
    file = _kept(source, cache)
    if file is not None and file.is_file():
        with suppress(ValueError, EOFError, OSError):  # not a valid cache file: read again
            sizes = np.load(file)
            if sizes.shape == (len(source), 2) and sizes.dtype == np.int32:
                progress(len(source))
                return ImageSizes(sizes, tuple(_fault(source, int(i)) for i in np.flatnonzero(sizes[:, 0] == 0)))
    sizes, faults = np.zeros((len(source), 2), np.int32), {}

    def read(first: int) -> int:
        last = min(first + _RUN, len(source))
        for index in range(first, last):
            try:
                sizes[index] = _size(source, index)
            except (OSError, images.Unreadable) as error:
                faults[index] = _named(source, index), reason(error)
        return last - first

    with ThreadPoolExecutor(threads) as pool:
        for count in pool.map(read, range(0, len(source), _RUN)):
            progress(count)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, sizes)
    return ImageSizes(sizes, tuple(faults[index] for index in sorted(faults)))


def _kept(source: Source, cache: Path | str | None) -> Path | None:
    fingerprint = None if cache is None else fingerprint_of(source)
    if cache is None or fingerprint is None:
        return None
    digest = hashlib.blake2b(fingerprint.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
    return Path(cache) / f"image-sizes-{digest}.npy"


def _size(source: Source, index: int) -> tuple[int, int]:
    """(height, width). OSError or `Unreadable` if it cannot be determined."""
    image = open_image(source, index)
    with nullcontext() if isinstance(image, bytes | np.ndarray) else closing(image):
        height, width = images.upright_size(image)
    if height < 1 or width < 1:
        raise images.Unreadable(f"an image of {height} × {width} pixels")
    return height, width


def _fault(source: Source, index: int) -> tuple[str, str]:
    try:
        _size(source, index)
    except (OSError, images.Unreadable) as error:
        return _named(source, index), reason(error)
    return _named(source, index), "could not be read when the sizes were stored"


def _named(source: Source, index: int) -> str:
    try:
        return source[index]["name"]
    except OSError:
        return f"example {index}"

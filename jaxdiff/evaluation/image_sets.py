"""Image datasets for metrics: from a source, a folder or a zip, with optional captions."""

import dataclasses
import functools
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdiff.core.messages import reason
from jaxdiff.data import folder, images, png_metadata, zipped
from jaxdiff.data.example import Source, caption_of
from jaxdiff.evaluation.resize import Fit

CROP_THEM = "--fit crop takes the centred square of each, at one size"
GRID = re.compile(r"grid(-\d+)?\.png")
"""The names of grids that experiments.sample writes."""


@runtime_checkable
class ImageSet(Protocol):
    """Images (uint8, all of one size) with captions (None: missing). fit: whole images or centred squares."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def fit(self) -> Fit: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def caption(self, index: int) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """The first `count` images of a source, uncropped. Reading a grayscale or transparent image raises ValueError
    unless `convert`."""

    name: str
    source: Source
    count: int
    convert: bool = False
    fit = Fit.SQUEEZE

    @functools.cached_property
    def format(self) -> str:
        """The file format, from the first image."""
        first = self.source[0]["image"]
        try:
            if isinstance(first, np.ndarray):
                return "pixels"
            return (Image.open(io.BytesIO(first)).format or "unknown").lower()
        except (OSError, Image.DecompressionBombError):
            return "unknown"

    def __len__(self) -> int:
        return min(self.count, len(self.source)) if self.count else len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return strictly(self.source[index]["image"], f"{self.name}: image {index}", self.convert)

    def caption(self, index: int) -> str | None:
        return caption_of(self.source[index])


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files of a folder or a zip; unreadable files were excluded when it was opened."""

    name: str
    files: tuple[Path | zipped.Member, ...]
    captions: tuple[str | None, ...]
    format: str
    shortest: int = 0
    """The shortest side of all images, in pixels."""
    fit = Fit.SQUEEZE

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return images.decode(self.files[index].read_bytes())

    def caption(self, index: int) -> str | None:
        return self.captions[index]


@dataclasses.dataclass(frozen=True)
class CroppedImages:
    """The centred squares of a dataset's images at `side` pixels, as in training."""

    shown: ImageSet
    side: int
    fit = Fit.CROP

    @property
    def name(self) -> str:
        return self.shown.name

    @property
    def format(self) -> str:
        return self.shown.format

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> np.ndarray:
        return images.resize(self.shown[index], self.side)

    def caption(self, index: int) -> str | None:
        return self.shown.caption(index)


def strictly(image: bytes | np.ndarray, name: str, convert: bool) -> np.ndarray:
    """Decode an image (h w 3). ValueError, unless `convert`, if it is neither RGB nor opaque RGBA; `images.Unreadable`
    if it is damaged."""
    decoded = images.decode(image)
    if convert:
        return decoded
    with Image.open(io.BytesIO(image)) if isinstance(image, bytes) else _from_array(image) as opened:
        transparent, mode = images.has_transparency(opened), opened.mode
    if mode not in ("RGB", "RGBA") or transparent:
        what = "transparent" if transparent else f"not RGB but {mode}"
        raise ValueError(f"{name}: {what}; --convert turns such images into RGB, on white")
    return decoded


def _from_array(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)


def open_folder(path: Path, convert: bool = False, count: int = 0, fit: Fit = Fit.SQUEEZE) -> ImageFiles:
    """The first `count` images of a folder or zip (0: all). Captions are read as in training data (`.txt`,
    metadata.jsonl), or from our own PNG metadata, never from the text of other programs. The grids `grid.png`,
    `grid-2.png`, … of experiments.sample are excluded.

    Warns of unreadable and excluded files with their count and names. FileNotFoundError for a folder without images;
    ValueError for grayscale or transparent images unless `convert`, and for images of several sizes unless they are
    cropped to one.
    """
    sizes: dict[tuple[int, int], str] = {}
    files, captions, unreadable = [], [], []
    source, entries = _entries(path)
    for number, (name, file) in enumerate(tqdm(entries[: count or None], desc="check files", unit="file")):
        if GRID.fullmatch(name):
            warnings.warn(f"{file}: left out, as a grid of experiments.sample", stacklevel=2)
            continue
        try:
            example = source[number]
            caption_of(example)  # warns of replaced characters
            height, width, _ = strictly(example["image"], str(file), convert).shape
        except (images.Unreadable, OSError) as error:
            unreadable.append(f"{name} ({reason(error)})")
            continue
        sizes.setdefault((width, height), name)
        files.append(file)
        captions.append(example["caption"] or _own_caption(file, example["image"]))
    warn_of(str(path), unreadable)
    if not files:
        raise FileNotFoundError(f"{path}: no images that can be read")
    if len(sizes) > 1 and fit is Fit.SQUEEZE:
        (a, first), (b, second), *_ = sizes.items()
        such = f"{a[0]}x{a[1]} ({first}) and {b[0]}x{b[1]} ({second})"
        raise ValueError(f"{path}: images of {len(sizes)} sizes, such as {such}; {CROP_THEM}")
    suffixes = sorted({file.suffix.lower().lstrip(".") for file in files})
    shortest = min(map(min, sizes))
    return ImageFiles(str(path), tuple(files), tuple(captions), "+".join(suffixes), shortest)


def _entries(path: Path) -> tuple[Source, list[tuple[str, Path | zipped.Member]]]:
    """A folder or zip as a source, and its image files by name."""
    if not zipped.is_zip(path):
        files = folder.read(path)
        return files, [(name, path / name) for name, _ in files.entries]
    members = zipped.read(path)
    return members, [(member.info.filename, member) for member in members.members]


def warn_of(name: str, unreadable: list[str]) -> None:
    """One warning with the number of unreadable images and the first names."""
    if unreadable:
        more = ", …" if len(unreadable) > 5 else ""
        named = ", ".join(unreadable[:5]) + more
        warnings.warn(f"{name}: {len(unreadable)} unreadable, left out: {named}", stacklevel=3)


def captions_of(shown: ImageSet) -> Iterator[str | None]:
    return (shown.caption(i) for i in range(len(shown)))


def without_captions(captions: Sequence[str | None]) -> str:
    """A message with the number of images without a caption and how to add them; empty if all have one."""
    count = sum(caption is None for caption in captions)
    advice = "put a NAME.txt beside each, or a metadata.jsonl into the folder (of the text in PNGs ours alone is read)"
    return f"{count} of {len(captions)} images have no caption: {advice}" if count else ""


def _own_caption(file: Path | zipped.Member, image: bytes | np.ndarray) -> str | None:
    """The prompt in our PNG metadata; None if there is none, or if the image was sampled without text."""
    if isinstance(image, np.ndarray):
        return None
    try:
        metadata = png_metadata.read(image)
    except ValueError as error:
        warnings.warn(f"{file}: no caption, {error}", stacklevel=3)
        return None
    return (metadata.prompt.strip() or None) if metadata is not None else None

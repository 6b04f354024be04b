"""What scripts that judge pictures share: the networks, one pass of all of them over a set, sets of pictures."""

import dataclasses
import functools
import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from experiments.imagen import png_metadata
from jaxdiff.core.files import replacing
from jaxdiff.core.messages import reason
from jaxdiff.data import folder, images, zipped
from jaxdiff.data.example import Source, caption_of
from jaxdiff.evaluation import features
from jaxdiff.evaluation.features import Extractor, extract
from jaxdiff.evaluation.metrics import Observed, observed
from jaxdiff.evaluation.resize import Fit, Resize
from jaxdiff.evaluation.statistics import Origin
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import classifier, clip, inception
from jaxdiff.weights.imagen import SHIPPED

PART = 256
"""Pictures between two savings of what the networks saw."""


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that judge."""

    inception: Path | None = None
    """FID's Inception, of experiments.inception: without it there is no FID, KID and IS of that name."""
    clip: str | None = str(SHIPPED / "clip")
    """A CLIP: OUT/model of experiments.clip.train, or a directory or hub id in the transformers layout. Left out: the
    shipped one of `shapes`."""
    classifier: Path | None = SHIPPED / "classifier"
    """A classifier of experiments.classifier, for FD-<its name>. Left out: the shipped one of `shapes`."""
    resize: Literal["clean", "legacy", "pytorch"] = "clean"
    """How pictures come to Inception's size: antialiased bicubic (clean-fid), TensorFlow 1's bilinear, as published
    figures, or PyTorch's bilinear (pytorch-fid)."""
    dims: Literal[64, 192, 768, 2048] = 2048
    """Of Inception: FID is that of 2048 features; those of earlier layers, as pytorch-fid taps them, want fewer
    pictures and give numbers of another name."""
    prefix: str = ""
    """Stands before each caption for the CLIP score: the paper's code has "A photo depicts". Left out, none: Imagen's
    and Stable Diffusion's curves have none, and the shipped CLIP knows the words of `shapes` alone."""

    @property
    def before(self) -> str:
        """The prefix, with a blank behind it."""
        return self.prefix if not self.prefix or self.prefix.endswith(" ") else f"{self.prefix} "


class Bench(NamedTuple):
    """Judges, loaded; `text` embeds captions for `clip`."""

    inception: Extractor | None
    classifier: Extractor | None
    clip: Extractor | None
    text: TextEncoder | None

    @property
    def extractors(self) -> tuple[Extractor, ...]:
        return tuple(each for each in (self.inception, self.classifier, self.clip) if each is not None)


def loaded(judges: Judges) -> Bench:
    """FileNotFoundError, or ValueError, for weights that are not there or none."""
    seeing, classifying, image, text = None, None, None, None
    if judges.inception is not None:
        seeing = features.inception(inception.load(judges.inception), Resize(judges.resize), judges.dims)
    if judges.classifier is not None:
        classifying = features.classifier(*classifier.load(judges.classifier))
    if judges.clip is not None:
        text = clip.load_text_encoder(judges.clip)
        image = features.clip_image(*clip.load_image(judges.clip))
    bench = Bench(seeing, classifying, image, text)
    if not bench.extractors:
        raise ValueError("no judges: name --inception, --clip or --classifier")
    return bench


def embedded(encoder: TextEncoder, captions: Sequence[str]) -> np.ndarray:
    """What a CLIP that judges makes of captions (b e): as exactly as pictures are seen, on accelerators too."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(encoder.encode(captions).pooled)


class PictureSet(Protocol):
    """Pictures (uint8, all of one size) with captions, None where there are none. fit: what of each is shown."""

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
class OfSource:
    """The first pictures of a captioned set, whole. ValueError for a grayscale or transparent one unless `convert`,
    once it is looked at."""

    name: str
    source: Source
    count: int
    convert: bool = False
    fit = Fit.SQUEEZE

    @functools.cached_property
    def format(self) -> str:
        """Of the files, by the first."""
        first = self.source[0]["image"]
        try:
            return "pixels" if isinstance(first, np.ndarray) else Image.open(io.BytesIO(first)).format.lower()
        except (OSError, Image.DecompressionBombError):
            return "unknown"

    def __len__(self) -> int:
        return min(self.count, len(self.source)) if self.count else len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return strictly(self.source[index]["image"], f"{self.name}: picture {index}", self.convert)

    def caption(self, index: int) -> str | None:
        return caption_of(self.source[index])


@dataclasses.dataclass(frozen=True)
class OfFolder:
    """Picture files, of a folder or in a zip; what cannot be read was left out when it was opened."""

    name: str
    files: tuple[Path | zipped.Member, ...]
    captions: tuple[str | None, ...]
    format: str
    shortest: int = 0
    """Side of any, in pixels."""
    fit = Fit.SQUEEZE

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return images.decode(self.files[index].read_bytes())

    def caption(self, index: int) -> str | None:
        return self.captions[index]


@dataclasses.dataclass(frozen=True)
class Cropped:
    """The centred squares of a set's pictures at `side` pixels, as training sees them."""

    shown: PictureSet
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


def strictly(picture: bytes | np.ndarray, name: str, convert: bool) -> np.ndarray:
    """A picture (h w 3) as it is looked at. ValueError, unless `convert`, for one that is neither RGB nor opaque RGBA;
    `images.Unreadable`."""
    decoded = images.decode(picture)
    if convert:
        return decoded
    with Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else _from_array(picture) as image:
        transparent, mode = images.has_transparency(image), image.mode
    if mode not in ("RGB", "RGBA") or transparent:
        what = "transparent" if transparent else f"not RGB but {mode}"
        raise ValueError(f"{name}: {what}; --convert turns such pictures into RGB, on white")
    return decoded


def _from_array(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture.squeeze(-1) if picture.ndim == 3 and picture.shape[-1] == 1 else picture)


def open_folder(path: Path, convert: bool = False, count: int = 0, fit: Fit = Fit.SQUEEZE) -> OfFolder:
    """The first pictures of a folder or zip; a count of 0: all. Their captions are looked for as in training data
    (`.txt`, metadata.jsonl), and in what a PNG of ours says of itself, never in the text of other programs; the sheet
    `grid.png` of such a folder is none of them.

    Warns of unreadable files, and of those that are left out, counted and named. FileNotFoundError for a folder without
    pictures; ValueError for grayscale or transparent ones unless `convert`, and for pictures of several sizes, unless
    they will be cropped to one.
    """
    sizes: dict[tuple[int, int], str] = {}
    files, captions, unreadable = [], [], []
    found, entries = _entries(path)
    for number, (name, file) in enumerate(tqdm(entries[: count or None], desc="look at files", unit="file")):
        if name == "grid.png":
            warnings.warn(f"{file}: left out, as the sheet of experiments.imagen.sample", stacklevel=2)
            continue
        try:
            example = found[number]
            caption_of(example)  # warns of characters that were replaced
            height, width, _ = strictly(example["image"], str(file), convert).shape
        except (images.Unreadable, OSError) as error:
            unreadable.append(f"{name} ({reason(error)})")
            continue
        sizes.setdefault((width, height), name)
        files.append(file)
        captions.append(example["caption"] or _own_caption(file, example["image"]))
    _warn_of(str(path), unreadable)
    if not files:
        raise FileNotFoundError(f"{path}: no pictures that can be read")
    if len(sizes) > 1 and fit is Fit.SQUEEZE:
        (a, first), (b, second), *_ = sizes.items()
        such = f"{a[0]}x{a[1]} ({first}) and {b[0]}x{b[1]} ({second})"
        raise ValueError(f"{path}: pictures of {len(sizes)} sizes, such as {such}; {CROP_THEM}")
    suffixes = sorted({file.suffix.lower().lstrip(".") for file in files})
    shortest = min(map(min, sizes))
    return OfFolder(str(path), tuple(files), tuple(captions), "+".join(suffixes), shortest)


def _entries(path: Path) -> tuple[Source, list[tuple[str, Path | zipped.Member]]]:
    """A folder or zip, and the names of its picture files with what reads them."""
    if not zipped.is_zip(path):
        files = folder.read(path)
        return files, [(name, path / name) for name, _ in files.entries]
    members = zipped.read(path)
    return members, [(member.info.filename, member) for member in members.members]


def observe(
    shown: PictureSet,
    bench: Sequence[Extractor],
    cache: Path,
    batch: int = 64,
    mesh: Mesh | None = None,
    seed: int | None = None,
) -> dict[str, Observed]:
    """What each network sees in a set, in one pass, by the network's name.

    What it saw is kept below `cache` a part of the pictures at a time, by the digest of their pixels: run again, a part
    that is there already is not looked at again. Warns of pictures that cannot be read, counted and named; ValueError
    where none is left, and for pictures of several sizes.
    """
    cache.mkdir(parents=True, exist_ok=True)
    whole, seen, unreadable = hashlib.sha256(), {str(extractor): [] for extractor in bench}, []
    sizes: set[str] = set()
    with tqdm(total=len(shown), desc=f"look at {shown.name}", unit="picture") as bar:
        for start in range(0, len(shown), PART):
            places = range(start, min(start + PART, len(shown)))
            part = list(_readable(shown, places, unreadable))
            sizes |= set(map(size_of, part))
            if len(sizes) > 1:
                such = " and ".join(sorted(sizes)[:2])
                raise ValueError(f"{shown.name}: pictures of several sizes, such as {such}; {CROP_THEM}")
            digest = _digest(part)
            whole.update(digest.encode())
            for extractor in bench if part else ():
                seen[str(extractor)].append(_seen(extractor, part, digest, cache, batch, mesh))
            bar.update(len(places))
    if len(unreadable) == len(shown):
        raise ValueError(f"{shown.name}: not one of {len(shown)} pictures can be read; the first: {unreadable[0]}")
    _warn_of(shown.name, unreadable)
    results = {}
    for extractor in bench:
        parts = seen[str(extractor)]
        joined = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
        resize = extractor.resize.value
        (size,) = sizes
        told = {"seed": seed, "fit": shown.fit.value, "size": size}
        origin = Origin(shown.name, whole.hexdigest()[:12], str(extractor), resize, shown.format, **told)
        results[str(extractor)] = observed(origin, joined["features"], joined.get("logits"))
    return results


def _readable(shown: PictureSet, places: range, unreadable: list[str]) -> Iterator[np.ndarray]:
    """The pictures of these places; those that cannot be read are named in `unreadable` instead."""
    for place in places:
        try:
            picture = shown[place]
        except (images.Unreadable, OSError) as error:
            unreadable.append(f"picture {place} ({error})")
        else:
            yield picture


def size_of(picture: np.ndarray) -> str:
    """As an `Origin` has it."""
    height, width = picture.shape[:2]
    return f"{width}x{height}"


CROP_THEM = "--fit crop takes the centred square of each, at one size"


def _warn_of(name: str, unreadable: list[str]) -> None:
    if unreadable:
        more = ", …" if len(unreadable) > 5 else ""
        named = ", ".join(unreadable[:5]) + more
        warnings.warn(f"{name}: {len(unreadable)} unreadable, left out: {named}", stacklevel=3)


def _seen(
    extractor: Extractor, part: list[np.ndarray], digest: str, cache: Path, batch: int, mesh: Mesh | None
) -> dict[str, np.ndarray]:
    file = cache / f"{extractor.name}-{extractor.digest}-{extractor.resize.value}-{digest}.npz"
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as kept:
                return dict(kept)
        except Exception:  # a damaged file, in zipfile's and numpy's many errors: look again
            file.unlink()
    parts = list(extract(extractor, part, batch, mesh))
    seen = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **seen)
    return seen


def _digest(part: list[np.ndarray]) -> str:
    total = hashlib.sha256()
    for picture in part:
        total.update(str(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return total.hexdigest()[:16]


def captions_of(shown: PictureSet) -> Iterator[str | None]:
    return (shown.caption(i) for i in range(len(shown)))


def without_captions(captions: Sequence[str | None]) -> str:
    """How many of the pictures have no caption, and how to give them some; empty where all have one."""
    count = sum(caption is None for caption in captions)
    advice = "put a NAME.txt beside each, or a metadata.jsonl into the folder (of the text in PNGs ours alone is read)"
    return f"{count} of {len(captions)} pictures have no caption: {advice}" if count else ""


def _own_caption(file: Path | zipped.Member, picture: bytes) -> str | None:
    """The prompt in a PNG of ours; None where there is none, or where it was drawn without text."""
    try:
        metadata = png_metadata.read(picture)
    except ValueError as error:
        warnings.warn(f"{file}: no caption, {error}", stacklevel=3)
        return None
    return (metadata.prompt.strip() or None) if metadata is not None else None

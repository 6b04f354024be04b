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

from jaxdiff.data import folder, pictures
from jaxdiff.data.example import Source, caption_of
from jaxdiff.data.files import replacing
from jaxdiff.evaluation import features
from jaxdiff.evaluation.features import Extractor, extract
from jaxdiff.evaluation.judges import Observed, observed
from jaxdiff.evaluation.resize import Resize
from jaxdiff.evaluation.statistics import Origin
from jaxdiff.text.clip import CLIPTextEncoder, encode
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
    resize: Literal["clean", "legacy"] = "clean"
    """How pictures come to Inception's size: antialiased bicubic, or TensorFlow 1's bilinear, as published figures."""


class Bench(NamedTuple):
    """Judges, loaded; `text` embeds captions for `clip`."""

    inception: Extractor | None
    classifier: Extractor | None
    clip: Extractor | None
    text: CLIPTextEncoder | None

    @property
    def extractors(self) -> tuple[Extractor, ...]:
        return tuple(each for each in (self.inception, self.classifier, self.clip) if each is not None)


def loaded(judges: Judges) -> Bench:
    """FileNotFoundError, or ValueError, for weights that are not there or none."""
    seeing, classifying, image, text = None, None, None, None
    if judges.inception is not None:
        seeing = features.inception(inception.load(judges.inception), Resize(judges.resize))
    if judges.classifier is not None:
        classifying = features.classifier(*classifier.load(judges.classifier))
    if judges.clip is not None:
        text = clip.load_text_encoder(judges.clip)
        image = features.clip_image(*clip.load_image(judges.clip))
    bench = Bench(seeing, classifying, image, text)
    if not bench.extractors:
        raise ValueError("no judges: name --inception, --clip or --classifier")
    return bench


def embedded(encoder: CLIPTextEncoder, captions: Sequence[str]) -> np.ndarray:
    """What a CLIP that judges makes of captions (b e): as exactly as pictures are seen, on accelerators too."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(encode(encoder, captions).embedding)


class PictureSet(Protocol):
    """Pictures (uint8, all of one size) with captions, None where there are none."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def caption(self, index: int) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class OfSource:
    """The first pictures of a captioned set, shrunk or enlarged to `side` as in training where one is given."""

    name: str
    source: Source
    count: int
    side: int | None = None

    @functools.cached_property
    def format(self) -> str:
        """Of the files, by the first, and the size that pictures were brought to before anything looked at them."""
        first = self.source[0]["image"]
        try:
            kind = "pixels" if isinstance(first, np.ndarray) else Image.open(io.BytesIO(first)).format.lower()
        except (OSError, Image.DecompressionBombError):
            kind = "unknown"
        return kind if self.side is None else f"{kind}, {self.side} pixels"

    def __len__(self) -> int:
        return min(self.count, len(self.source)) if self.count else len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        picture = pictures.decode(self.source[index]["image"])
        return picture if self.side is None else pictures.resize(picture, self.side)

    def caption(self, index: int) -> str | None:
        return caption_of(self.source[index])


@dataclasses.dataclass(frozen=True)
class OfFolder:
    """Picture files; what cannot be read was left out when it was opened."""

    name: str
    files: tuple[Path, ...]
    captions: tuple[str | None, ...]
    format: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return pictures.decode(self.files[index].read_bytes())

    def caption(self, index: int) -> str | None:
        return self.captions[index]


def open_folder(path: Path, convert: bool = False) -> OfFolder:
    """The pictures of a folder. Their captions are looked for as in training data (`.txt`, metadata.jsonl), and in what
    a PNG of `experiments.imagen.sample` says of itself; the sheet `grid.png` of such a folder is none of them.

    Warns of unreadable files, counted and named. FileNotFoundError for a folder without pictures; ValueError for
    pictures of several sizes, and for grayscale or transparent ones unless `convert`.
    """
    found = folder.read(path)
    sizes: dict[tuple[int, int], Path] = {}
    files, captions, unreadable = [], [], []
    for number, (name, _) in enumerate(tqdm(found.entries, desc="look at files", unit="file")):
        file = path / name
        if name == "grid.png":
            continue
        try:
            example = found[number]
            caption_of(example)  # warns of characters that were replaced
            height, width, _ = pictures.decode(example["image"]).shape  # as it will be looked at
        except (pictures.Unreadable, OSError) as error:
            unreadable.append(f"{name} ({str(error).splitlines()[0]})")
            continue
        with Image.open(io.BytesIO(example["image"])) as image:
            size, mode, told = (width, height), image.mode, image.info
            transparent = image.has_transparency_data
        if (mode != "RGB" or transparent) and not convert:
            what = "transparent" if transparent else f"not RGB but {mode}"
            raise ValueError(f"{file}: {what}; --convert turns such pictures into RGB, on white")
        sizes.setdefault(size, file)
        files.append(file)
        captions.append(example["caption"] or told.get("prompt"))
    _warn_of(str(path), unreadable)
    if not files:
        raise FileNotFoundError(f"{path}: no pictures that can be read")
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        such = f"{a[0]}x{a[1]} ({first.name}) and {b[0]}x{b[1]} ({second.name})"
        raise ValueError(f"{path}: pictures of {len(sizes)} sizes, such as {such}")
    suffixes = sorted({file.suffix.lower().lstrip(".") for file in files})
    return OfFolder(str(path), tuple(files), tuple(captions), "+".join(suffixes))


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
    where none is left.
    """
    cache.mkdir(parents=True, exist_ok=True)
    whole, seen, unreadable = hashlib.sha256(), {str(extractor): [] for extractor in bench}, []
    with tqdm(total=len(shown), desc=f"look at {shown.name}", unit="picture") as bar:
        for start in range(0, len(shown), PART):
            places = range(start, min(start + PART, len(shown)))
            part = list(_readable(shown, places, unreadable))
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
        origin = Origin(shown.name, whole.hexdigest()[:12], str(extractor), resize, shown.format, seed)
        results[str(extractor)] = observed(origin, joined["features"], joined.get("logits"))
    return results


def _readable(shown: PictureSet, places: range, unreadable: list[str]) -> Iterator[np.ndarray]:
    """The pictures of these places; those that cannot be read are named in `unreadable` instead."""
    for place in places:
        try:
            picture = shown[place]
        except (pictures.Unreadable, OSError) as error:
            unreadable.append(f"picture {place} ({error})")
        else:
            yield picture


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

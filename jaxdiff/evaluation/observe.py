"""One pass of all networks over a set of images; what they saw is kept, so that a pass that was stopped goes on."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff.core.files import replacing
from jaxdiff.data import images
from jaxdiff.evaluation.features import Extractor, extract
from jaxdiff.evaluation.image_sets import CROP_THEM, ImageSet, warn_of
from jaxdiff.evaluation.metrics import Observed, observed
from jaxdiff.evaluation.statistics import Origin

PART = 256
"""Images between two savings of what the networks saw."""


def observe(
    shown: ImageSet,
    extractors: Sequence[Extractor],
    cache: Path,
    batch: int = 64,
    mesh: Mesh | None = None,
    seed: int | None = None,
) -> dict[str, Observed]:
    """What each network sees in a set, in one pass, by the network's name.

    What it saw is kept below `cache` a part of the images at a time, by the digest of their pixels: run again, a part
    that is there already is not looked at again. Warns of images that cannot be read, counted and named; ValueError
    where none is left, and for images of several sizes.
    """
    cache.mkdir(parents=True, exist_ok=True)
    total_digest, sizes = hashlib.sha256(), set[str]()
    seen: dict[str, list[dict[str, np.ndarray]]] = {str(extractor): [] for extractor in extractors}
    unreadable: list[str] = []
    with tqdm(total=len(shown), desc=f"look at {shown.name}", unit="image") as bar:
        for start in range(0, len(shown), PART):
            places = range(start, min(start + PART, len(shown)))
            part = list(_readable(shown, places, unreadable))
            sizes |= set(map(size_of, part))
            if len(sizes) > 1:
                such = " and ".join(sorted(sizes)[:2])
                raise ValueError(f"{shown.name}: images of several sizes, such as {such}; {CROP_THEM}")
            digest = _digest(part)
            total_digest.update(digest.encode())
            for extractor in extractors if part else ():
                seen[str(extractor)].append(_seen(extractor, part, digest, cache, batch, mesh))
            bar.update(len(places))
    if len(unreadable) == len(shown):
        raise ValueError(f"{shown.name}: not one of {len(shown)} images can be read; the first: {unreadable[0]}")
    warn_of(shown.name, unreadable)
    results = {}
    for extractor in extractors:
        chunks = seen[str(extractor)]
        joined = {name: np.concatenate([each[name] for each in chunks]) for name in chunks[0]}
        resize = extractor.resize.value
        (size,) = sizes
        digest, fit = total_digest.hexdigest()[:12], shown.fit.value
        origin = Origin(shown.name, digest, str(extractor), resize, shown.format, seed=seed, fit=fit, size=size)
        results[str(extractor)] = observed(origin, joined["features"], joined.get("logits"))
    return results


def _readable(shown: ImageSet, places: range, unreadable: list[str]) -> Iterator[np.ndarray]:
    """The images of these places; those that cannot be read are named in `unreadable` instead."""
    for place in places:
        try:
            image = shown[place]
        except (images.Unreadable, OSError) as error:
            unreadable.append(f"image {place} ({error})")
        else:
            yield image


def size_of(image: np.ndarray) -> str:
    """As an `Origin` has it."""
    height, width = image.shape[:2]
    return f"{width}x{height}"


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
    batches = list(extract(extractor, part, batch, mesh))
    seen = {name: np.concatenate([each[name] for each in batches]) for name in batches[0]}
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **seen)
    return seen


def _digest(part: list[np.ndarray]) -> str:
    total = hashlib.sha256()
    for image in part:
        total.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    return total.hexdigest()[:16]

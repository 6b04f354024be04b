"""One pass of all networks over an image dataset, with cached outputs, so that an interrupted pass resumes."""

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
"""Images per cached chunk of outputs."""


def observe(
    shown: ImageSet,
    extractors: Sequence[Extractor],
    cache: Path,
    batch: int = 64,
    mesh: Mesh | None = None,
    seed: int | None = None,
) -> dict[str, Observed]:
    """Each network's outputs for a dataset, in one pass, by the network's name.

    Outputs are cached in chunks below `cache`, keyed by the digest of the pixels; cached chunks are not computed again.
    Warns of unreadable images with their count and names; ValueError if no image is readable, and for images of several
    sizes.
    """
    cache.mkdir(parents=True, exist_ok=True)
    total_digest, sizes = hashlib.sha256(), set[str]()
    seen: dict[str, list[dict[str, np.ndarray]]] = {str(extractor): [] for extractor in extractors}
    unreadable: list[str] = []
    with tqdm(total=len(shown), desc=f"features of {shown.name}", unit="image") as bar:
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
    """The readable images at these indices; the others are named in `unreadable`."""
    for place in places:
        try:
            image = shown[place]
        except (images.Unreadable, OSError) as error:
            unreadable.append(f"image {place} ({error})")
        else:
            yield image


def size_of(image: np.ndarray) -> str:
    """WIDTHxHEIGHT, as in `Origin`."""
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
        except Exception:  # a damaged file, for which zipfile and numpy raise many types: compute again
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

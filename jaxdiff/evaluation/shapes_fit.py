"""Analysis by synthesis: fit rasterised objects to the pixels that differ from an image's background.

These pixels are split into connected pieces, and the pieces are grouped into objects (a striped object has several).
Each object is fitted by rasterising all kinds and fills at its place with the dataset's own code and keeping the best.
With coverage t of a candidate and difference d to the background, the candidate's best colour is closed form,
Σ t d / Σ t², and it explains the fraction (Σ t d)² / (Σ t² Σ d²) of the energy Σ d²: a squared cosine, invariant to
contrast and colour shifts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from jaxdiff.data.shapes_draw import FILLINGS, OUTLINES

CONTRAST = 0.15  # minimum RGB distance (in the unit cube) of an object pixel to the background
MOST_PIECES = 10  # the largest are kept; `shapes` has at most eight
PER_OBJECT = 0.12  # splitting an object must explain at least this much more of its energy
GOOD = 0.95  # an object explained this well is not split
REFINED = 4  # number of best initial candidates whose place is refined
CERTAIN = 0.975  # only the true kind and fill explain this much: the search ends
SOFT = (0.010, 0.016)  # blur radii, in image sides, of edges in generated images

Place = tuple[float, float, float]  # x, y, radius


@dataclasses.dataclass(frozen=True)
class Fit:
    """The best candidate for one object. Lengths are pixels; `half` is half the longer side of its bounding box."""

    kind: str
    fill: str
    x: float
    y: float
    radius: float
    explained: float
    energy: float
    half: float
    difference: Float[np.ndarray, "3"]  # of its colour to the background's


def explain(difference: Float[np.ndarray, "m m 3"], noise: float) -> list[Fit]:
    """The objects that explain an image less its background; `noise`: its standard deviation per channel."""
    distance = np.sqrt((difference**2).sum(-1))
    pieces, count = _pieces(distance > max(CONTRAST, 5 * noise))
    if count == 0:
        return []
    rows, columns = scipy.ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
    cluster = _Pixels(difference, distance, pieces, pieces[rows, columns], scipy.ndimage.find_objects(pieces), noise)
    everything = frozenset(range(1, count + 1))
    return [_refine(group) for group in _divide(cluster, _group(cluster, everything))]


def _pieces(mask: Bool[np.ndarray, "m m"]) -> tuple[Int[np.ndarray, "m m"], int]:
    """Connected pieces numbered from 1, without specks."""
    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    kept = [i + 1 for i in np.argsort(-areas)[:MOST_PIECES] if areas[i] >= 3e-4 * labels.size]
    renumbered = np.zeros(count + 1, labels.dtype)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    return renumbered[labels], len(kept)


@dataclasses.dataclass(frozen=True)
class _Pixels:
    difference: Float[np.ndarray, "m m 3"]
    distance: Float[np.ndarray, "m m"]
    pieces: Int[np.ndarray, "m m"]
    owner: Int[np.ndarray, "m m"]  # the piece nearest to each pixel
    boxes: list[tuple[slice, slice]]
    noise: float


@dataclasses.dataclass(frozen=True)
class _Group:
    """Pieces treated as one object: a window of the image, and the initial candidates."""

    members: frozenset[int]
    window: Float[np.ndarray, "hw 3"]  # difference to the background, zero where another group's piece is nearer
    xs: Float[np.ndarray, "1 w"]  # coordinates of the window's pixel centres
    ys: Float[np.ndarray, "h 1"]
    side: int  # of the whole image
    energy: float
    half: float
    candidates: list["_Candidate"]  # every kind and fill, the best first


@dataclasses.dataclass(frozen=True)
class _Candidate:
    explained: float
    kind: str
    fill: str
    place: Place


# Grouping pieces into objects


def _divide(image: _Pixels, parent: _Group) -> list[_Group]:
    """Recursively split the pieces into objects while that explains enough more energy."""
    best = parent.candidates[0].explained
    if best > GOOD:
        return [parent]
    best, halves = best + PER_OBJECT, None
    for part in _cuts(image, parent.members):
        pair = [_group(image, part), _group(image, parent.members - part)]
        explained = sum(g.energy * g.candidates[0].explained for g in pair) / sum(g.energy for g in pair)
        if explained > best:
            best, halves = explained, pair
    return [parent] if halves is None else [group for half in halves for group in _divide(image, half)]


def _cuts(image: _Pixels, members: frozenset[int]) -> Iterator[frozenset[int]]:
    """One side of every axis-aligned cut that does not intersect a piece."""
    for axis in (0, 1):
        ordered = sorted(members, key=lambda m: image.boxes[m - 1][axis].start)
        for i in range(1, len(ordered)):
            end = max(image.boxes[m - 1][axis].stop for m in ordered[:i])
            if end <= image.boxes[ordered[i] - 1][axis].start:
                yield frozenset(ordered[:i])


def _group(image: _Pixels, members: frozenset[int]) -> _Group:
    boxes = [image.boxes[m - 1] for m in members]
    side = len(image.distance)
    pad = 2 + side // 64
    rows, columns = (
        slice(max(0, min(b[axis].start for b in boxes) - pad), min(side, max(b[axis].stop for b in boxes) + pad))
        for axis in (0, 1)
    )
    mine = np.isin(image.owner[rows, columns], list(members))
    window = np.where(mine[..., None], image.difference[rows, columns], 0).reshape(-1, 3)
    energy = max(float((window**2).sum() - 3 * image.noise**2 * mine.sum()), 1e-6)
    x0, x1, y0, y1 = _box(np.where(mine, image.distance[rows, columns], 0) * (image.pieces[rows, columns] > 0))
    ys = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
    xs = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5
    x, y = columns.start + (x0 + x1) / 2, rows.start + (y0 + y1) / 2
    candidates = []
    for kind in OUTLINES:
        hx, hy = half_extents(kind)
        place = (x, y, ((x1 - x0) / hx + (y1 - y0) / hy) / 4)
        explained = _explained(window, energy, _coverages(kind, tuple(FILLINGS), place, xs, ys))
        candidates += [_Candidate(e, kind, fill, place) for e, fill in zip(explained, FILLINGS)]
    candidates.sort(key=lambda c: -c.explained)
    return _Group(members, window, xs, ys, side, energy, max(x1 - x0, y1 - y0) / 2, candidates)


def _box(distance: Float[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of the pixels with at least half of the object's contrast."""
    strong = distance > np.percentile(distance[distance > 0], 80) / 2
    columns, rows = np.flatnonzero(strong.any(0)), np.flatnonzero(strong.any(1))
    return float(columns[0]), float(columns[-1] + 1), float(rows[0]), float(rows[-1] + 1)


@functools.cache
def half_extents(kind: str) -> tuple[float, float]:
    """Half the width and half the height of a kind's bounding box, in radii."""
    axis = np.linspace(-1.2, 1.2, 601, dtype=np.float32)
    inside = OUTLINES[kind](*np.broadcast_arrays(axis[None, :], axis[:, None])) <= 0
    return float(np.abs(axis[inside.any(0)]).max()), float(np.abs(axis[inside.any(1)]).max())


# Rasterising candidates


def _explained(window: Float[np.ndarray, "hw 3"], energy: float, coverages: Float[np.ndarray, "f hw"]) -> list[float]:
    colours = coverages @ window
    norms = np.einsum("fp,fp->f", coverages, coverages)
    return ((colours**2).sum(1) / np.maximum(norms, 1e-6) / energy).tolist()


def _coverages(kind: str, fills: tuple[str, ...], place: Place, xs, ys) -> Float[np.ndarray, "f hw"]:
    x, y, radius = place
    shape = (ys.size, xs.size)
    px, py = np.broadcast_to((xs - x) / radius, shape), np.broadcast_to((ys - y) / radius, shape)
    outline = OUTLINES[kind](px, py)
    distances = np.stack([FILLINGS[fill](outline, py).ravel() for fill in fills])
    return (0.5 - distances * radius).clip(0, 1)


def _refine(group: _Group) -> Fit:
    """The best of the top candidates after refining place and size; blurred if none fits sharply."""
    refined = []
    for candidate in group.candidates[:REFINED]:
        refined.append(_descend(group, candidate))
        if refined[-1].explained > CERTAIN:
            break
    best = max(refined, key=lambda c: c.explained)
    coverage = _coverages(best.kind, (best.fill,), best.place, group.xs, group.ys)
    if best.explained < CERTAIN:
        for candidate in refined:
            sharp = _coverages(candidate.kind, (candidate.fill,), candidate.place, group.xs, group.ys)
            for softness in SOFT:
                soft = _soften(sharp, group, softness)
                (explained,) = _explained(group.window, group.energy, soft)
                if explained > best.explained:
                    best, coverage = dataclasses.replace(candidate, explained=explained), soft
    colour = _colour(group.window, coverage[0])
    return Fit(best.kind, best.fill, *best.place, best.explained, group.energy, group.half, colour)


def _soften(coverage: Float[np.ndarray, "1 hw"], group: _Group, softness: float) -> Float[np.ndarray, "1 hw"]:
    grid = coverage.reshape(group.ys.size, group.xs.size)
    return scipy.ndimage.gaussian_filter(grid, softness * group.side, mode="constant").reshape(1, -1)


def _descend(group: _Group, candidate: _Candidate) -> _Candidate:
    """Coordinate descent in x, y and radius, down to a tenth of a pixel."""
    step = max(0.5, 0.05 * candidate.place[2])
    while step > 0.12 and candidate.explained < CERTAIN:
        before = candidate
        for axis, sign in itertools.product(range(3), (-1, 1)):
            x, y, radius = (p + sign * step * (i == axis) for i, p in enumerate(candidate.place))
            place = (x, y, max(radius, 1.0))
            coverage = _coverages(candidate.kind, (candidate.fill,), place, group.xs, group.ys)
            (explained,) = _explained(group.window, group.energy, coverage)
            if explained > candidate.explained:
                candidate = dataclasses.replace(candidate, explained=explained, place=place)
        if candidate is before:
            step /= 2
    return candidate


def _colour(window: Float[np.ndarray, "hw 3"], coverage: Float[np.ndarray, "hw"]) -> Float[np.ndarray, "3"]:
    """The median difference of interior pixels; the candidate's best colour if there are few."""
    inside = window[coverage > 0.95]
    if len(inside) < 8:
        return coverage @ window / (coverage @ coverage)
    contrast = (inside**2).sum(1)
    return np.median(inside[contrast >= np.percentile(contrast, 40)], axis=0)

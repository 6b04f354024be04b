"""Analysis by synthesis: which drawn objects explain what differs from a picture's background?

What differs falls into connected pieces; pieces are gathered into objects (a striped object has several); every object
is explained by drawing all kinds and fillings at its place with the set's own drawing code and keeping the best. With
coverage t of a candidate and difference d to the background, the candidate's best colour is closed form, Σ t d / Σ t²,
and the share of the energy Σ d² that it explains is (Σ t d)² / (Σ t² Σ d²): a squared cosine, which neither contrast
nor a shift of colour changes.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from jaxdiff.data.shapes_draw import FILLINGS, OUTLINES

CONTRAST = 0.15  # least RGB distance (in the unit cube) to the background of a pixel of an object
MOST_PIECES = 10  # the largest are kept; `shapes` itself has at most eight
PER_OBJECT = 0.12  # cutting one object in two must explain at least this much more of its energy
GOOD = 0.95  # an object explained this well is not cut
REFINED = 4  # so many candidates, the best at first sight, have their place fitted
CERTAIN = 0.975  # no other kind and filling than the true one explains so much: the search ends


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
    """The objects that explain a picture less its background; `noise`: its standard deviation per channel."""
    distance = np.sqrt((difference**2).sum(-1))
    pieces, count = _pieces(distance > max(CONTRAST, 5 * noise))
    if count == 0:
        return []
    rows, columns = ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
    cluster = _Picture(difference, distance, pieces, pieces[rows, columns], ndimage.find_objects(pieces), noise)
    everything = frozenset(range(1, count + 1))
    return [_refine(group) for group in _divide(cluster, _group(cluster, everything))]


def _pieces(mask: Bool[np.ndarray, "m m"]) -> tuple[Int[np.ndarray, "m m"], int]:
    """Connected pieces numbered from 1, without specks."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    kept = [i + 1 for i in np.argsort(-areas)[:MOST_PIECES] if areas[i] >= 3e-4 * labels.size]
    renumbered = np.zeros(count + 1, labels.dtype)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    return renumbered[labels], len(kept)


@dataclasses.dataclass(frozen=True)
class _Picture:
    difference: Float[np.ndarray, "m m 3"]
    distance: Float[np.ndarray, "m m"]
    pieces: Int[np.ndarray, "m m"]
    owner: Int[np.ndarray, "m m"]  # the piece nearest to each pixel
    boxes: list[tuple[slice, slice]]
    noise: float


@dataclasses.dataclass(frozen=True)
class _Group:
    """Pieces taken for one object: a window of the picture, and the candidates at first sight."""

    members: frozenset[int]
    window: Float[np.ndarray, "hw 3"]  # difference to the background, zero where another group's piece is nearer
    xs: Float[np.ndarray, "1 w"]  # coordinates of the window's pixel centres
    ys: Float[np.ndarray, "h 1"]
    energy: float
    half: float
    candidates: list["_Candidate"]  # every kind and filling, the best first


@dataclasses.dataclass(frozen=True)
class _Candidate:
    explained: float
    kind: str
    fill: str
    place: tuple[float, float, float]  # x, y, radius


# Gathering pieces into objects


def _divide(picture: _Picture, whole: _Group) -> list[_Group]:
    """The pieces as one object, or cut in two, and so on, wherever that explains enough more."""
    best = whole.candidates[0].explained
    if best > GOOD:
        return [whole]
    best, halves = best + PER_OBJECT, None
    for part in _cuts(picture, whole.members):
        pair = [_group(picture, part), _group(picture, whole.members - part)]
        explained = sum(g.energy * g.candidates[0].explained for g in pair) / sum(g.energy for g in pair)
        if explained > best:
            best, halves = explained, pair
    return [whole] if halves is None else [group for half in halves for group in _divide(picture, half)]


def _cuts(picture: _Picture, members: frozenset[int]) -> Iterator[frozenset[int]]:
    """One side of every straight cut, along a row or a column of pixels, that goes through no piece."""
    for axis in (0, 1):
        ordered = sorted(members, key=lambda m: picture.boxes[m - 1][axis].start)
        for i in range(1, len(ordered)):
            end = max(picture.boxes[m - 1][axis].stop for m in ordered[:i])
            if end <= picture.boxes[ordered[i] - 1][axis].start:
                yield frozenset(ordered[:i])


def _group(picture: _Picture, members: frozenset[int]) -> _Group:
    boxes = [picture.boxes[m - 1] for m in members]
    side = len(picture.distance)
    pad = 2 + side // 64
    rows, columns = (
        slice(max(0, min(b[axis].start for b in boxes) - pad), min(side, max(b[axis].stop for b in boxes) + pad))
        for axis in (0, 1)
    )
    mine = np.isin(picture.owner[rows, columns], list(members))
    window = np.where(mine[..., None], picture.difference[rows, columns], 0).reshape(-1, 3)
    energy = max(float((window**2).sum() - 3 * picture.noise**2 * mine.sum()), 1e-6)
    x0, x1, y0, y1 = _box(np.where(mine, picture.distance[rows, columns], 0) * (picture.pieces[rows, columns] > 0))
    ys = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
    xs = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5
    x, y = columns.start + (x0 + x1) / 2, rows.start + (y0 + y1) / 2
    candidates = []
    for kind in OUTLINES:
        hx, hy = half_extents(kind)
        place = (x, y, ((x1 - x0) / hx + (y1 - y0) / hy) / 4)
        candidates += _candidates(kind, tuple(FILLINGS), place, window, energy, xs, ys)
    candidates.sort(key=lambda c: -c.explained)
    return _Group(members, window, xs, ys, energy, max(x1 - x0, y1 - y0) / 2, candidates)


def _box(distance: Float[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of what has at least half of the object's own contrast."""
    strong = distance > np.percentile(distance[distance > 0], 80) / 2
    columns, rows = np.flatnonzero(strong.any(0)), np.flatnonzero(strong.any(1))
    return columns[0], columns[-1] + 1, rows[0], rows[-1] + 1


@functools.cache
def half_extents(kind: str) -> tuple[float, float]:
    """Half the width and half the height of a kind's bounding box, in radii."""
    axis = np.linspace(-1.2, 1.2, 601, dtype=np.float32)
    inside = OUTLINES[kind](*np.broadcast_arrays(axis[None, :], axis[:, None])) <= 0
    return float(np.abs(axis[inside.any(0)]).max()), float(np.abs(axis[inside.any(1)]).max())


# Drawing candidates


def _candidates(kind: str, fills: tuple[str, ...], place: tuple, window, energy, xs, ys) -> list[_Candidate]:
    """How much each filling of a kind explains at a place."""
    coverages = _coverages(kind, fills, place, xs, ys)
    colours = coverages @ window
    norms = np.einsum("fp,fp->f", coverages, coverages)
    explained = (colours**2).sum(1) / np.maximum(norms, 1e-6) / energy
    return [_Candidate(float(e), kind, fill, place) for e, fill in zip(explained, fills)]


def _coverages(kind: str, fills: tuple[str, ...], place: tuple, xs, ys) -> Float[np.ndarray, "f hw"]:
    x, y, radius = place
    shape = (ys.size, xs.size)
    px, py = np.broadcast_to((xs - x) / radius, shape), np.broadcast_to((ys - y) / radius, shape)
    outline = OUTLINES[kind](px, py)
    distances = np.stack([FILLINGS[fill](outline, py).ravel() for fill in fills])
    return (0.5 - distances * radius).clip(0, 1)


def _refine(group: _Group) -> Fit:
    """The most promising candidates, moved and scaled for as long as that explains more."""
    best = group.candidates[0]
    for candidate in group.candidates[:REFINED]:
        best = max(best, _descend(group, candidate), key=lambda c: c.explained)
        if best.explained > CERTAIN:
            break
    x, y, radius = best.place
    coverage = _coverages(best.kind, (best.fill,), best.place, group.xs, group.ys)[0]
    colour = _colour(group.window, coverage)
    return Fit(best.kind, best.fill, x, y, radius, best.explained, group.energy, group.half, colour)


def _descend(group: _Group, candidate: _Candidate) -> _Candidate:
    """Coordinate descent in x, y and radius, down to a tenth of a pixel."""
    step = max(0.5, 0.05 * candidate.place[2])
    while step > 0.12 and candidate.explained < CERTAIN:
        before = candidate
        for axis in range(3):
            for move in (-step, step):
                x, y, radius = (p + move * (i == axis) for i, p in enumerate(candidate.place))
                (moved,) = _candidates(
                    candidate.kind,
                    (candidate.fill,),
                    (x, y, max(radius, 1.0)),
                    group.window,
                    group.energy,
                    group.xs,
                    group.ys,
                )
                if moved.explained > candidate.explained:
                    candidate = moved
                    break
        if candidate is before:
            step /= 2
    return candidate


def _colour(window: Float[np.ndarray, "hw 3"], coverage: Float[np.ndarray, "hw"]) -> Float[np.ndarray, "3"]:
    """The median difference of the pixels well inside; of the most covered ones where an outline is thin."""
    inside = coverage > 0.95
    if inside.sum() < 8:
        inside = coverage >= np.sort(coverage)[-8]
    colours = window[inside]
    contrast = (colours**2).sum(1)
    return np.median(colours[contrast >= np.percentile(contrast, 40)], axis=0)

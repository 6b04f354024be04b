"""Rasterising `shapes`: analytic signed distances, one anti-aliased pass, the same image at any resolution.

`draw` turns a scene into pixels. Every outline is an exact Euclidean distance (negative inside), so the coverage of a
pixel is clip(1/2 - distance in pixels, 0, 1), and an outline of constant width is a band of distances. Symmetric shapes
are first folded into one sector with a single edge. Only an object's bounding box is computed.
"""

import math

import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, REACH, Scene

STROKE = 0.24  # width of an outline, in radii
STRIPE = (0.22, 0.56)  # |y| between these many radii is left unpainted: three bands of colour

Grid = Float[np.ndarray, "h w"]


def draw(scene: Scene, resolution: int) -> UInt8[np.ndarray, "{resolution} {resolution} 3"]:
    """The image of a scene, sRGB; `resolution` is any positive number of pixels a side."""
    if resolution < 1:
        raise ValueError(f"resolution {resolution} is not a positive number of pixels")
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        rows, columns = (_span(c, o.radius * REACH, resolution) for c in (o.y, o.x))
        alpha = coverage(o.kind, o.fill, o.x, o.y, o.radius, resolution, rows, columns)[..., None]
        under = image[rows, columns].astype(np.float32)
        image[rows, columns] = under + alpha * (np.array(COLOURS[o.colour], np.float32) - under) + 0.5
    return image


def coverage(
    kind: str, fill: str, x: float, y: float, radius: float, resolution: int, rows: slice, columns: slice
) -> Grid:
    """The fraction of each pixel of a window that the object covers, in [0, 1]."""
    px = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / resolution - x) / radius
    py = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / resolution - y) / radius
    px, py = np.broadcast_arrays(px[None, :], py[:, None])
    distance = FILLINGS[fill](OUTLINES[kind](px, py), py)
    return np.clip(0.5 - distance * np.float32(radius * resolution), 0.0, 1.0)


def _span(centre: float, reach: float, resolution: int) -> slice:
    return slice(
        max(0, math.floor((centre - reach) * resolution) - 1),
        min(resolution, math.ceil((centre + reach) * resolution) + 1),
    )


# Fills: map the distance of the filled outline, and y, to the distance of the painted area.


def _outlined(distance: Grid, y: Grid) -> Grid:
    return np.maximum(distance, -STROKE - distance)


def _striped(distance: Grid, y: Grid) -> Grid:
    low, high = STRIPE
    bare = np.abs(np.abs(y) - (low + high) / 2) - (high - low) / 2  # distance to the unpainted bands
    return np.maximum(distance, -bare)


FILLINGS = {"solid": lambda distance, y: distance, "outlined": _outlined, "striped": _striped}


# Outlines: signed distance at (x, y), in radii, from the centre of the bounding box, with similar apparent sizes.


def _circle(x: Grid, y: Grid) -> Grid:
    return np.hypot(x, y) - 1


def _square(x: Grid, y: Grid) -> Grid:
    x, y = np.abs(x) - 0.88, np.abs(y) - 0.88
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


def _triangle(x: Grid, y: Grid, circumradius: float = 1.3) -> Grid:
    inradius = circumradius / 2
    x, y = _fold(x, y - circumradius / 4, 3, math.pi / 2)  # the box's centre is a quarter of the circumradius above
    beyond = np.maximum(y - inradius * math.sqrt(3), 0)
    return np.where(x > inradius, np.hypot(x - inradius, beyond), x - inradius)


def _star(x: Grid, y: Grid, outer: float = 1.18, inner: float = 0.6) -> Grid:
    fifth = math.pi / 5
    x, y = _fold(x, y - outer * (1 - math.cos(fifth)) / 2, 5, -math.pi / 2)  # the fold's axis is a tip
    tip, notch = (outer, 0.0), (inner * math.cos(fifth), inner * math.sin(fifth))
    return _edge(x, y, tip, notch)


def _cross(x: Grid, y: Grid, length: float = 1.0, width: float = 0.41) -> Grid:
    x, y = np.abs(x), np.abs(y)
    x, y = np.maximum(x, y), np.minimum(x, y)
    end = np.hypot(x - length, np.maximum(y - width, 0))
    side = np.hypot(np.maximum(np.maximum(width - x, x - length), 0), y - width)
    return np.where((x < length) & (y < width), -1, 1) * np.minimum(end, side)


def _heart(x: Grid, y: Grid, s: float = 0.9) -> Grid:
    """A square on its corner, of half diagonal s, with a half disc on each of its two upper sides."""
    bulge = s * math.sqrt(0.5)
    x, y = np.abs(x), (1.5 * s + bulge) / 2 - y  # from the lower corner, upwards
    cx, cy = x - s / 2, y - 1.5 * s
    to_centre = np.hypot(cx, cy)
    arc = np.where(cx + cy >= 0, np.abs(to_centre - bulge), np.hypot(x, y - 2 * s))
    along = np.clip((x + y) / 2, 0, s)
    side = np.hypot(x - along, y - along)
    inside = (to_centre < bulge) | (x + np.abs(y - s) < s)
    return np.where(inside, -1, 1) * np.minimum(arc, side)


OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def _fold(x: Grid, y: Grid, n: int, axis: float) -> tuple[Grid, Grid]:
    """Rotate and mirror a point into the half sector of an n-fold symmetry, its axis along +x."""
    sector = np.float32(2 * math.pi / n)
    angle = np.arctan2(y, x) - np.float32(axis)
    angle = np.abs(angle - sector * np.round(angle / sector))
    length = np.hypot(x, y)
    return length * np.cos(angle), length * np.sin(angle)


def _edge(x: Grid, y: Grid, a: tuple[float, float], b: tuple[float, float]) -> Grid:
    """Signed distance to the segment from a to b; the origin's side is inside."""
    ex, ey = b[0] - a[0], b[1] - a[1]
    x, y = x - a[0], y - a[1]
    t = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, 1)
    side = np.sign((ex * y - ey * x) * (ey * a[0] - ex * a[1]))
    return -side * np.hypot(x - t * ex, y - t * ey)

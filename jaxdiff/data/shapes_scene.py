"""The scenes of `shapes`: one or two flat objects on a plain background, fully described by a few words.

A scene is a value. `scene(split, index)` is a pure function, so an example can be reproduced at any resolution and on
any machine from its split and index. About one combination of (kind, colour, fill, size) in ten is held out: no
training scene contains it, and the first object of every `held_out` scene is one of them. Every value and every pair of
values still occurs in training, so a held-out caption is a new combination of known words.

Lengths are fractions of the image's side; x grows to the right and y downwards.
"""

import dataclasses
import hashlib
import itertools
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "held_out"]

RGB = tuple[int, int, int]
KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (250, 125, 10),
    "yellow": (250, 225, 50),
    "green": (40, 160, 60),
    "cyan": (50, 210, 220),
    "blue": (30, 60, 220),
    "purple": (130, 40, 170),
    "pink": (255, 115, 185),
}
BACKGROUNDS: dict[str, RGB] = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
FILLS = ("solid", "outlined", "striped")
SIZES: dict[str, tuple[float, float]] = {"small": (0.115, 0.130), "medium": (0.165, 0.185), "large": (0.235, 0.260)}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
POSITIONS = tuple(f"{row} {column}".strip() or "center" for row in ROWS for column in COLUMNS)
RELATIONS = ("left of", "right of", "above", "below")

REACH = 1.13  # no outline extends more than this many radii from its centre along x or y (shapes_draw.py, tested)
MARGIN = 0.015  # minimum distance from an object to the image border
# Ranges of a centre's coordinate, with gaps between them.
LOW, MIDDLE, HIGH = (0.20, 0.32), (0.45, 0.55), (0.68, 0.80)
CELL = 0.385  # a coordinate below is `top` or `left`, above 1 - CELL `bottom` or `right`: the middle of the gaps
TWO_OBJECTS = 0.3  # the fraction of scenes with two objects


@dataclasses.dataclass(frozen=True)
class Object:
    """One object. `x`, `y`: the centre of its bounding box; `radius`: of a circle of the same apparent size."""

    kind: str
    colour: str
    size: str
    fill: str
    x: float
    y: float
    radius: float

    @property
    def position(self) -> str:
        """The cell of the 3×3 grid that holds the centre, in words."""
        return position(self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Scene:
    """relation: position of the first of two objects relative to the second; None for one object."""

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None

    def as_dict(self) -> dict:
        """The scene in JSON's types, every object with its position in words."""
        objects = [dataclasses.asdict(o) | {"position": o.position} for o in self.objects]
        return {"background": self.background, "objects": objects, "relation": self.relation}


def scene(split: Split, index: int, objects: int | None = None) -> Scene:
    """Scene `index` of a split. objects: 1 or 2 forces their number (and selects another sequence of scenes)."""
    if objects not in (None, 1, 2):
        raise ValueError(f"a scene has 1 or 2 objects, not {objects}")
    rng = stream(split, index, 0 if objects is None else objects)
    if objects is None:
        objects = 2 if rng.random() < TWO_OBJECTS else 1
    background = pick(rng, tuple(BACKGROUNDS))
    return _one(rng, split, background) if objects == 1 else _two(rng, split, background)


def stream(split: Split, index: int, purpose: int) -> np.random.Generator:
    """Independent random numbers for every (split, index, purpose)."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: shapes has {' and '.join(get_args(Split))}")
    if index < 0:
        raise ValueError(f"index {index} is negative")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([get_args(Split).index(split), purpose, index])))


def held_out(obj: Object) -> bool:
    """Whether the combination of kind, colour, fill and size is held out of training."""
    return _held_out(obj.kind, obj.colour, obj.fill, obj.size)


def position(x: float, y: float) -> str:
    """The cell of the 3×3 grid around a point, in words: "top left", "top", …, "center", …"""
    row, column = ROWS[_cell(y)], COLUMNS[_cell(x)]
    return f"{row} {column}".strip() or "center"


def relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """The position of `first` relative to `second`, along the axis of the larger separation."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _cell(coordinate: float) -> int:
    return 0 if coordinate < CELL else 2 if coordinate > 1 - CELL else 1


def _held_out(*combination: str) -> bool:
    # Python's own hash of strings differs between runs; SHA-256 does not.
    return hashlib.sha256("/".join(combination).encode()).digest()[0] % 10 == 0


# (kind, colour, fill, size), a list per split
COMBINATIONS: dict[str, list[tuple[str, str, str, str]]] = {
    split: [c for c in itertools.product(KINDS, COLOURS, FILLS, SIZES) if _held_out(*c) == (split == "held_out")]
    for split in get_args(Split)
}


def _one(rng: np.random.Generator, split: Split, background: str) -> Scene:
    kind, colour, fill, size = pick(rng, COMBINATIONS[split])
    radius = rng.uniform(*SIZES[size])
    inset = REACH * radius + MARGIN
    x, y = (np.clip(rng.uniform(*pick(rng, (LOW, MIDDLE, HIGH))), inset, 1 - inset) for _ in range(2))
    return Scene(background, (Object(kind, colour, size, fill, float(x), float(y), radius),))


def _two(rng: np.random.Generator, split: Split, background: str) -> Scene:
    """Two small or medium objects side by side or stacked, with a gap; they differ in kind or colour."""
    candidates = {s: [c for c in COMBINATIONS[s] if c[3] != "large"] for s in {split, "train"}}
    first = pick(rng, candidates[split])
    second = first
    while second[:2] == first[:2]:
        second = pick(rng, candidates["train"])  # one new combination at a time
    name = pick(rng, RELATIONS)
    # The gap is at least 0.74 - 0.26 - 2 · 0.185 · REACH = 0.06.
    near, far = rng.uniform(0.22, 0.26), rng.uniform(0.74, 0.78)
    along = (near, far) if name in ("left of", "above") else (far, near)
    common = rng.uniform(0.26, 0.74)
    across = common + rng.uniform(-0.03, 0.03, size=2)
    objects = []
    for (kind, colour, fill, size), a, b in zip((first, second), along, across):
        x, y = (a, b) if name in ("left of", "right of") else (b, a)
        objects.append(Object(kind, colour, size, fill, float(x), float(y), rng.uniform(*SIZES[size])))
    return Scene(background, tuple(objects), name)


def pick(rng: np.random.Generator, choices):
    """A uniformly random element of a sequence."""
    return choices[int(rng.integers(len(choices)))]

"""An exact reader for `shapes` images: detects the objects and compares them with the attributes stated by a caption.

No learned components. The background is the median colour of the border. shapes_fit.py fits rasterised objects to the
pixels that differ from it; here the fits become attribute words, which are compared with the caption's.

`read` returns the detections, `matches` the verdict against a caption's `stated`.
"""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float, Num
from PIL import Image

from jaxdiff.data.shapes_caption import Stated, StatedObject
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, SIZES, position, relation
from jaxdiff.evaluation.shapes_fit import Fit, explain

WORKING = 128  # larger images are averaged down to this side: no detail of `shapes` is finer
EXPLAINED = 0.85  # an object whose best candidate explains less of its energy has no kind and no fill
COLOUR_ERROR = 0.22  # an object further than this from every palette colour has no colour
SPECK = 0.045  # half side, in image sides, below which a detection is ignored


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object in an image. `kind`, `fill`, `colour` are None if the pixels match none of the dataset's values.

    `x`, `y`, `radius` are fractions of the image's side; `explained`: the fraction of its energy that its kind
    explains.
    """

    kind: str | None
    colour: str | None
    size: str
    fill: str | None
    position: str
    x: float
    y: float
    radius: float
    explained: float


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects in an image, by descending energy, and its background; None if it matches none of the dataset's."""

    background: str | None
    objects: tuple[Detection, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """For each stated attribute, whether the detected one is equal ("count": the number of objects)."""

    checks: dict[str, bool]

    @property
    def right(self) -> bool:
        """Whether all stated attributes match."""
        return all(self.checks.values())


def read(image: Num[np.ndarray, "h w 3"]) -> Detections:
    """The objects and the background of a square image: uint8, or float in [-1, 1]; 64 pixels a side or more."""
    pixels = _working(image)
    ground, noise = _background(pixels)
    fits = [f for f in explain(pixels - ground, noise) if f.half > SPECK * len(pixels)]
    fits.sort(key=lambda f: -f.energy)
    return Detections(_nearest(ground, BACKGROUNDS), tuple(_detection(f, ground, len(pixels)) for f in fits))


def matches(image: Num[np.ndarray, "h w 3"], stated: Stated) -> Verdict:
    """The verdict on an image for the attributes stated by a caption."""
    return compare(read(image), stated)


def compare(reading: Detections, stated: Stated) -> Verdict:
    """The verdict on detections. Objects are paired with the stated ones in the best order."""
    checks = {"count": len(reading.objects) == len(stated.objects)}
    if stated.background is not None:
        checks["background"] = reading.background == stated.background
    candidates = [*reading.objects[: len(stated.objects)], *[None] * (len(stated.objects) - len(reading.objects))]
    pairings = (_agreement(order, stated) for order in itertools.permutations(candidates))
    return Verdict(checks | max(pairings, key=lambda agreement: sum(agreement.values())))


def _agreement(detections: tuple[Detection | None, ...], stated: Stated) -> dict[str, bool]:
    checks: dict[str, bool] = {}
    for f, s in zip(detections, stated.objects):
        for field in dataclasses.fields(StatedObject):
            value = getattr(s, field.name)
            if value is not None:
                seen = f is not None and getattr(f, field.name) == value
                checks[field.name] = checks.get(field.name, True) and seen
    if stated.relation is not None:
        places = [(f.x, f.y) for f in detections if f is not None]
        checks["relation"] = len(places) == len(detections) and relation(*places) == stated.relation
    return checks


def _working(image: Num[np.ndarray, "h w 3"]) -> Float[np.ndarray, "m m 3"]:
    """The image in [0, 1], averaged down to the working size."""
    if image.shape[0] != image.shape[1] or image.shape[0] < 64:
        raise ValueError(
            f"an image to read is square and at least 64 pixels a side, not {image.shape[1]}x{image.shape[0]}"
        )
    scale, shift = (255.0, 0.0) if image.dtype == np.uint8 else (2.0, 0.5)
    side, factor = len(image), len(image) // WORKING
    if side > WORKING and side % WORKING == 0:
        image = image.reshape(WORKING, factor, -1).mean(1, dtype=np.float32)
        image = image.reshape(WORKING, WORKING, factor, 3).mean(2)
    elif side > WORKING:
        channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(image, -1, 0)]
        image = np.stack([np.asarray(c.resize((WORKING, WORKING), Image.Resampling.BOX)) for c in channels], -1)
    return image.astype(np.float32) / np.float32(scale) + np.float32(shift)


def _background(image: Float[np.ndarray, "m m 3"]) -> tuple[Float[np.ndarray, "3"], float]:
    """The colour of the border and the standard deviation of its noise, both from medians."""
    frame = np.ones(image.shape[:2], bool)
    width = max(1, len(image) // 48)
    frame[width:-width, width:-width] = False
    border = image[frame]
    colour = np.median(border, axis=0)
    return colour, 1.48 * float(np.median(np.abs(border - colour)))


def _detection(fit: Fit, ground: Float[np.ndarray, "3"], side: int) -> Detection:
    """A fit in the words of the dataset."""
    known = fit.explained >= EXPLAINED
    x, y, radius = (float(v) / side for v in (fit.x, fit.y, fit.radius))
    return Detection(
        kind=fit.kind if known else None,
        colour=_colour(fit.difference, ground),
        size=min(SIZES, key=lambda name: abs(math.log(radius / math.sqrt(math.prod(SIZES[name]))))),
        fill=fit.fill if known else None,
        position=position(x, y),
        x=x,
        y=y,
        radius=radius,
        explained=fit.explained,
    )


def _colour(difference: Float[np.ndarray, "3"], ground: Float[np.ndarray, "3"]) -> str | None:
    """The palette colour with the nearest contrast to the background, allowing a factor of 0.8 to 1.1."""
    errors = {}
    for name, rgb in COLOURS.items():
        contrast = np.array(rgb, np.float32) / 255 - ground
        coverage = np.clip(difference @ contrast / (contrast @ contrast), 0.8, 1.1)
        errors[name] = math.dist(difference, coverage * contrast)
    name = min(errors, key=errors.__getitem__)
    return name if errors[name] < COLOUR_ERROR else None


def _nearest(colour: Float[np.ndarray, "3"], palette: dict[str, tuple[int, int, int]]) -> str | None:
    errors = {name: math.dist(colour, np.array(rgb) / 255) for name, rgb in palette.items()}
    name = min(errors, key=errors.__getitem__)
    return name if errors[name] < COLOUR_ERROR else None

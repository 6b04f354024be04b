"""`rainbow`, the composition benchmark: all combinations of six attributes at 32×32, a minority for training.

4 scales × 2 fills × 3 shadings × 12 colours × 8 shapes × 4 rotations give 9,216 captioned images, each of one object
centred on white. A model trained on 30 % of them that samples the others correctly composes attributes. The idea and
the counts come from the DALL·E 1 community's notebook of that name; shapes, words and pixels are our own.

    builder = rainbow.prepare("runs/data")
    source = sources.open(sources.Rainbow(), 32, "test", "runs/data")
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, UInt8
from PIL import Image

from jaxdiff.data import shapes_scene
from jaxdiff.data.array_records import full_disk_is_an_os_error
from jaxdiff.data.shapes_draw import OUTLINES, Grid
from jaxdiff.data.tfds_sets import quiet

SIDE = 32
SCALES = {"tiny": 5.5, "small": 8.0, "medium": 10.5, "large": 13.0}
"""Radii in pixels; an outline extends at most 1.2 radii from its centre."""
FILLS = ("filled", "outlined")
SHADINGS = ("plain", "striped", "dotted")
COLOURS = {**shapes_scene.COLOURS, "brown": (120, 70, 20), "grey": (140, 140, 140), "black": (0, 0, 0), "rainbow": None}
"""The rows of `rainbow` cycle through the first seven."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "bar", "arrow")
ROTATIONS = (0, 90, 180, 270)
"""Degrees, counterclockwise."""
STROKE = 1.6
"""Width of an outline in pixels."""
TRAINED = 0.3
"""The fraction used for training."""

Split = Literal["train", "test"]
RainbowImage = UInt8[np.ndarray, "32 32 3"]


@dataclasses.dataclass(frozen=True)
class Attributes:
    """The attributes of an image, in the words of its caption."""

    scale: str
    fill: str
    shading: str
    colour: str
    shape: str
    rotation: int

    @property
    def caption(self) -> str:
        """`a tiny outlined dotted red arrow rotated 90 degrees`; `plain` and a rotation of 0 are omitted."""
        shading = "" if self.shading == "plain" else f" {self.shading}"
        rotated = f" rotated {self.rotation} degrees" if self.rotation else ""
        return f"a {self.scale} {self.fill}{shading} {self.colour} {self.shape}{rotated}"


EVERY = tuple(itertools.starmap(Attributes, itertools.product(SCALES, FILLS, SHADINGS, COLOURS, SHAPES, ROTATIONS)))
"""All combinations; image i of the dataset shows the i-th."""


def draw(attributes: Attributes) -> RainbowImage:
    """Rasterise without anti-aliasing: rotate, then shade and colour by rows and columns of the image."""
    inside = np.rot90(_shape(attributes.scale, attributes.fill, attributes.shape), attributes.rotation // 90)
    y, x = np.indices((SIDE, SIDE))
    kept = {"plain": True, "striped": y % 2 == 0, "dotted": (x + y) % 2 == 0}[attributes.shading]
    bands = [rgb for rgb in COLOURS.values() if rgb][:7]
    rows = bands if attributes.colour == "rainbow" else [COLOURS[attributes.colour]]
    colour = np.array(rows, np.uint8)[y % len(rows)]
    return np.where((inside & kept)[..., None], colour, np.uint8(255))


def split(which: Split, fraction: float = TRAINED, seed: int = 0) -> tuple[int, ...]:
    """Indices into EVERY. train: a random fraction, without replacement. test: the others whose image is not among the
    training images (a rotation can leave a shape as it is)."""
    order = np.random.default_rng(seed).permutation(len(EVERY))
    trained = order[: round(fraction * len(EVERY))]
    if which == "train":
        return tuple(int(i) for i in trained)
    seen = {draw(EVERY[i]).tobytes() for i in trained}
    return tuple(int(i) for i in order[len(trained) :] if draw(EVERY[i]).tobytes() not in seen)


def prepare(data_dir: str | Path, seed: int = 0) -> "RainbowShapes":
    """The builder; its records are written below `data_dir` unless they exist."""
    with quiet():
        config = RainbowConfig(seed=seed)
        listed = config.name in [other.name for other in RainbowShapes.BUILDER_CONFIGS]
        builder = RainbowShapes(
            config=config.name if listed else config, data_dir=str(data_dir), file_format="array_record"
        )
        with full_disk_is_an_os_error(data_dir):
            builder.download_and_prepare()
    return builder


@dataclasses.dataclass(kw_only=True)
class RainbowConfig(tfds.core.BuilderConfig):
    """`seed`: of the training split."""

    name: str = ""  # from the seed
    seed: int = 0

    def __post_init__(self):
        self.name = f"seed{self.seed}"


class RainbowShapes(tfds.core.GeneratorBasedBuilder):
    """Captioned images of one object, all combinations of six attributes, a random 30 % of them for training."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [RainbowConfig()]  # noqa: RUF012 (the name that TFDS reads)

    def _info(self) -> tfds.core.DatasetInfo:
        names = {"scale": SCALES, "fill": FILLS, "shading": SHADINGS, "colour": COLOURS, "shape": SHAPES}
        names["rotation"] = [str(rotation) for rotation in ROTATIONS]
        features = {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "index": np.int64,  # among all combinations
            **{name: tfds.features.ClassLabel(names=list(values)) for name, values in names.items()},
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict:
        return {which: self._generate_examples(which) for which in ("train", "test")}

    def _generate_examples(self, which: Split) -> Iterator[tuple[int, dict]]:
        for place, index in enumerate(split(which, seed=self.builder_config.seed)):
            attributes = EVERY[index]
            png = io.BytesIO()
            Image.fromarray(draw(attributes)).save(png, format="png")
            png.seek(0)
            labels = {**dataclasses.asdict(attributes), "rotation": str(attributes.rotation)}
            yield place, {"image": png, "caption": attributes.caption, "index": index, **labels}


@functools.cache
def _shape(scale: str, fill: str, shape: str) -> Bool[np.ndarray, "32 32"]:
    """The pixels whose centres lie inside the shape, before rotation."""
    radius = SCALES[scale]
    centres = ((np.arange(SIDE) + 0.5 - SIDE / 2) / radius).astype(np.float32)
    distance = {**OUTLINES, "bar": _bar, "arrow": _arrow}[shape](*np.meshgrid(centres, centres)) * radius
    return (distance <= 0) & ((distance > -STROKE) if fill == "outlined" else True)


def _bar(x: Grid, y: Grid) -> Grid:
    return _polygon(x, y, ((-0.47, -1.1), (0.47, -1.1), (0.47, 1.1), (-0.47, 1.1)))


def _arrow(x: Grid, y: Grid) -> Grid:
    head, shaft = 0.95, 0.4
    right = ((head, 0.0), (shaft, 0.0), (shaft, 1.1))
    return _polygon(x, y, ((0.0, -1.1), *right, *((-x, y) for x, y in reversed(right))))


def _polygon(x: Grid, y: Grid, corners: tuple[tuple[float, float], ...]) -> Grid:
    """Signed distance to a polygon, negative inside: the nearest edge, and the parity of ray crossings."""
    nearest, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in itertools.pairwise((*corners, corners[0])):
        t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return np.where(inside, -nearest, nearest)

"""The user's own images: image to image, inpainting, super-resolution."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.options.sampling import each, unit_of
from jaxdiff.core.products import ImageSpec
from jaxdiff.data.images import Unreadable, decode, to_float
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import INPUT, After, Pipeline


@dataclass(frozen=True)
class InitImageOptions:
    """Your own image, as an initial image or as the input of super-resolution."""

    image: Path | None = None
    """Initial image: each stage adds noise to it and runs only the last steps, by --strength. It sets the sampled size,
    rounded to multiples of the stride, unless --size is given."""
    strength: str = ""
    """Fraction of the steps to run, above 0 and up to 1, for all stages or per stage; default: 0.7 for the base (1 with
    a mask), 0.8 for the other stages."""
    mask: Path | None = None
    """Mask of the same size as --image, with the same EXIF rotation: white is resampled, black is kept, transparent
    counts as white."""
    enlarge: Path | None = None
    """Input image of super-resolution instead of the base's sample, or of an upscaler; of any size."""
    enlarge_from: int | None = None
    """Resolution of the stage that it replaces; default: the base's."""

    def check(self) -> None:
        """ValueError for conflicting settings or unreadable images, before weights are read."""
        for name in ("strength", "mask"):
            if getattr(self, name) and self.image is None:
                raise ValueError(f"--{name} is for an image to begin with: give one with --image")
        if self.enlarge is not None and self.image is not None:
            raise ValueError("--enlarge and --image: one image at a time")
        if self.enlarge_from is not None and self.enlarge is None:
            raise ValueError("--enlarge-from is for an image to enlarge: give one with --enlarge")
        for path in (self.image, self.mask, self.enlarge):
            if path is not None:
                read(path)

    def begin(self, model: Pipeline) -> InitImage | None:
        """The initial image of all stages; None if absent. ValueError naming a bad image or value."""
        if self.image is None:
            return None
        takers = sum(box.takes_init for box in model.boxes)
        strengths = each("strength", self.strength, takers, float)
        usual = [1.0 if self.mask else 0.7, *[0.8] * (takers - 1)]
        chosen = tuple(own if given is None else given for given, own in zip(strengths, usual))
        mask = None if self.mask is None else read(self.mask).mean(-1) >= 0.0
        image = read(self.image)
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(f"--mask {self.mask}: {_size(mask)} pixels, but --image has {_size(image)}")
        return InitImage(image, chosen, mask)

    def size(self, model: Pipeline) -> tuple[int, int] | None:
        """Height and width of the base's images: the initial image's shape, its shorter side at the base's resolution.
        None without an initial image."""
        if self.image is None:
            return None
        height, width = read(self.image).shape[:2]
        side, stride = model.generator.side, unit_of(model)
        scale = side / min(height, width)
        return tuple(max(stride, round(length * scale / stride) * stride) for length in (height, width))


@dataclass(frozen=True)
class Enlarged:
    """An input of super-resolution, edge-padded to a size that all stages can sample."""

    box: int
    image: np.ndarray
    height: int
    width: int

    def after(self, count: int) -> After:
        """The image for each of `count` prompts as the output of its box, for `SampleOptions`."""
        return After(self.box, np.broadcast_to(self.image, (count, *self.image.shape)))

    def cut(self, sampled: np.ndarray) -> np.ndarray:
        """Crop the padding from a sample."""
        factor = sampled.shape[1] // self.image.shape[0]
        return sampled[:, : self.height * factor, : self.width * factor]


def enlarged(settings: InitImageOptions, model: Pipeline) -> Enlarged | None:
    """The image to enlarge; None if absent. ValueError if no stage can enlarge it, or if one starts from an image and
    there is none."""
    upscaler = isinstance(model.generator.consumes, ImageSpec)
    if settings.enlarge is None:
        if upscaler:
            raise ValueError("these weights enlarge an image: give one with --enlarge")
        return None
    if upscaler:
        if settings.enlarge_from is not None:
            raise ValueError(f"--enlarge-from {settings.enlarge_from}: these weights enlarge images of any size")
        return _padded(settings.enlarge, INPUT, unit_of(model))
    side = model.sides[0] if settings.enlarge_from is None else settings.enlarge_from
    if side not in model.sides[:-1]:
        sizes = ", ".join(map(str, model.sides[:-1])) or "nothing"
        raise ValueError(f"--enlarge: no stage enlarges {side}; those of this cascade enlarge {sizes}")
    units, box = [1], model.sides.index(side)
    for upper in model.decoders[box:]:
        stride = upper.produces.stride
        units.append(stride // math.gcd(stride, upper.side // side))
    return _padded(settings.enlarge, box, math.lcm(*units))


def _padded(path: Path, box: int, unit: int) -> Enlarged:
    """The image with sides that are multiples of `unit`."""
    image = read(path)
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % unit), (0, -width % unit), (0, 0)), mode="edge")
    return Enlarged(box, padded, height, width)


def read(path: Path) -> np.ndarray:
    """Read an image file as (h w 3) in [-1, 1]. ValueError or OSError naming the file."""
    try:
        return to_float(decode(path.read_bytes()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such image") from error
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error


def _size(array: np.ndarray) -> str:
    return "×".join(map(str, array.shape[:2]))

"""The user's own images: to begin with (image to image), to keep in part (inpainting), to enlarge."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.options.sampling import each
from jaxdiff.data.images import Unreadable, decode, to_float
from jaxdiff.systems.pipeline import After, InitImage, Pipeline


@dataclass(frozen=True)
class InitImageOptions:
    """An image of one's own: sampling begins with it, or it is what is enlarged."""

    image: Path | None = None
    """An image to begin with: each stage noises it and takes the last of its steps, as many as --strength says. Its
    shape is that of what is sampled, to the nearest multiples of the stride, unless --size says another."""
    strength: str = ""
    """The fraction of the steps that are taken, above 0 and up to 1, for all stages or each; when left out, 0.7 for the
    base (1 with a mask) and 0.8 for the others."""
    mask: Path | None = None
    """An image of the same size, turned upright as --image is: white is sampled anew, black is kept. What is
    transparent counts as white."""
    enlarge: Path | None = None
    """An image for super-resolution, in place of the base's; of any size."""
    enlarge_from: int | None = None
    """The resolution of the stage in whose place it stands; the base's when left out."""

    def check(self) -> None:
        """ValueError for settings that do not go together, or images that cannot be read, before weights are."""
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
        """What the stages begin with. ValueError that names an image or value that cannot be used."""
        if self.image is None:
            return None
        strengths = each("strength", self.strength, len(model.boxes), float)
        usual = [1.0 if self.mask else 0.7, *[0.8] * len(model.decoders)]
        chosen = tuple(own if given is None else given for given, own in zip(strengths, usual))
        mask = None if self.mask is None else read(self.mask).mean(-1) >= 0.0
        image = read(self.image)
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(f"--mask {self.mask}: {_size(mask)} pixels, but --image has {_size(image)}")
        return InitImage(image, chosen, mask)

    def size(self, model: Pipeline) -> tuple[int, int] | None:
        """Of the base's images, in the shape of the given one: its shorter side is the base's resolution."""
        if self.image is None:
            return None
        height, width = read(self.image).shape[:2]
        side, stride = model.generator.side, model.generator.produces.stride
        scale = side / min(height, width)
        return tuple(max(stride, round(length * scale / stride) * stride) for length in (height, width))


@dataclass(frozen=True)
class Enlarged:
    """An image on its way through super-resolution, its edges repeated up to a size that all stages can sample."""

    box: int
    image: np.ndarray
    height: int
    width: int

    def after(self, count: int) -> After:
        """For `SampleOptions`: the same image for each of `count` prompts, as if that box had produced it."""
        return After(self.box, np.broadcast_to(self.image, (count, *self.image.shape)))

    def cut(self, sampled: np.ndarray) -> np.ndarray:
        """What was sampled, without the edges."""
        factor = sampled.shape[1] // self.image.shape[0]
        return sampled[:, : self.height * factor, : self.width * factor]


def enlarged(settings: InitImageOptions, model: Pipeline) -> Enlarged | None:
    """The image to enlarge. ValueError where there is no stage for it."""
    if settings.enlarge is None:
        return None
    side = model.sides[0] if settings.enlarge_from is None else settings.enlarge_from
    if side not in model.sides[:-1]:
        sizes = ", ".join(map(str, model.sides[:-1])) or "nothing"
        raise ValueError(f"--enlarge: no stage enlarges {side}; those of this cascade enlarge {sizes}")
    units, box = [1], model.sides.index(side)
    for upper in model.decoders[box:]:
        stride = upper.produces.stride
        units.append(stride // math.gcd(stride, upper.side // side))
    unit = math.lcm(*units)
    image = read(settings.enlarge)
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % unit), (0, -width % unit), (0, 0)), mode="edge")
    return Enlarged(box, padded, height, width)


def read(path: Path) -> np.ndarray:
    """An image file as (h w 3) in [-1, 1]. ValueError, or OSError, naming it."""
    try:
        return to_float(decode(path.read_bytes()))
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error


def _size(array: np.ndarray) -> str:
    return "×".join(map(str, array.shape[:2]))

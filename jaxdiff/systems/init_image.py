"""The initial image of image to image and inpainting, as an initial product of each box of a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.core.products import ImageSpec
from jaxdiff.models.boxes import Box, Encoding
from jaxdiff.models.start import InitProduct, first_step

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class InitImage:
    """Initial image for image to image and, with a mask, inpainting, for every box that takes one.

    image: (h, w, c) in [-1, 1], of any size; each box gets it at its own size, or encoded by the next decoder.
    strengths: for each of these boxes, the fraction of its steps that are run, in (0, 1]. mask: (h, w), True where
    sampled, False where the image is kept.
    """

    image: np.ndarray
    strengths: tuple[float, ...]
    mask: np.ndarray | None = None

    def check(self, boxes: Sequence[Box], numbers: Sequence[int]) -> None:
        """ValueError unless it suits a pipeline of these boxes. numbers: those of the boxes that run."""
        takers = [box for box in boxes if box.takes_init]
        if len(self.strengths) != len(takers):
            raise ValueError(f"{len(self.strengths)} strengths for {len(takers)} stages: give one for each")
        if self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"an init_image has the shape h×w×3, not {_times(self.image.shape)}")
        if self.mask is not None and self.mask.shape != self.image.shape[:2]:
            have, want = _times(self.mask.shape), _times(self.image.shape[:2])
            raise ValueError(f"a mask of {have} pixels for an image of {want}")
        for number in numbers:
            box = boxes[number]
            if not box.takes_init:
                continue
            first_step(self._strength(boxes, number), box.steps)
            if not isinstance(box.produces, ImageSpec):
                following = boxes[number + 1 : number + 2]
                if not following or not isinstance(following[0], Encoding):
                    raise ValueError(
                        f"the {box.side} stage produces {box.produces}, and no decoder encodes an image to them"
                    )

    def product(self, boxes: Sequence[Box], number: int, size: Size, count: int) -> InitProduct:
        """The initial product of a box at this size, for each of `count` samples."""
        strength, box = self._strength(boxes, number), boxes[number]
        pixels = _pixels(boxes, number, size)
        image = jnp.clip(jax.image.resize(jnp.asarray(self.image, jnp.float32), (*pixels, 3), "cubic"), -1.0, 1.0)
        value = jnp.broadcast_to(*_batch(_encoded(boxes, number, image), count))
        if self.mask is None:
            return InitProduct(value, strength)
        sampled = jax.image.resize(jnp.asarray(self.mask, jnp.float32)[..., None], (*pixels, 1), "linear") >= 0.5
        # A latent is sampled if its first pixel is, as in diffusers.
        mask = sampled[:: pixels[0] // size[0], :: pixels[1] // size[1]].astype(jnp.float32)
        masked = None
        if box.reads_mask:
            masked = jnp.broadcast_to(*_batch(_encoded(boxes, number, jnp.where(sampled, 0.0, image)), count))
        return InitProduct(value, strength, jnp.broadcast_to(*_batch(mask, count)), masked)

    def _strength(self, boxes: Sequence[Box], number: int) -> float:
        return self.strengths[sum(box.takes_init for box in boxes[:number])]


def _batch(value: Array, count: int) -> tuple[Array, tuple[int, ...]]:
    return value, (count, *value.shape)


def _pixels(boxes: Sequence[Box], number: int, size: Size) -> Size:
    """The size of the image that the following decoders turn a product of this size into, up to the first image."""
    while not isinstance(boxes[number].produces, ImageSpec):
        number += 1
        size = size[0] * boxes[number].factor, size[1] * boxes[number].factor
    return size


def _encoded(boxes: Sequence[Box], number: int, image: Array) -> Array:
    """The image as a product of a box: unchanged, or encoded by the next decoder."""
    if isinstance(boxes[number].produces, ImageSpec):
        return image
    decoder = boxes[number + 1]
    assert isinstance(decoder, Encoding)  # see `check`
    return decoder.encode(_encoded(boxes, number + 1, image)[None])[0]


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

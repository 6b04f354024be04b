"""Hints of ControlNets in sampling: what a caller gives, checked, and as the arrays that a compiled program reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.models.conditioners import HintConditioner
from jaxdiff.nets.conditioning import Hint


@dataclass(frozen=True, eq=False)
class HintImage:
    """The hint of one ControlNet.

    image: floating, in [0, 1] (an edge map, a pose, depth; not in [-1, 1]), of the size of the sampled image: (h w c)
    for all samples, or (n h w c), one for each. weight: factor of the ControlNet's residuals; 0 turns it off.
    start, end: it acts in the steps that lie between these fractions of those that are run.
    guess: for sampling without a prompt. Only the conditional branch of guidance gets the hint, and the residuals of
    the first layers weigh less, from 0.1 to 1 in the middle.
    """

    image: Any
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self):
        if not 0.0 <= self.start < self.end <= 1.0:
            raise ValueError(f"a hint acts from a start to a later end in [0, 1], not from {self.start} to {self.end}")
        if self.image.ndim not in (3, 4):
            raise ValueError(f"a hint has the shape h×w×c or n×h×w×c, not {'×'.join(map(str, self.image.shape))}")

    def of_rows(self, rows: np.ndarray) -> "HintImage":
        """The hint of the samples with these numbers, one image for each."""
        if self.image.ndim == 4:
            return replace(self, image=jnp.asarray(self.image)[rows])
        image = jnp.asarray(self.image)
        return replace(self, image=jnp.broadcast_to(image, (len(rows), *image.shape)))


def check_hints(
    reads: HintConditioner | None, hints: Sequence[HintImage], size: tuple[int, int], count: int, what: str
) -> None:
    """ValueError unless these are hints for `count` samples of this size, one for each ControlNet. what: names the
    model in messages. The range of a traced hint is not checked."""
    wanted = 0 if reads is None else len(reads.channels)
    if len(hints) != wanted:
        raise ValueError(f"{len(hints)} hints: {what} has {wanted} ControlNets, and takes a hint for each")
    for i, (hint, channels) in enumerate(zip(hints, () if reads is None else reads.channels)):
        assert reads is not None  # it has channels
        reads.check_image(hint.image, channels, size, f"hint {i}")
        if hint.image.ndim == 4 and len(hint.image) != count:
            raise ValueError(f"hint {i} has {len(hint.image)} images, for {count} samples")
        if isinstance(hint.image, jax.core.Tracer):
            continue
        low, high = float(hint.image.min()), float(hint.image.max())
        if not jnp.issubdtype(hint.image.dtype, jnp.floating) or not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"hint {i} is {hint.image.dtype} from {low:g} to {high:g}: hints are floating, in [0, 1]")


def traced(hints: Sequence[HintImage], count: int, times: Float[Array, " n"]) -> tuple[Hint, ...]:
    """The hints as arrays. times: at the n − 1 steps that are run, and the end. ValueError if one acts in no step."""
    return tuple(_traced(hint, count, times) for hint in hints)


def _traced(hint: HintImage, count: int, times: Array) -> Hint:
    image = jnp.broadcast_to(jnp.asarray(hint.image, jnp.float32), (count, *hint.image.shape[-3:]))
    weight, fade = (jnp.full(count, value, jnp.float32) for value in (hint.weight, float(hint.guess)))
    if (hint.start, hint.end) == (0.0, 1.0):
        return Hint(image, weight, fade)
    steps = len(times) - 1
    acts = [i for i in range(steps) if i / steps >= hint.start and (i + 1) / steps <= hint.end]
    if not acts:
        raise ValueError(f"none of {steps} steps lies between {hint.start} and {hint.end}, where a hint acts")
    # Bounds are halfway to the neighbouring steps.
    high = jnp.inf if acts[0] == 0 else (times[acts[0] - 1] + times[acts[0]]) / 2
    low = -jnp.inf if acts[-1] == steps - 1 else (times[acts[-1]] + times[acts[-1] + 1]) / 2
    bounds = jnp.stack([jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)])
    return Hint(image, weight, fade, jnp.broadcast_to(bounds, (count, 2)))


def folded(image: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c2"]:
    """The image with this height and width, its blocks of pixels as channels."""
    (b, h, w, c), (rows, columns) = image.shape, size
    blocks = image.reshape(b, rows, h // rows, columns, w // columns, c)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1)


def unfolded(blocks: Float[Array, "b h w c"], channels: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `folded`, for square blocks and an image of `channels`."""
    b, rows, columns, c = blocks.shape
    side = round((c // channels) ** 0.5)
    image = blocks.reshape(b, rows, columns, side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return image.reshape(b, rows * side, columns * side, channels)

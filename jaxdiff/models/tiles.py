"""Apply a network to a large image in overlapping tiles, one at a time, so that memory does not grow with the image.

The tiles of each denoising step are blended before the next step (as in MultiDiffusion, arXiv 2302.08113) and share the
same noise, so neighbours agree at every step and no seams appear.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Tiles:
    """Square tiles of `side` pixels that overlap their neighbours by `overlap`; both multiples of the stride."""

    side: int = 256
    overlap: int = 32

    def __post_init__(self):
        if not 0 < 2 * self.overlap <= self.side:
            raise ValueError(
                f"tiles need an overlap above 0 and at most half their side {self.side}, not {self.overlap}"
            )


def in_tiles(
    network: Callable[..., Float[Array, "b h w o"]], images: tuple[Float[Array, "b h w _"], ...], tiles: Tiles
) -> Float[Array, "b h w o"]:
    """`network(*images)` in tiles; images and result have the same height and width.

    Every tile has the same shape, so the network is compiled once; an image smaller than a tile is one tile.
    """
    height, width = images[0].shape[1:3]
    sides = min(tiles.side, height), min(tiles.side, width)
    corners = jnp.asarray([(y, x) for y in starts(height, sides[0], tiles) for x in starts(width, sides[1], tiles)])
    window = jnp.asarray(ramp(sides[0], tiles)[:, None] * ramp(sides[1], tiles)[None, :])[None, :, :, None]

    def crops(y, x):
        return [jax.lax.dynamic_slice(p, (0, y, x, 0), (p.shape[0], *sides, p.shape[3])) for p in images]

    def add(i, sums):
        total, weight = sums
        y, x = corners[i]
        output = network(*crops(y, x)) * window
        return _add_at(total, output, y, x), _add_at(weight, window, y, x)

    channels = jax.eval_shape(lambda: network(*crops(0, 0))).shape[-1]
    empty = jnp.zeros((images[0].shape[0], height, width, channels)), jnp.zeros((1, height, width, 1))
    total, weight = jax.lax.fori_loop(0, len(corners), add, empty)
    return total / weight


def starts(length: int, side: int, tiles: Tiles) -> list[int]:
    """Start positions of tiles of `side` along `length`, spaced by the side less the overlap; the last ends at
    `length`."""
    if length <= side:
        return [0]
    step = side - tiles.overlap
    return [*range(0, length - side, step), length - side]


def ramp(side: int, tiles: Tiles) -> np.ndarray:
    """The weight of a tile's pixels along one axis: 1 inside, decreasing linearly, but never to 0, in the overlap."""
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0
    return np.minimum(1.0, distance / (tiles.overlap + 1)).astype(np.float32)


def _add_at(total: Array, part: Array, y: Array, x: Array) -> Array:
    at = (0, y, x, 0)
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, at, part.shape) + part, at)

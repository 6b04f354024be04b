"""An autoencoder's networks on large images in tiles, one at a time, so that memory does not grow with the image.

`Tiles` processes each tile as an image of its own and blends the overlaps linearly, as diffusers does: fast, but the
group norms see only the tile, so colours and contrast differ from tile to tile. `SeamlessTiles` gives the result of the
entire image: tiles are normalized with its statistics and overlap by all that a pixel depends on.

One program is compiled per tile shape, for all image sizes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.autoencoder import AutoencoderConfig, Part
from jaxdiff.nets.autoencoder_norms import EPSILON, Region


@dataclass(frozen=True)
class SeamlessTiles:
    """Tiles of `side` pixels with the statistics of the entire image.

    The coarse levels run on the entire image; their maps are as small as the latents. The fine levels run in tiles.
    Statistics of one group norm depend on those before it, so the tiles are processed repeatedly, until no mean or
    standard deviation changes by `tolerance` standard deviations or more: about five times for a trained decoder, at
    most as often as the network has norms.
    """

    side: int = 512
    tolerance: float = 5e-3

    def __post_init__(self):
        if self.side < 1 or self.tolerance < 0:
            raise ValueError(f"tiles need a side and a tolerance above 0, not {self.side} and {self.tolerance}")


def check_tiles(config: AutoencoderConfig, tiles: Tiles | SeamlessTiles) -> None:
    """ValueError if the network cannot be run in these tiles."""
    numbers = {"side": tiles.side} | ({"overlap": tiles.overlap} if isinstance(tiles, Tiles) else {})
    for name, pixels in numbers.items():
        if pixels % config.stride:
            raise ValueError(f"a tile {name} of {pixels} pixels is not a multiple of the stride {config.stride}")
    if isinstance(tiles, SeamlessTiles):
        if config.spatial_norm:
            raise ValueError("an autoencoder with spatial_norm does not run in seamless tiles: use tiles that overlap")
        reach = max(config.encoder_reach, config.decoder_reach)
        least = -(-(2 * reach + 1) * 2**config.coarse_level // config.stride) * config.stride
        if tiles.side < least:
            raise ValueError(
                f"seamless tiles of {tiles.side} pixels are too small: a pixel depends on {reach} features on each "
                f"side of it, so they need at least {least} pixels"
            )


def encode(
    config: AutoencoderConfig, params: dict, image: Float[Array, "b h w c"], tiles: Tiles | SeamlessTiles | None
) -> Float[Array, "b h2 w2 c2"]:
    """The encoder's output (`Autoencoder.encode`). Only images larger than a tile are split."""
    if tiles is None or max(image.shape[1:3]) <= tiles.side:
        return _run(config, "encode", params, image)
    if isinstance(tiles, Tiles):
        side, overlap = tiles.side // config.stride, tiles.overlap // config.stride
        sizes = _Blending(tiles.side, tiles.side - tiles.overlap, overlap, side - overlap)
        return _blended(partial(_run, config, "encode", params), image, sizes)
    unit = 2**config.coarse_level
    fine = partial(_fine, config, "encode", params)
    features = _seamless(fine, image, _Scales(tiles, tiles.side // unit, config.encoder_reach, unit, 1))
    return _coarse(config, "encode", params, features)


def decode(
    config: AutoencoderConfig, params: dict, code: Float[Array, "b h w c"], tiles: Tiles | SeamlessTiles | None
) -> Float[Array, "b h2 w2 c2"]:
    """The image of a code after quantization (`Autoencoder.decode`). Only images larger than a tile are split."""
    if tiles is None or max(code.shape[1:3]) * config.stride <= tiles.side:
        return _run(config, "decode", params, code)
    if isinstance(tiles, Tiles):
        side, overlap = tiles.side // config.stride, tiles.overlap // config.stride
        sizes = _Blending(side, side - overlap, tiles.overlap, tiles.side - tiles.overlap)
        return _blended(partial(_run, config, "decode", params), code, sizes)
    unit = 2**config.coarse_level
    features = _coarse(config, "decode", params, code)
    fine = partial(_fine, config, "decode", params)
    return _seamless(fine, features, _Scales(tiles, tiles.side // unit, config.decoder_reach, 1, unit))


@partial(jax.jit, static_argnums=(0, 1))
def _run(config: AutoencoderConfig, method: str, params: dict, x: Array) -> Array:
    return cast(Array, config.module().apply({"params": params}, x, method=method))


@partial(jax.jit, static_argnums=(0, 1))
def _coarse(config: AutoencoderConfig, method: str, params: dict, x: Array) -> Array:
    return cast(Array, config.module().apply({"params": params}, x, Part.COARSE, method=method))


class _Blending(NamedTuple):
    """Side of an input tile, distance between their starts, pixels that are blended in the output, and pixels of an
    output tile that are kept, from its start."""

    side: int
    step: int
    blend: int
    keep: int


def _blended(network: Callable[[Array], Array], x: Array, sizes: _Blending) -> Array:
    """The network's output in tiles; each is blended with the one above and then with the one left of it, which are
    already blended. Tiles at the right and lower border are smaller."""
    height, width = x.shape[1:3]
    strips: list[Array] = []
    above: list[Array] = []
    for top in range(0, height, sizes.step):
        row: list[Array] = []
        for column, left in enumerate(range(0, width, sizes.step)):
            tile = network(_crop(x, (top, left), (min(sizes.side, height - top), min(sizes.side, width - left))))
            tile = _blend(above[column], tile, sizes.blend, 1) if above else tile
            tile = _blend(row[-1], tile, sizes.blend, 2) if row else tile
            row.append(tile)
        strips.append(jnp.concatenate([tile[:, : sizes.keep, : sizes.keep] for tile in row], axis=2))
        above = row
    return jnp.concatenate(strips, axis=1)


@partial(jax.jit, static_argnums=(2, 3))
def _blend(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """The tile, whose first pixels along `axis` change linearly from the last ones of the tile before it."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    weight = jnp.arange(extent) / extent
    weight = weight[:, None, None] if axis == 1 else weight[:, None]
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first, rest = jnp.split(tile, [extent], axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis)


def _crop(x: Array, start: tuple[int, int], size: tuple[int, int]) -> Array:
    return jax.lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *size, x.shape[3]))


class _Scales(NamedTuple):
    """side, reach: of a tile, in features of the coarse level. into, out: pixels per feature of the input and the
    output."""

    tiles: SeamlessTiles
    side: int
    reach: int
    into: int
    out: int


Fine = Callable[[Any, Array, Region], tuple[Array, Any]]
"""(statistics, input tile, region) → output tile and the statistics of the region."""


def _seamless(fine: Fine, x: Array, scales: _Scales) -> Array:
    """The output of the fine part for the entire image.

    In the first pass each tile has its own statistics. In later passes tiles have the pooled statistics of the pass
    before; the first group norm is then exact, in the next pass the second, and so on.
    """
    size = x.shape[1] // scales.into, x.shape[2] // scales.into
    areas = list(_areas(size, scales))
    first = _statistics_shapes(fine, x, areas[0], scales)
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), first)  # not used in the first pass
    norms = len(jax.tree.leaves(statistics)) // 2
    output: Array | None = None
    for number in range(norms + 2 if norms else 1):  # without statistics a tile is exact at once
        moments = []
        for area in areas:
            region = _region(area, own=number == 0)
            part, own = fine(statistics, _tile(x, area, scales), region)
            if output is None:
                output = jnp.zeros((len(x), *(scales.out * n for n in size), part.shape[-1]), part.dtype)
            output = _put(output, part, region, *(scales.out * n for n in area.start))
            moments.append((area.fraction, own))
        pooled = _pooled(moments)
        if number and _change(statistics, pooled) < scales.tiles.tolerance:
            break
        statistics = pooled
    assert output is not None  # there is at least one tile
    return output


class _Area(NamedTuple):
    """Start and size of a tile in features, the bounds of its region as fractions of the tile, and the fraction of the
    image that this is."""

    start: tuple[int, int]
    size: tuple[int, int]
    bounds: tuple[tuple[float, float], tuple[float, float]]
    fraction: float


def _areas(size: tuple[int, int], scales: _Scales) -> Iterator[_Area]:
    """Tiles of one shape whose regions cover the image once. At borders of the image a region includes the overlap."""
    sides = tuple(min(scales.side, length) for length in size)
    for tile in itertools.product(*(_spans(length, side, scales.reach) for length, side in zip(size, sides))):
        bounds = tuple(
            ((first - start) / side, (last - start) / side) for (start, first, last), side in zip(tile, sides)
        )
        fraction = math.prod((last - first) / length for (_, first, last), length in zip(tile, size))
        yield _Area((tile[0][0], tile[1][0]), (sides[0], sides[1]), (bounds[0], bounds[1]), fraction)


def _spans(length: int, side: int, reach: int) -> Iterator[tuple[int, int, int]]:
    """(start of the tile, start and end of its region) along one axis."""
    start, first = 0, 0
    while True:
        last = length if start + side >= length else start + side - reach
        yield start, first, last
        if last == length:
            return
        start, first = min(last - reach, length - side), last


def _region(area: _Area, own: bool) -> Region:
    rows, columns = (jnp.asarray(bounds, jnp.float32) for bounds in area.bounds)
    return Region(rows, columns, jnp.bool_(own))


def _tile(x: Array, area: _Area, scales: _Scales) -> Array:
    (top, left), (height, width) = area.start, area.size
    return _crop(x, (scales.into * top, scales.into * left), (scales.into * height, scales.into * width))


def _statistics_shapes(fine: Fine, x: Array, area: _Area, scales: _Scales) -> Any:
    return jax.eval_shape(fine, {}, jax.eval_shape(lambda x: _tile(x, area, scales), x), _region(area, True))[1]


@partial(jax.jit, static_argnums=(0, 1))
def _fine(
    config: AutoencoderConfig, method: str, params: dict, statistics: Any, tile: Array, region: Region
) -> tuple[Array, Any]:
    variables = {"params": params, "statistics": statistics}
    output, state = config.module().apply(variables, tile, Part.FINE, region, method=method, mutable=["moments"])
    return output, state.get("moments", {})


@partial(jax.jit, donate_argnums=0)
def _put(output: Array, part: Array, region: Region, top: Array, left: Array) -> Array:
    at = (0, top, left, 0)
    old = jax.lax.dynamic_slice(output, at, part.shape)
    return jax.lax.dynamic_update_slice(output, jnp.where(region.inside(*part.shape[1:3]), part, old), at)


def _pooled(moments: list[tuple[float, Any]]) -> Any:
    """Means and variances of the image from those of its areas, each with its fraction of the image."""

    def pool(*norms: dict[str, Any]) -> dict[str, np.ndarray]:
        means, variances = (
            np.stack([np.asarray(each[name], np.float64) for each in norms]) for name in ("mean", "variance")
        )
        weight = np.asarray(fractions).reshape(-1, *[1] * (means.ndim - 1))
        mean = (weight * means).sum(0)
        variance = (weight * (variances + (means - mean) ** 2)).sum(0)
        return {"mean": mean.astype(np.float32), "variance": variance.astype(np.float32)}

    fractions, trees = zip(*moments)
    return jax.tree.map(pool, *trees, is_leaf=_is_norm)


def _change(before: Any, after: Any) -> float:
    """The largest change of a mean or standard deviation, in standard deviations."""

    def change(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> float:
        deviation = np.sqrt(old["variance"] + EPSILON)
        changes = (new["mean"] - old["mean"]) / deviation, np.sqrt(new["variance"] + EPSILON) / deviation - 1.0
        return max(float(np.abs(each).max()) for each in changes)

    return max(jax.tree.leaves(jax.tree.map(change, before, after, is_leaf=_is_norm)))


def _is_norm(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"mean", "variance"}

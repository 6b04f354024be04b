"""The norms of an autoencoder: group norm, in tiles with the statistics of the rest of the image, layer norm of each
pixel, and MoVQ's."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.blocks import Dtype

EPSILON = 1e-6
"""Of every group norm."""


class Region(NamedTuple):
    """The area of a tile that belongs to it, and how it is normalized; overlaps belong to one tile each.

    rows, columns: start and end of the area, as fractions of the tile's sides. own: normalize with the statistics of
    this area; otherwise with those of the variable collection `statistics`. The area's statistics are stored in
    `moments`, in both cases.
    """

    rows: Float[Array, "2"]
    columns: Float[Array, "2"]
    own: Bool[Array, ""]

    def inside(self, height: int, width: int) -> Bool[Array, "1 h w 1"]:
        """Whether the pixels of a map of the tile belong to the area."""

        def along(length: int, bounds: Array) -> Array:
            centres = (jnp.arange(length) + 0.5) / length
            return (centres > bounds[0]) & (centres < bounds[1])

        return (along(height, self.rows)[:, None] & along(width, self.columns)[None, :])[None, :, :, None]


class GroupNorm(nn.Module):
    """Group norm; statistics in float32, per sample."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], region: Region | None = None) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        grouped = x.astype(jnp.float32).reshape(b, h, w, self.groups, c // self.groups)
        inside = None if region is None else region.inside(h, w)[..., None]
        mean = grouped.mean((1, 2, 4), where=inside)
        variance = ((grouped - mean[:, None, None, :, None]) ** 2).mean((1, 2, 4), where=inside)
        if region is not None:
            self.put_variable("moments", "mean", mean)
            self.put_variable("moments", "variance", variance)
            mean = jnp.where(region.own, mean, self.get_variable("statistics", "mean", mean))
            variance = jnp.where(region.own, variance, self.get_variable("statistics", "variance", variance))
        factor = jax.lax.rsqrt(variance + EPSILON)
        grouped = (grouped - mean[:, None, None, :, None]) * factor[:, None, None, :, None]
        return (grouped.reshape(x.shape) * scale + bias).astype(self.dtype)


class SpatialNorm(nn.Module):
    """Group norm, scaled and shifted at each place by 1×1 convolutions of the code there (MoVQ, arXiv 2209.09002)."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], code: Float[Array, "b h2 w2 z"]) -> Float[Array, "b h w c"]:
        y, code = normalized((self.groups, self.dtype, "norm"), x), code.astype(self.dtype)

        def at_each_place(name: str) -> Array:
            z = nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name=name)(code)
            return jnp.repeat(jnp.repeat(z, x.shape[1] // z.shape[1], axis=1), x.shape[2] // z.shape[2], axis=2)

        return y * at_each_place("scale") + at_each_place("offset")


def normalized(
    norm: tuple[int, Dtype, str],
    x: Float[Array, "b h w c"],
    region: Region | None = None,
    code: Float[Array, "b h2 w2 z"] | None = None,
) -> Float[Array, "b h w c"]:
    """A norm, within a compact module. norm: its groups (0: layer norm), compute type and name. code: for
    `SpatialNorm`."""
    groups, dtype, name = norm
    if code is not None:
        return SpatialNorm(groups, dtype, name=name)(x, code)
    if not groups:
        return nn.LayerNorm(EPSILON, dtype=dtype, use_fast_variance=False, name=name)(x)
    return GroupNorm(groups, dtype, name=name)(x, region)

"""The mesh axes over which activations are sharded. A network knows axis names only and uses the ambient mesh."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

ROWS = 2
"""Minimum rows of a feature map per device: with one, gradients of strided convolutions are silently wrong."""


def check_rows(rows: int, devices: int) -> None:
    """ValueError if a feature map of `rows` rows cannot be split over `devices` devices."""
    if devices > 1 and (rows % devices or rows < ROWS * devices):
        raise ValueError(
            f"a map of {rows} rows cannot be split over {devices} devices: each needs the same number of rows, "
            f"at least {ROWS}; use larger images, or fewer devices for their rows"
        )


@dataclass(frozen=True)
class ActivationSharding:
    """Names of mesh axes (`jax.set_mesh`) over which the activations between blocks are sharded.

    batch: the samples. spatial: the rows of images (spatial partitioning), for images too large for one device; the
    compiler exchanges the halos of convolutions. If both are empty, the compiler decides, and no mesh is needed.
    """

    batch: tuple[str, ...] = ()
    spatial: tuple[str, ...] = ()

    def images(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x with a sharding constraint. ValueError if a device would have less than `ROWS` rows."""
        if not self.batch and not self.spatial:
            return x
        check_rows(x.shape[1], self.sizes()[1])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(self.batch or None, self.spatial or None))

    def samples(self, x: Array) -> Array:
        """x (b …) with a sharding constraint of its samples."""
        return jax.lax.with_sharding_constraint(x, PartitionSpec(self.batch)) if self.batch else x

    def padded(self, wanted: int) -> int:
        """`wanted` samples rounded up to a multiple of the number of shards of a batch."""
        shards, _ = self.sizes()
        return -(-wanted // shards) * shards

    def sizes(self) -> tuple[int, int]:
        """The number of shards of a batch and of the rows of an image on the ambient mesh."""
        sizes = jax.sharding.get_abstract_mesh().shape
        batch, rows = (math.prod(sizes.get(name, 1) for name in names) for names in (self.batch, self.spatial))
        return batch, rows

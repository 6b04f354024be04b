"""Which mesh axes activations are split over. A network is told names, never a mesh: it uses the ambient one."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

ROWS = 2
"""Rows of a map that a device has at least: with one, gradients of strided convolutions are wrong, without an error."""


def check_rows(rows: int, devices: int) -> None:
    """ValueError where a map of so many rows cannot be split over so many devices."""
    if devices > 1 and (rows % devices or rows < ROWS * devices):
        raise ValueError(
            f"a map of {rows} rows cannot be split over {devices} devices: all need as many, and at least {ROWS}; "
            "take larger images, or fewer devices for their rows"
        )


@dataclass(frozen=True)
class ActivationSharding:
    """Names of mesh axes (`jax.set_mesh`) over which a network splits what lies between its blocks.

    batch: the samples. spatial: the rows of images (spatial partitioning), for those that are too large for one device;
    the compiler exchanges the borders that convolutions need. Where both are empty the compiler decides, and no mesh
    has to be there.
    """

    batch: tuple[str, ...] = ()
    spatial: tuple[str, ...] = ()

    def images(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x, split. ValueError where a device would have less than `ROWS` of its rows."""
        if not self.batch and not self.spatial:
            return x
        check_rows(x.shape[1], self.sizes()[1])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(self.batch or None, self.spatial or None))

    def sizes(self) -> tuple[int, int]:
        """Into how many parts the ambient mesh splits a batch, and the rows of an image."""
        sizes = jax.sharding.get_abstract_mesh().shape
        batch, rows = (math.prod(sizes.get(name, 1) for name in names) for names in (self.batch, self.spatial))
        return batch, rows

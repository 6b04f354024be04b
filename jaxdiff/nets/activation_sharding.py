"""Which mesh axes activations are split over. A network is told names, never a mesh: it uses the ambient one."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float


@dataclass(frozen=True)
class ActivationSharding:
    """Names of mesh axes (`jax.set_mesh`) over which a network splits what lies between its blocks.

    batch: the samples. spatial: the rows of images (spatial partitioning), for those that are too large for one device;
    the compiler exchanges the borders that convolutions need. Where both are empty the compiler decides, and no mesh has
    to be there.
    """

    batch: tuple[str, ...] = ()
    spatial: tuple[str, ...] = ()

    def images(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if not self.batch and not self.spatial:
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec(self.batch or None, self.spatial or None))

    def sizes(self) -> tuple[int, int]:
        """Into how many parts the ambient mesh splits a batch, and the rows of a picture."""
        sizes = jax.sharding.get_abstract_mesh().shape
        batch, rows = (math.prod(sizes.get(name, 1) for name in names) for names in (self.batch, self.spatial))
        return batch, rows

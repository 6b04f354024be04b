"""The start of sampling from an initial product: image to image, and inpainting."""

from dataclasses import dataclass, field
from functools import partial

import jax
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.parameterization import noised
from jaxdiff.diffusion.time_grid import TimeGrid


@dataclass(frozen=True, eq=False)
class InitProduct:
    """Initial product for image to image and, with a mask, inpainting.

    value: (b h w c), or codes (b h w), of the box's product type and the requested size. strength: fraction of the
    steps in (0, 1] that are run, starting from the value noised to the first one's level. mask: (b h w 1), 1 where
    sampled, 0 where the value is kept (by the network, if it reads the mask). masked: as `value`, of the image with the
    sampled pixels grey; for boxes that read it.
    """

    value: Float[Array, "b h w c"] | Int[Array, "b h w"]
    strength: float = 1.0
    mask: Float[Array, "b h w 1"] | None = None
    masked: Float[Array, "b h w c"] | Int[Array, "b h w"] | None = None


def first_step(strength: float, steps: int) -> int:
    """The first step that is run at this strength. ValueError if no step would run, or for a strength above 1."""
    taken = int(steps * strength) if 0.0 < strength <= 1.0 else 0
    if taken < 1:
        raise ValueError(f"strength {strength} leaves no step of {steps}, or is above 1")
    return steps - taken


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known:
    """The known pixels under a mask, restored after each step; their noise is the same at every step."""

    clean: bool = field(metadata={"static": True})
    value: Array
    mask: Array
    eps: Array

    def __call__(self, x: Array, point: TimeGrid) -> Array:
        value = self.value if self.clean else noised(self.value, self.eps, point.alpha, point.sigma)
        return self.mask * x + (1.0 - self.mask) * value

    def finished(self, x: Array) -> Array:
        """The last state with the known pixels as given: a grid may end with some noise."""
        return self.mask * x + (1.0 - self.mask) * self.value


@partial(jax.jit, static_argnums=0)
def begin(
    clean: bool, value: Array, mask: Array | None, eps: Array, points: TimeGrid, first: Array
) -> tuple[Array, Known | None]:
    """The value noised to the level of the first step, and the known pixels (None without a mask)."""
    point = TimeGrid(*(values[first] for values in points))
    x = noised(value, eps, point.alpha, point.sigma)
    if mask is None:
        return x, None
    known = Known(clean, value, mask, eps)
    return known(x, point), known

"""CLIP's image embeddings as products: the frozen image tower, and moves between embeddings (arXiv 2204.06125, 3).

Embeddings are arrays (… width). A move is spherical: it keeps the length of the first embedding.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.core.trees import digest_of
from jaxdiff.models.clip import normalised
from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TowerOutput

PARALLEL = 1e-6
"""Sine of the angle below which two directions count as equal or opposite."""


@dataclass(frozen=True, eq=False)
class CLIPImageEncoder:
    """A frozen CLIP image tower: settings and parameters ({"image": …}). ValueError without tower or projection."""

    config: CLIPConfig
    params: dict

    def __post_init__(self):
        if self.config.image is None or self.config.width is None:
            raise ValueError("this CLIP has no image tower with a projection")

    @property
    def width(self) -> int:
        """Of the embeddings."""
        assert self.config.width is not None  # see __post_init__
        return self.config.width

    @property
    def resolution(self) -> int:
        """Side of the images that the tower reads."""
        return cast(ImageTowerConfig, self.config.image).resolution

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the parameters."""
        return digest_of(self.params["image"])

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Embeddings of images in [-1, 1], not normalized. Other sizes than the tower's are resized, bicubic."""
        return _embedded(self.config, self.params, image)


@partial(jax.jit, static_argnums=0)
def _embedded(config: CLIPConfig, params: dict, image: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
    side = cast(ImageTowerConfig, config.image).resolution
    if image.shape[1:3] != (side, side):
        image = jnp.clip(jax.image.resize(image, (len(image), side, side, 3), "cubic"), -1.0, 1.0)
    output = cast(TowerOutput, CLIP(config).apply({"params": params}, normalised(image), method="embed_image"))
    return cast(Array, output.embedding)


def slerp(
    first: Float[Array, "... e"], second: Float[Array, "... e"], fraction: Float[Array, "..."] | float
) -> Float[Array, "... e"]:
    """Spherical interpolation from `first` (fraction 0) towards the direction of `second` (fraction 1), at the length
    of `first`.

    sin((1 − θ) ω)/sin ω · a + sin(θ ω)/sin ω · b for the directions a, b at the angle ω. Leading axes are broadcast.
    Equal and opposite directions have no unique arc: the result is `first`.
    """
    length = jnp.linalg.norm(first, axis=-1, keepdims=True)
    a, b = first / length, second / jnp.linalg.norm(second, axis=-1, keepdims=True)
    theta = jnp.asarray(fraction)[..., None]
    # More precise at small angles than the arc cosine of the product.
    angle = 2.0 * jnp.arctan2(jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(a + b, axis=-1))[..., None]
    sine = jnp.sin(angle)
    unique = sine > PARALLEL
    moved = (jnp.sin((1.0 - theta) * angle) * a + jnp.sin(theta * angle) * b) / jnp.where(unique, sine, 1.0)
    return length * jnp.where(unique, moved, a)


def text_diff(
    image: Float[Array, "... e"],
    before: Float[Array, "... e"],
    after: Float[Array, "... e"],
    fraction: Float[Array, "..."] | float,
) -> Float[Array, "... e"]:
    """An image embedding moved along the difference of two captions' embeddings (3.3): spherically, by `fraction` of
    the angle to it. The paper's fractions are 0.25 to 0.5.

    before, after: of the captions, of any length. ValueError if they are equal, so that no direction is known.
    """
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    difference = unit(after) - unit(before)
    if not isinstance(difference, jax.core.Tracer) and bool((jnp.abs(difference).max(-1) < PARALLEL).any()):
        raise ValueError("both captions have the same embedding: there is no direction to move in")
    return slerp(image, difference, fraction)

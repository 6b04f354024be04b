"""A patch discriminator beside an autoencoder: hinge losses with an adaptive weight (VQGAN, arXiv 2012.09841, 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.nets.discriminator import Discriminator, DiscriminatorConfig

LARGEST_WEIGHT = 1e4
"""Of the adaptive weight."""


class LastLayer(NamedTuple):
    """The input and the parameters of the 3×3 convolution that gives the image, without gradients."""

    features: Float[Array, "b h w c"]
    kernel: Float[Array, "3 3 c o"]
    bias: Float[Array, " o"]

    def image(self, kernel: Float[Array, "3 3 c o"]) -> Float[Array, "b h w o"]:
        """The image with another kernel."""
        layer = nn.Conv(len(self.bias), (3, 3), dtype=self.features.dtype)
        image = layer.apply({"params": {"kernel": kernel, "bias": self.bias}}, self.features)
        return cast(Array, image).astype(jnp.float32)


@dataclass(frozen=True)
class Adversary:
    """The discriminator and its losses.

    start: the first step in which it is trained and used. weight: of the autoencoder's adversarial loss. adaptive:
    multiply the weight by the ratio of the gradients of the reconstruction and of the adversarial loss with respect to
    the last layer (equation 7).
    """

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    start: int = 50_001
    weight: float = 0.5
    adaptive: bool = True

    def losses(
        self,
        params: dict,
        image: Float[Array, "b h w c"],
        reconstructed: Float[Array, "b h w c"],
        last: LastLayer,
        step: Int[Array, ""],
    ) -> dict[str, Array]:
        """`discriminator`: the discriminator's loss. `adversarial`: the autoencoder's, and `adversarial_weight` its
        weight. All are 0 before the first step of the discriminator, and neither network is evaluated.

        The discriminator's loss has no gradient for the autoencoder, and the reverse.
        """
        fixed = jax.lax.stop_gradient(params)

        def adversarial(image: Array) -> Array:
            return -self._logits(fixed, image).mean()

        def losses() -> dict[str, Array]:
            real, fake = (self._logits(params, jax.lax.stop_gradient(x)) for x in (image, reconstructed))
            weight = jnp.float32(self.weight)
            if self.adaptive:
                weight *= adaptive_weight(lambda x: jnp.abs(image - x).mean(), adversarial, last)
            return {
                "discriminator": 0.5 * (nn.relu(1.0 - real).mean() + nn.relu(1.0 + fake).mean()),
                "adversarial": adversarial(reconstructed),
                "adversarial_weight": jax.lax.stop_gradient(weight),
            }

        zeros = dict.fromkeys(("discriminator", "adversarial", "adversarial_weight"), jnp.float32(0.0))
        return jax.lax.cond(step >= self.start, losses, lambda: zeros)

    def _logits(self, params: dict, image: Array) -> Array:
        return cast(Array, Discriminator(self.discriminator).apply({"params": params}, image))


def adaptive_weight(
    error: Callable[[Array], Array], adversarial: Callable[[Array], Array], last: LastLayer
) -> Float[Array, ""]:
    """‖∇ error‖ / (‖∇ adversarial‖ + 1e-4) at the kernel of the last layer, at most 1e4. Both are losses of an image.

    Only the last layer is differentiated, not the network before it.
    """
    image, pullback = jax.vjp(last.image, last.kernel.astype(jnp.float32))
    of_error, of_adversary = (jnp.linalg.norm(pullback(jax.grad(loss)(image))[0]) for loss in (error, adversarial))
    return jnp.minimum(of_error / (of_adversary + 1e-4), LARGEST_WEIGHT)

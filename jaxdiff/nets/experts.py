"""Two U-Nets, one for noisy and one for nearly clean images (eDiff-I, arXiv 2211.01324; Karlo's upsampler)."""

from dataclasses import dataclass
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning
from jaxdiff.nets.unet import UNet, UNetConfig


@dataclass(frozen=True)
class ExpertsConfig(UNetConfig):
    """Two equal U-Nets, `first` and `last` among the parameters. boundary: the last acts at network times of at most
    this, in 0…1000; at 0 in the last step of a sampler that ends with the first entry of a table."""

    boundary: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.boundary <= 1000.0:
            raise ValueError(f"the experts' boundary must be a time in 0…1000, not {self.boundary}")

    def module(self) -> "Experts":
        return Experts(self)


class Experts(nn.Module):
    config: ExpertsConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b h w o"]:
        """Arguments as in `UNet`. A network of which no sample needs the output does not run."""
        if self.is_initializing():
            outputs = [UNet(self.config, name=name)(x, time, conditioning) for name in ("first", "last")]
            return outputs[0]
        late, params = time <= self.config.boundary, self.variables["params"]
        channels = x.shape[-1] * (2 if self.config.learned_variance else 1)
        # A parent of None keeps the network out of this module's scope, in which a branch must not create layers.
        network = UNet(self.config, parent=None)

        def run(name: str, needed: Array) -> Array:
            def output() -> Array:
                return cast(Array, network.apply({"params": params[name]}, x, time, conditioning))

            return jax.lax.cond(needed, output, lambda: jnp.zeros((*x.shape[:-1], channels), jnp.float32))

        noisy, clean = run("first", ~late.all()), run("last", late.any())
        return jnp.where(late[:, None, None, None], clean, noisy)

"""Latent diffusion trained on images: a frozen autoencoder encodes each batch inside the loss.

Stored latents need none of this: they are the `image` of a `DiffusionModel`'s batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.core.products import LatentSpec
from jaxdiff.models import autoencoder_tiles
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck, gaussian


@dataclass(frozen=True)
class LatentTraining(SingleOptimizer):
    """A diffusion model of latents (`DiffusionModel.product`) with the settings of its autoencoder.

    autoencoder, scale: its network, and the factor from codes to latents. The loss reads its parameters as `frozen`.
    ValueError unless its latents are the model's.
    """

    model: DiffusionModel
    autoencoder: AutoencoderConfig
    scale: float

    def __post_init__(self):
        spec = LatentSpec(self.autoencoder.code_channels, self.autoencoder.stride)
        if self.model.product != spec:
            raise ValueError(f"the model is one of {self.model.product}, the autoencoder gives {spec}")

    @property
    def side(self) -> int:
        """Side of the training images in pixels."""
        return self.model.side * self.autoencoder.stride

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        return self.model.init(key)

    def loss(
        self, params: dict, extra: tuple, frozen: Any, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, tuple]]:
        """`DiffusionModel.loss` of the latents of `image` (b h w c), pixels in [-1, 1]. frozen: the autoencoder's
        parameters."""
        return self.model.loss(params, extra, (), self._encoded(frozen, batch), key, step)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: Any, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        return self.model.held_out_losses(params, extra, (), self._encoded(frozen, batch), numbers, key)

    def cast(self, params: dict) -> dict:
        return self.model.cast(params)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """side: in pixels."""
        shapes = self.model.batch_spec(batch_size, side // self.autoencoder.stride)
        image = (batch_size, side, side, self.autoencoder.image_channels)
        return shapes | {"image": jax.ShapeDtypeStruct(image, jnp.float32)}

    def _encoded(self, frozen: Any, batch: Mapping) -> dict:
        return {**batch, "image": encoded(self.autoencoder, self.scale, frozen, batch["image"])}


def encoded(
    config: AutoencoderConfig, scale: float, params: Any, image: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """The latents of images in [-1, 1]: the means of their codes, scaled. Without a gradient."""
    output = autoencoder_tiles.encode(config, params, image, None)
    code = output if isinstance(config.bottleneck, VQBottleneck) else gaussian(output).mean
    return jax.lax.stop_gradient(scale * code.astype(jnp.float32))


def on_autoencoder(model: DiffusionModel, autoencoder: TrainedAutoencoder) -> DiffusionModel:
    """The model for latents of this autoencoder, with the same size in latents."""
    return replace(model, product=autoencoder.consumes)

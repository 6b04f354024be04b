"""A tiny latent diffusion system that trains on a laptop: an autoencoder of stride 8, and a U-Net in its latents."""

from dataclasses import replace

from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.autoencoder import AutoencoderConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.stable_diffusion import SAMPLING, SCHEDULE

AUTOENCODER_TINY = AutoencoderModel(
    AutoencoderConfig(channels=(16, 32, 64, 64), blocks=1, latent_channels=8, norm_groups=8),
    side=64,
    kl_weight=1e-3,
    adversary=None,
)
"""64×64 images ⇄ 8×8 latents."""
UNET_TINY = DiffusionModel(
    unet=LatentUNetConfig(
        channels=64,
        multipliers=(1, 1),
        blocks=(2, 2),
        transformer_layers=(1, 1),
        heads=(2, 2),
        cross_only=(False, False),
        norm_groups=16,
        coordinates=True,
    ),
    side=8,
    product=LatentSpec(channels=8, stride=8),
    conditioners=(TextConditioner(mean=True),),
    schedule=SCHEDULE,
    prediction=Prediction.V,
)
SAMPLING_TINY = replace(SAMPLING, steps=25, guidance=Guidance(3.0))

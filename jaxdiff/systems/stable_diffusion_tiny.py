"""A tiny latent diffusion system that trains on a laptop: autoencoders of strides 8 and 4, one of them with a codebook,
and a U-Net in their latents."""

from dataclasses import replace

from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.codebook import EMACodebook
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.stable_diffusion import SAMPLING, SCHEDULE

AUTOENCODER_TINY = AutoencoderModel(
    AutoencoderConfig(channels=(16, 32, 64, 64), blocks=1, latent_channels=8, norm_groups=0),
    side=64,
    kl_weight=1e-3,
    adversary=None,
)
"""64×64 images ⇄ 8×8 latents."""
AUTOENCODER_TINY_F4 = replace(
    AUTOENCODER_TINY,
    network=AutoencoderConfig(channels=(16, 32, 64), blocks=1, latent_channels=4, norm_groups=0),
)
"""64×64 images ⇄ 16×16 latents: more exact, and a U-Net in its latents takes four times the operations."""
AUTOENCODER_TINY_VQ = replace(
    AUTOENCODER_TINY,
    network=AutoencoderConfig(
        channels=(16, 32, 64),
        blocks=1,
        latent_channels=4,
        norm_groups=0,
        middle_attention=False,
        local_encoder=True,
        bottleneck=VQBottleneck(1024, 4),
    ),
    codebook=EMACodebook(),
)
"""64×64 images ⇄ 16×16 codes, for transformers of codes. With attention or group norm the codes of a plain background
would depend on the entire image, and so be hard to predict."""
AUTOENCODER_TINY_VQ_F2 = replace(
    AUTOENCODER_TINY_VQ,
    network=replace(AUTOENCODER_TINY_VQ.network, channels=(32, 64), bottleneck=VQBottleneck(512, 4)),
)
"""32×32 images ⇄ 16×16 codes, for drawings of few colours: few codes then suffice, and each is seen often, as a
transformer needs to combine what it has not seen together."""
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
        scale_shift=True,
    ),
    side=8,
    product=LatentSpec(channels=8, stride=8),
    conditioners=(TextConditioner(mean=True),),
    schedule=SCHEDULE,
    time_sampler=LogSNRRange(-4.0, 3.0, 0.8),
    prediction=Prediction.V,
)
"""In the latents of AUTOENCODER_TINY. It trains most at the log-SNRs that decide places, colours and shapes."""
SAMPLING_TINY = replace(SAMPLING, sampler=DDIM(eta=1.0), steps=50, guidance=Guidance(8.0, (-20.0, -1.0)))
"""Guided until shapes are determined: at higher log-SNR guidance distorts them. Noise in the sampler corrects kinds and
fills."""

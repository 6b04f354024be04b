"""Stable Diffusion (arXiv 2112.10752; XL: 2307.01952): frozen CLIP → latent diffusion → autoencoder.

    pipeline = stable_diffusion(text_encoder, generator, autoencoder)      # see `weights.stable_diffusion.load`

Presets of the public models as plain values; parameter counts are tested. What a model is conditioned on is its tuple
of conditioners: text, pooled text, sizes, a mask, a low-resolution image.
"""

from dataclasses import replace

from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, PLMS, DPMSolverPP2M, Euler
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.solvers import Solver
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace, TabulatedKarras
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.boxes import Decoder
from jaxdiff.models.conditioners import (
    AnyConditioner,
    LowResConditioner,
    MaskConditioner,
    NullText,
    SizeConditioner,
    TextConditioner,
)
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

LATENTS = LatentSpec(channels=4, stride=8)
SCHEDULE = TabulatedSchedule.scaled_linear(1000, 0.00085, 0.012)
TOKENS = 77
"""Tokens per caption in training."""


TEXT = TextConditioner(null=NullText.EMPTY)
TEXT_XL = TextConditioner(null=NullText.ZEROS, pooled=1280)
"""The null text of XL is zeros, not the empty caption."""


def stable_diffusion(text_encoder: TextEncoder, generator: TrainedModel, autoencoder: Decoder) -> Pipeline:
    """The system: text → CLIP → latents → image. ValueError if the boxes do not fit one another."""
    return Pipeline(text_encoder=text_encoder, generator=generator, decoders=(autoencoder,))


def latent_model(
    unet: LatentUNetConfig,
    side: int,
    *others: AnyConditioner,
    text: TextConditioner = TEXT,
    prediction: Prediction = Prediction.EPSILON,
) -> DiffusionModel:
    """A model with Stable Diffusion's conventions. side: of the latents. others: the conditioners beside the text."""
    return DiffusionModel(
        unet=unet,
        side=side,
        product=LATENTS,
        conditioners=(text, *others),
        schedule=SCHEDULE,
        prediction=prediction,
    )


UNET_2 = LatentUNetConfig(heads=(5, 10, 20, 20), linear_projection=True)
UNET_XL = LatentUNetConfig(
    multipliers=(1, 2, 4),
    blocks=(2, 2, 2),
    transformer_layers=(0, 2, 10),
    middle_layers=10,
    heads=(5, 10, 20),
    cross_only=(False,) * 3,
    linear_projection=True,
)
UNET_X4 = LatentUNetConfig(
    channels=256,
    multipliers=(1, 2, 2, 4),
    transformer_layers=(0, 1, 1, 1),
    cross_only=(False, True, True, False),
    linear_projection=True,
    level_entries=1000,
)

SD_1 = latent_model(LatentUNetConfig(), 64).reading(TOKENS, 768)
SD_1_INPAINTING = latent_model(LatentUNetConfig(), 64, MaskConditioner()).reading(TOKENS, 768)
"""860 M parameters; CLIP ViT-L/14's text tower."""
SD_2_BASE = latent_model(UNET_2, 64).reading(TOKENS, 1024)
SD_2_INPAINTING = latent_model(UNET_2, 64, MaskConditioner()).reading(TOKENS, 1024)
SD_2_V = latent_model(UNET_2, 96, prediction=Prediction.V).reading(TOKENS, 1024)
"""866 M parameters; OpenCLIP ViT-H/14's text tower without its last layer."""
SD_XL = latent_model(UNET_XL, 128, SizeConditioner(), text=TEXT_XL).reading(TOKENS, 2048)
"""2.57 B parameters; the towers of CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 without their last layers."""
SD_X4 = replace(
    latent_model(
        UNET_X4,
        512,
        LowResConditioner(1, TabulatedSchedule.scaled_linear(1000, 0.0001, 0.02), max_level=0.35),
        prediction=Prediction.V,
    ).reading(TOKENS, 1024),
    product=LatentSpec(channels=4, stride=4),
    schedule=TabulatedSchedule.scaled_linear(1000, 0.0001, 0.02),
)
"""The ×4 upscaler, 474 M parameters: from an image, in latents of stride 4."""


KL_F8 = AutoencoderModel()
KL_F4 = AutoencoderModel(AutoencoderConfig(channels=(128, 256, 512), latent_channels=3))
VQ_F8 = AutoencoderModel(
    AutoencoderConfig(channels=(128, 256, 256, 512), bottleneck=VQBottleneck(16_384, 4), attention_levels=(3,))
)
VQ_F4 = AutoencoderModel(
    AutoencoderConfig(channels=(128, 256, 512), latent_channels=3, bottleneck=VQBottleneck(8192, 3))
)
"""Autoencoders of latent diffusion (arXiv 2112.10752, Table 8), trained on images of 256 pixels."""


SOLVER_DDIM = Solver(DDIM(), Leading(1, to_first_entry=True))
SOLVER_PLMS = Solver(PLMS(), Leading(1, to_first_entry=True))
SOLVER_EULER = Solver(Euler(), Linspace(rounded=False), scaled_start=True)
SOLVER_EULER_ANCESTRAL = Solver(DDIM(eta=1.0), Linspace(rounded=False), scaled_start=True)
SOLVER_DPMPP_2M = Solver(DPMSolverPP2M(), Linspace(skip_cleanest=True))
SOLVER_DPMPP_2M_KARRAS = Solver(DPMSolverPP2M(), TabulatedKarras(rounded=True))
"""Those of diffusers' schedulers with the public models' betas and offset, and otherwise their defaults."""

SAMPLING = SamplingConfig(
    steps=50,
    guidance=Guidance(7.5),
    thresholding=NoThreshold(),
    fresh_start=True,
    **SOLVER_DDIM._asdict(),
)
SAMPLING_XL = replace(SAMPLING, sampler=Euler(), spacing=Leading(1), guidance=Guidance(5.0))
SAMPLING_X4 = replace(SAMPLING, steps=75, guidance=Guidance(9.0), aug_level=0.02)

"""Kandinsky 2.2, a public unCLIP in latents: presets of its models and their sampling.

Caption → CLIP (ViT-bigG/14) → prior → CLIP image embedding → decoder → latent → MoVQ → image. The decoder reads no
caption. Parameter counts are tested.
"""

from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.diffusion.time_grid import Leading
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.representations import EmbeddingConditioner, Form
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.image_readers import ImageTokens
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems import karlo

PRIOR = karlo.prior_model(PriorConfig(embedding=1280, text_width=1280))
"""1 B parameters."""
SAMPLING_PRIOR = karlo.SAMPLING_PRIOR


def decoder_model(network: UNetConfig, side: int, width: int, product: LatentSpec) -> DiffusionModel:
    """A decoder with Kandinsky's conventions: it reads the embedding of an image, of `width`, as its only token."""
    return DiffusionModel(
        unet=network,
        side=side,
        product=product,
        conditioners=(EmbeddingConditioner(width, form=Form.TOKENS),),
        schedule=TabulatedSchedule.linear(1000, 0.00085, 0.012),
    )


DECODER = decoder_model(
    UNetConfig(
        channels=384,
        attention=AttentionConfig((False, True, True, True), (False,) * 4, normalize_text=False),
        conditioning=ConditioningConfig(1536, ImageTokens(), frequencies=384),
        learned_variance=True,
        norm_groups=32,
    ),
    64,
    1280,
    LatentSpec(),
)
"""1.25 B parameters."""
SAMPLING_DECODER = SamplingConfig(
    sampler=DDPM(None),
    steps=100,
    spacing=Leading(),
    guidance=Guidance(4.0),
    thresholding=StaticThreshold(2.0),
)

MOVQ = AutoencoderConfig(
    channels=(128, 256, 256, 512), bottleneck=VQBottleneck(16_384, 4), attention_levels=(3,), spatial_norm=True
)
"""68 M parameters. Its latents are not scaled, and are decoded without the codebook."""

"""DeepFloyd IF: Imagen with other conventions, each a setting. Presets of models and sampling settings.

Parameter counts are tested.
"""

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.models.conditioners import Enlargement, LowResConditioner, NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.conditioning import WholeText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

T5_XXL = 77, 4096
"""Length and width of its text embeddings."""


def deepfloyd(text_encoder: TextEncoder, base: TrainedModel, *super_resolution: TrainedModel) -> Pipeline:
    """The system: cleaned caption → T5-XXL (padding included) → 64×64 image → 256×256. ValueError as `Pipeline`."""
    return Pipeline(text_encoder=text_encoder, generator=base, decoders=super_resolution)


def _unet(
    channels: int, multipliers: tuple[int, ...], blocks: tuple[int, ...], attention: AttentionConfig, scale: float = 1.0
) -> UNetConfig:
    top = channels * multipliers[-1]
    return UNetConfig(
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        conditioning=ConditioningConfig(top, WholeText(top, pool_heads=64), frequencies=channels),
        learned_variance=True,
        activation=Activation.GELU,
        norm_groups=32,
        residual_scale=scale,
    )


def _base(channels: int) -> DiffusionModel:
    attention = AttentionConfig((False, True, True, True), (False,) * 4, group_text=True)
    return if_model(_unet(channels, (1, 2, 3, 4), (3, 3, 3, 3), attention), 64)


def _super_resolution(channels: int) -> DiffusionModel:
    attention = AttentionConfig((False,) * 5, (False, False, False, True, True), group_text=True)
    return if_model(_unet(channels, (1, 1, 2, 3, 4), (2, 2, 3, 5, 5), attention, scale=0.7071), 256, low_res=True)


def if_model(unet: UNetConfig, side: int, *, low_res: bool = False) -> DiffusionModel:
    """A model with DeepFloyd IF's conventions for one of its U-Nets: 1000 cosine steps, learned variance, the empty
    caption as null text; super-resolution upsamples its input bilinearly, then adds noise."""
    reads = TextConditioner(null=NullText.EMPTY)
    lower = LowResConditioner(augmentation=TabulatedSchedule.cosine(), enlargement=Enlargement.BILINEAR)
    return DiffusionModel(
        unet=unet,
        side=side,
        conditioners=(reads, lower) if low_res else (reads,),
        schedule=TabulatedSchedule.cosine(),
    )


IF_I_M = _base(192)
IF_I_L = _base(320)
IF_I_XL = _base(704)
"""372, 935 and 4305 M parameters."""
IF_II_M = _super_resolution(192)
IF_II_L = _super_resolution(320)
"""466 and 1198 M parameters. Their widths are unpublished: these are the widths of stage I's M and L, consistent with
the published 450 M and 1.2 B. Loaded models have the widths of their config.json."""

FAST27 = Respaced((10, 10, 3, 2, 2), offset=2)
SMART27 = Respaced((7, 4, 2, 1, 2, 4, 7))
SMART50 = Respaced((10, 6, 4, 3, 2, 2, 3, 4, 6, 10))
SMART100 = Respaced((1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13))
SMART185 = Respaced((1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20))
SUPER27 = Respaced((1, 1, 1, 1, 1, 1, 1, 2, 5, 13))
SUPER40 = Respaced((2, 2, 2, 2, 2, 2, 3, 4, 6, 15))
SUPER100 = Respaced((4, 4, 6, 6, 8, 8, 10, 10, 14, 30))
"""DeepFloyd IF's respacings of its 1000 steps; SUPER… are for super-resolution to 1024."""

SAMPLING_I = SamplingConfig(
    sampler=DDPM(None),
    steps=100,
    spacing=Respaced((100,)),
    guidance=Guidance(7.0),
    thresholding=DynamicThreshold(0.95, cap=1.5),
    clean_known=True,
)
SAMPLING_II = SamplingConfig(
    sampler=DDPM(None),
    steps=50,
    spacing=SMART50,
    guidance=Guidance(4.0),
    thresholding=DynamicThreshold(0.95, cap=1.0),
    aug_level=0.25,
    clean_known=True,
)
"""With a cap of 1 the thresholding is static."""

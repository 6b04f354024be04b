"""Imagen's published stages as plain values, DeepFloyd IF's, and a tiny cascade that trains on a laptop.

Where the paper prints no value, a convention stands in: 128 text tokens, the sampling steps, the guidance of each
stage. Parameter counts are tested.
"""

from dataclasses import replace

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.losses import MinSNR, PowerSNR
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM, DPMSolverPP2M
from jaxdiff.diffusion.schedules import CosineSchedule, LinearBetaSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.diffusion import DiffusionModel, Enlargement, NullText
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.unet import EfficientUNetConfig, Reading, UNetConfig

BASE_64_2B = DiffusionModel(unet=UNetConfig())
"""The base model (F.1): 2.26 B parameters with the text projected to 2048 inside the network."""

BASE_64_500M = DiffusionModel(unet=UNetConfig(channels=256, time_width=1024, context_width=512))
"""Half the width, as in NVIDIA NeMo's 500M configuration."""

BASE_64_300M = DiffusionModel(unet=UNetConfig(channels=192, time_width=768, context_width=512))
"""The size of the paper's ablations (Fig. 4a). Its width is not published; this one comes to about 300 M."""

SR_256 = DiffusionModel(
    unet=EfficientUNetConfig(),
    resolution=256,
    low_resolution=64,
)
"""64→256 (F.2): the Efficient U-Net with self-attention, and text beside it, in its 1024-channel block."""

SR_1024 = DiffusionModel(
    unet=EfficientUNetConfig(
        time_width=1024,
        context_width=1024,
        self_attention=(False, False, False, False),
        cross_attention=(False, False, False, True),
        pool_text=False,
    ),
    resolution=1024,
    low_resolution=256,
    schedule=LinearBetaSchedule(),
)
"""256→1024 (F.3): no self-attention, explicit cross-attention, the linear schedule in continuous time.

The paper says 400 M parameters, but the configuration that it prints for this stage has F.2's channels and blocks and
leaves out attention alone, which is a small part of them: what it describes has 478 to 536 M, depending on the widths
that it does not print.
"""

_TINY_UNET = EfficientUNetConfig(
    channels=32,
    multipliers=(2, 4),
    blocks=(1, 3),
    outer_blocks=1,
    self_attention=(False, True),
    cross_attention=(False, True),
    heads=4,
    time_width=256,
    text_width=128,
    context_width=128,
    patch=2,
    coordinates=True,
    conditioned_head=True,
    input_skip=True,
    low_res=False,
)

BASE_64_TINY = DiffusionModel(
    unet=_TINY_UNET,
    schedule=CosineSchedule(shift=-2.5),
    time_sampler=LogSNRRange(-11.0, 4.0),
    prediction=Prediction.X0,
    weighting=PowerSNR(0.2, lowest=-11.0),
    text_length=24,
)
"""For CPUs: patches of 2×2 pixels, and most of the work at 8×8, where convolutions are wide enough to be fast.

The schedule is shifted towards noise: of a flat picture, 4096 pixels of a background say its colour through any noise
that Imagen's schedule spends time on, and the text would have nothing left to decide. Colours are decided at log-SNRs
of -10 to -5, places and sizes at -9 to -4, forms at -5 to 0; all get the same share of the training.
It predicts x₀: ε or v would have to carry a patch's noise through few channels; a picture's content is less."""

BASE_64_QUICK = replace(
    BASE_64_TINY,
    unet=replace(
        _TINY_UNET,
        channels=64,
        multipliers=(2,),
        blocks=(1,),
        outer_blocks=0,
        self_attention=(True,),
        cross_attention=(True,),
        patch=4,
    ),
)
"""For minutes of training: twice as fast for each picture, because colours take many pictures to learn from and no fine
patches. It draws blobs of the right colour; forms are for BASE_64_TINY and hours."""

BASE_32_TINY = replace(
    BASE_64_TINY,
    resolution=32,
    schedule=CosineSchedule(shift=-1.1),
    time_sampler=LogSNRRange(-9.6, 5.4),
    weighting=PowerSNR(0.2, lowest=-9.6),
)
"""The same network on a quarter of the pixels, so a quarter of the work: for sets of 32×32 and for ablations.

A quarter of the pixels say as much through noise that is 1.4 less in log-SNR: the schedule is shifted by that."""

BASE_32_MICRO = replace(BASE_32_TINY, unet=replace(BASE_32_TINY.unet, channels=8))
BASE_32_SMALL = replace(BASE_32_TINY, unet=replace(BASE_32_TINY.unet, channels=16))
BASE_32_MEDIUM = replace(BASE_32_TINY, unet=replace(BASE_32_TINY.unet, channels=24))
"""A quarter, half and three quarters of its width."""

SR_256_TINY = DiffusionModel(
    unet=EfficientUNetConfig(
        channels=32,
        multipliers=(1,),
        blocks=(3,),
        self_attention=(False,),
        cross_attention=(False,),
        pool_text=False,
        time_width=128,
        text_width=128,
        context_width=128,
        patch=2,
    ),
    resolution=256,
    low_resolution=64,
    schedule=CosineSchedule.shifted(256),
    prediction=Prediction.X0,
    weighting=MinSNR(floor=1.0),
    max_aug_level=0.3,
    residual=True,
    text_length=24,
)
"""Works on the grid of its input (patches of 2×2, halved once). Reads no text, so it trains on pictures alone."""

SR_1024_TINY = replace(SR_256_TINY, resolution=1024, low_resolution=256)
"""The same network and schedule: enlarging edges fourfold is the same task again, so it may start from SR_256_TINY."""

SR_64_TINY = replace(SR_256_TINY, resolution=64, low_resolution=32, schedule=CosineSchedule.shifted(64))
"""Twofold, behind BASE_32_TINY."""

SAMPLING_BASE = SamplingConfig(sampler=DDPM(), steps=256, guidance=Guidance(1.35), thresholding=DynamicThreshold())
"""w = 1.35 is that of the paper's best FID (7.27)."""

SAMPLING_SR = SamplingConfig(sampler=DDPM(), steps=128, guidance=Guidance(8.0), thresholding=DynamicThreshold())
"""w = 8 at augmentation level 0: the super-resolution setting of the same figure."""

SAMPLING_BASE_TINY = SamplingConfig(
    sampler=DDPM(), steps=36, guidance=Guidance(3.0, (-20.0, -1.0)), thresholding=StaticThreshold()
)
"""Guided from the noisiest level until forms are decided. Beyond that, guidance makes the edges wobble; many steps make
them straighter. Figures are in the model card (jaxdiff/weights/tiny/README.md)."""
SAMPLING_BASE_QUICK = replace(SAMPLING_BASE_TINY, steps=24, guidance=Guidance(3.0, (-8.0, -2.0)))
"""Guided only where colours are decided: beyond that it makes them brighter than any of the set's."""
SAMPLING_BASE_32 = replace(SAMPLING_BASE_TINY, steps=24, guidance=Guidance(2.0, (-20.0, 0.4)))
SAMPLING_SR_TINY = SamplingConfig(sampler=DPMSolverPP2M(), steps=6, thresholding=StaticThreshold())
"""No guidance: these stages read no text."""


def _if_unet(channels: int, multipliers: tuple[int, ...], **settings) -> UNetConfig:
    top = channels * multipliers[-1]
    return UNetConfig(
        channels=channels,
        multipliers=multipliers,
        time_width=top,
        context_width=top,
        learned_variance=True,
        reading=Reading.WHOLE,
        pool_heads=64,
        activation=Activation.GELU,
        norm_groups=32,
        frequencies=channels,
        **settings,
    )


def if_stage(unet: UNetConfig, resolution: int) -> DiffusionModel:
    """DeepFloyd IF's conventions around one of its U-Nets: 1000 cosine steps, learned variance, the empty caption as
    null text, 77 tokens; super-resolution sees its input enlarged bilinearly, then noised."""
    return DiffusionModel(
        unet=unet,
        resolution=resolution,
        low_resolution=resolution // 4 if unet.low_res else None,
        schedule=TabulatedSchedule.cosine(),
        augmentation=TabulatedSchedule.cosine(),
        enlargement=Enlargement.BILINEAR,
        text_length=77,
        null_text=NullText.EMPTY,
    )


def _if_ii_unet(channels: int) -> UNetConfig:
    return _if_unet(
        channels,
        (1, 1, 2, 3, 4),
        blocks=(2, 2, 3, 5, 5),
        self_attention=(False,) * 5,
        cross_attention=(False, False, False, True, True),
        low_res=True,
        residual_scale=0.7071,
    )


IF_I_M = if_stage(_if_unet(192, (1, 2, 3, 4)), 64)
IF_I_L = if_stage(_if_unet(320, (1, 2, 3, 4)), 64)
IF_I_XL = if_stage(_if_unet(704, (1, 2, 3, 4)), 64)
"""372, 935 and 4305 M parameters."""
IF_II_M = if_stage(_if_ii_unet(192), 256)
IF_II_L = if_stage(_if_ii_unet(320), 256)
"""466 and 1198 M parameters. Their widths are not printed anywhere: these are those of stage I's M and L, and come to
the published 450 M and 1.2 B. What is loaded has the widths of its own config.json."""

FAST27 = Respaced((10, 10, 3, 2, 2), offset=2)
SMART27 = Respaced((7, 4, 2, 1, 2, 4, 7))
SMART50 = Respaced((10, 6, 4, 3, 2, 2, 3, 4, 6, 10))
SMART100 = Respaced((1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13))
SMART185 = Respaced((1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20))
SUPER27 = Respaced((1, 1, 1, 1, 1, 1, 1, 2, 5, 13))
SUPER40 = Respaced((2, 2, 2, 2, 2, 2, 3, 4, 6, 15))
SUPER100 = Respaced((4, 4, 6, 6, 8, 8, 10, 10, 14, 30))
"""DeepFloyd IF's respacings of its 1000 steps; the super ones are for super-resolution to 1024."""

SAMPLING_IF_I = SamplingConfig(
    sampler=DDPM(None),
    steps=100,
    spacing=Respaced((100,)),
    guidance=Guidance(7.0),
    thresholding=DynamicThreshold(0.95, cap=1.5),
    clean_known=True,
)
SAMPLING_IF_II = SamplingConfig(
    sampler=DDPM(None),
    steps=50,
    spacing=SMART50,
    guidance=Guidance(4.0),
    thresholding=DynamicThreshold(0.95, cap=1.0),
    aug_level=0.25,
    clean_known=True,
)
"""The cap of 1 makes its thresholding static."""

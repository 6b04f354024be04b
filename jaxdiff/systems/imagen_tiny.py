"""Presets of a tiny Imagen that trains on a laptop, with sampling settings.

Besides their size, they differ from the paper's models: they predict x₀ from patches of 2×2 pixels, and
super-resolution reads no text.
"""

from dataclasses import replace

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.losses import MinSNR, PowerSNR
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM, DPMSolverPP2M
from jaxdiff.diffusion.schedules import CosineSchedule
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.conditioners import LowResConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig

_TINY_UNET = EfficientUNetConfig(
    channels=32,
    multipliers=(2, 4),
    blocks=(1, 3),
    outer_blocks=1,
    attention=AttentionConfig((False, True), (False, True), heads=4, feed_forward=2),
    conditioning=ConditioningConfig(256, MaskedText(128)),
    patch=2,
    coordinates=True,
    conditioned_head=True,
    input_skip=True,
)

BASE_64_TINY = DiffusionModel(
    unet=_TINY_UNET,
    schedule=CosineSchedule(shift=-2.5),
    time_sampler=LogSNRRange(-11.0, 4.0),
    prediction=Prediction.X0,
    weighting=PowerSNR(0.2, lowest=-11.0),
)
"""For CPUs: patches of 2×2 pixels, and most of the work at 8×8, where convolutions are wide enough to be fast.

The schedule is shifted towards noise: in a flat image the 4096 pixels of a background reveal its colour at all noise
levels where Imagen's schedule spends time, so the text would be ignored. Colours are determined at log-SNRs of -10 to
-5, positions and sizes at -9 to -4, shapes at -5 to 0; all get the same fraction of the training.
It predicts x₀, because ε or v would have to carry a patch's noise through few channels."""

BASE_64_QUICK = replace(
    BASE_64_TINY,
    unet=replace(
        _TINY_UNET,
        channels=64,
        multipliers=(2,),
        blocks=(1,),
        outer_blocks=0,
        attention=AttentionConfig((True,), (True,), heads=4, feed_forward=2),
        patch=4,
    ),
)
"""For minutes of training: twice as fast per image, because colours need many images but no fine patches. It produces
blobs of the right colour; shapes need BASE_64_TINY and hours."""

BASE_32_TINY = replace(
    BASE_64_TINY,
    side=32,
    schedule=CosineSchedule(shift=-1.1),
    time_sampler=LogSNRRange(-9.6, 5.4),
    weighting=PowerSNR(0.2, lowest=-9.6),
)
"""The same network on a quarter of the pixels, so a quarter of the work: for 32×32 datasets and ablations.

With a quarter of the pixels the same information needs a log-SNR higher by 1.4, so the schedule is shifted by that."""

BASE_32_MICRO = replace(BASE_32_TINY, unet=replace(_TINY_UNET, channels=8))
BASE_32_SMALL = replace(BASE_32_TINY, unet=replace(_TINY_UNET, channels=16))
BASE_32_MEDIUM = replace(BASE_32_TINY, unet=replace(_TINY_UNET, channels=24))
"""A quarter, half and three quarters of the width of BASE_32_TINY."""

SR_256_TINY = DiffusionModel(
    unet=EfficientUNetConfig(
        channels=32,
        multipliers=(1,),
        blocks=(3,),
        attention=AttentionConfig((False,), (False,)),
        conditioning=ConditioningConfig(128, text=None),
        patch=2,
    ),
    side=256,
    conditioners=(LowResConditioner(max_level=0.3),),
    schedule=CosineSchedule.shifted(256),
    prediction=Prediction.X0,
    weighting=MinSNR(floor=1.0),
    residual=True,
)
"""Works on the grid of its input (patches of 2×2, halved once). Reads no text, so it trains on images only."""

SR_1024_TINY = replace(SR_256_TINY, side=1024)
"""The same network and schedule: fourfold upsampling of edges is the same task, so it can start from SR_256_TINY."""

SR_64_TINY = replace(
    SR_256_TINY,
    side=64,
    conditioners=(LowResConditioner(factor=2, max_level=0.3),),
    schedule=CosineSchedule.shifted(64),
)
"""Twofold super-resolution for BASE_32_TINY."""

SAMPLING_BASE_TINY = SamplingConfig(
    sampler=DDPM(), steps=36, guidance=Guidance(3.0, (-20.0, -1.0)), thresholding=StaticThreshold()
)
"""Guided from the noisiest level until shapes are determined. At higher log-SNR guidance distorts the edges; more steps
make them straighter. Numbers are in the model card (jaxdiff/weights/tiny/README.md)."""
SAMPLING_BASE_QUICK = replace(SAMPLING_BASE_TINY, steps=24, guidance=Guidance(3.0, (-8.0, -2.0)))
"""Guided only where colours are determined: otherwise they become brighter than any in the dataset."""
SAMPLING_BASE_32 = replace(SAMPLING_BASE_TINY, steps=24, guidance=Guidance(2.0, (-20.0, 0.4)))
SAMPLING_SR_TINY = SamplingConfig(sampler=DPMSolverPP2M(), steps=6, thresholding=StaticThreshold())
"""No guidance: these stages read no text."""

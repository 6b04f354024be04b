"""Mid-sized Imagen presets for one GPU, between the tiny ones and the paper's, with sampling settings.

They are smaller versions of the paper's networks (`imagen.py`) with the same attention, schedules, ε prediction and
text conditioning. They work with any text encoder; `DiffusionModel.reading` sets its length and width. The paper's
smallest base has 300 M parameters, its super-resolution networks about 500 M. Training needs 16 bytes per parameter
(value, average, Adam's two moments), so 500 M take a third of a 24 GB card before the first image.

Memory and time are dominated by large feature maps, parameters by small ones (the idea of the Efficient U-Net, B.1).
Widths are multiples of 32 channels, for tensor cores; heads have 64 channels, 32 in `small`. The bases have two
residual blocks at 64×64 and 32×32, not the paper's three, and more below, at four times the width of the first level.
`small` and `medium` are the paper's Efficient U-Net with a quarter and half of its channels. None has been
trained; their parameter counts are tested.
"""

from dataclasses import replace

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.unet import ConditioningConfig, UNetConfig
from jaxdiff.systems.imagen import BASE_64_2B, SAMPLING_BASE, SAMPLING_SR, SR_256, SR_1024


def _base(channels: int, blocks: tuple[int, ...]) -> DiffusionModel:
    conditioning = ConditioningConfig(512, MaskedText(512))
    unet = UNetConfig(channels=channels, multipliers=(1, 2, 4, 4), blocks=blocks, conditioning=conditioning)
    return replace(BASE_64_2B, unet=unet)


def _narrowed(model: DiffusionModel, channels: int, conditioning: ConditioningConfig) -> DiffusionModel:
    assert isinstance(model.unet, UNetConfig)
    return replace(model, unet=replace(model.unet, channels=channels, conditioning=conditioning))


BASE_64_50M = _base(64, (2, 2, 3, 3))
BASE_64_120M = _base(96, (2, 2, 4, 4))
"""The base U-Net (F.1) with 64 and 96 channels at 64×64, a third and half of the 300 M model's."""

SR_256_SMALL = _narrowed(SR_256, 32, ConditioningConfig(256, MaskedText(256)))
SR_256_MEDIUM = _narrowed(SR_256, 64, ConditioningConfig(512, MaskedText(512)))
"""The Efficient U-Net (F.2) with 32 and 64 channels: about 30 and 120 M parameters."""

SR_1024_SMALL = _narrowed(SR_1024, 32, ConditioningConfig(256, MaskedText(256, pool=False)))
SR_1024_MEDIUM = _narrowed(SR_1024, 64, ConditioningConfig(512, MaskedText(512, pool=False)))
"""The same without self-attention and with the linear schedule (F.3)."""

SAMPLING_BASE_SMALL = replace(SAMPLING_BASE, steps=128, guidance=Guidance(3.0))
"""Half of the steps. Smaller networks need more guidance to follow the text than the paper's 2B (w = 1.35): NVIDIA's
500M base with super-resolution to 256 had its best FID-30K at w = 3 (JAX-Toolbox)."""

SAMPLING_SR_SMALL = replace(SAMPLING_SR, steps=64)
"""Half of the steps; w = 8 as in the paper."""

"""The classes of settings that files of this project hold, and the version of those files."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.core.messages import quoted
from jaxdiff.core.settings import Table
from jaxdiff.diffusion import grids, guidance, losses, parameterization, samplers, schedules, thresholding
from jaxdiff.nets import blocks, classifier, unet
from jaxdiff.systems import imagen, imagen_drawing, tiles
from jaxdiff.weights import sizes

VERSION = 2
"""Of stage.json and classifier.json. 1, which did not say so, named classes by their bare names."""


def _check_whole(settings: Any, where: str) -> None:
    if isinstance(settings, unet.UNetConfig):
        sizes.check_network(settings, where)


TABLE = Table(
    {
        "imagen.Stage": imagen.Stage,
        "imagen.Sampling": imagen_drawing.Sampling,
        "imagen.NullText": imagen.NullText,
        "imagen.Enlargement": imagen.Enlargement,
        "imagen.Tiles": tiles.Tiles,
        "nets.UNet": unet.UNetConfig,
        "nets.EfficientUNet": unet.EfficientUNetConfig,
        "nets.Reading": unet.Reading,
        "nets.Activation": blocks.Activation,
        "nets.Classifier": classifier.ClassifierConfig,
        "diffusion.CosineSchedule": schedules.Cosine,
        "diffusion.LinearBetaSchedule": schedules.Linear,
        "diffusion.EDM": schedules.EDM,
        "diffusion.RectifiedFlow": schedules.RectifiedFlow,
        "diffusion.TabulatedSchedule": schedules.Discrete,
        "diffusion.Focused": schedules.Focused,
        "diffusion.Prediction": parameterization.Prediction,
        "diffusion.Guidance": guidance.Guidance,
        "diffusion.UniformWeighting": losses.Simple,
        "diffusion.MinSNR": losses.MinSNR,
        "diffusion.PowerSNR": losses.PowerSNR,
        "diffusion.SigmoidWeighting": losses.Sigmoid,
        "diffusion.DDPM": samplers.DDPM,
        "diffusion.DDIM": samplers.DDIM,
        "diffusion.DPMSolverPP2M": samplers.DPMSolverPP2M,
        "diffusion.Heun": samplers.Heun,
        "diffusion.Euler": samplers.Euler,
        "diffusion.UniformTime": grids.UniformTime,
        "diffusion.UniformLogSNR": grids.UniformLogSNR,
        "diffusion.Karras": grids.Karras,
        "diffusion.Leading": grids.Leading,
        "diffusion.Trailing": grids.Trailing,
        "diffusion.Linspace": grids.Linspace,
        "diffusion.Respaced": grids.Respaced,
        "diffusion.NoThreshold": thresholding.Unthresholded,
        "diffusion.StaticThreshold": thresholding.Static,
        "diffusion.DynamicThreshold": thresholding.Dynamic,
    },
    sizes.check,
    _check_whole,
)

to_json, from_json = TABLE.to_json, TABLE.from_json


def check_version(data: Mapping[str, Any], where: str) -> None:
    """ValueError for a file of settings that another version wrote."""
    version = data.get("version", 1)
    if version != VERSION:
        raise ValueError(f"{where} has version {quoted(version)}, and version {VERSION} is read here: train it anew")

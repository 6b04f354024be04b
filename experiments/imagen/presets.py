"""The names that command lines use, and the values they stand for."""

from dataclasses import replace
from typing import Any

from jaxdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Sampler
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Leading, Respaced, Spacing
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.unet import Remat
from jaxdiff.systems import deepfloyd, imagen, imagen_tiny
from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.param_sharding import ParamSharding, Rule

STAGES: dict[str, dict[str, DiffusionModel]] = {
    "base32": {
        "micro": imagen_tiny.BASE_32_MICRO,
        "small": imagen_tiny.BASE_32_SMALL,
        "medium": imagen_tiny.BASE_32_MEDIUM,
        "tiny": imagen_tiny.BASE_32_TINY,
    },
    "base64": {
        "tiny": imagen_tiny.BASE_64_TINY,
        "quick": imagen_tiny.BASE_64_QUICK,
        "300m": imagen.BASE_64_300M,
        "500m": imagen.BASE_64_500M,
        "2b": imagen.BASE_64_2B,
    },
    "sr256": {"tiny": imagen_tiny.SR_256_TINY, "paper": imagen.SR_256},
    "sr1024": {"tiny": imagen_tiny.SR_1024_TINY, "paper": imagen.SR_1024},
}
READS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("micro", "small", "medium", "quick", "tiny"), (24, 128)),
    **dict.fromkeys(("300m", "500m", "2b", "paper"), imagen.T5_XXL),
}
"""Length and width of the text embeddings that a preset is planned and measured with: those of the shipped T5, and of
the paper's. Training takes the width of the text encoder at hand."""
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "dpmpp": DPMSolverPP2M(),
    "heun": Heun(),
    "euler": Euler(),
}
RESPACINGS: dict[str, Spacing] = {
    "fast27": deepfloyd.FAST27,
    "smart27": deepfloyd.SMART27,
    "smart50": deepfloyd.SMART50,
    "smart100": deepfloyd.SMART100,
    "smart185": deepfloyd.SMART185,
    "super27": deepfloyd.SUPER27,
    "super40": deepfloyd.SUPER40,
    "super100": deepfloyd.SUPER100,
    "even": Respaced((1,)),  # as many steps as are asked for
    "leading": Leading(),
}
THRESHOLDINGS: dict[str, Thresholding] = {
    "static": StaticThreshold(),
    "dynamic": DynamicThreshold(),
    "none": NoThreshold(),
}


def stage(name: str, preset: str) -> DiffusionModel:
    """The settings of a stage; ValueError that lists the presets it has."""
    if preset not in STAGES[name]:
        raise ValueError(f"{name} has no preset {preset!r}: choose from {', '.join(STAGES[name])}")
    return STAGES[name][preset]


def reading(name: str, preset: str) -> DiffusionModel:
    """The same for text embeddings of the preset's length and width."""
    return stage(name, preset).reading(*READS[preset])


def sampling(name: str, preset: str) -> SamplingConfig:
    """How a stage draws unless told otherwise."""
    if name == "base32":
        return imagen_tiny.SAMPLING_BASE_32
    if preset == "quick":
        return imagen_tiny.SAMPLING_BASE_QUICK
    if preset == "tiny":
        return imagen_tiny.SAMPLING_BASE_TINY if name == "base64" else imagen_tiny.SAMPLING_SR_TINY
    return imagen.SAMPLING_BASE if name == "base64" else imagen.SAMPLING_SR


def sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def respacing(name: str) -> Spacing:
    if name not in RESPACINGS:
        raise ValueError(f"unknown respacing {name!r}: choose from {', '.join(RESPACINGS)}")
    return RESPACINGS[name]


def thresholding(name: str) -> Thresholding:
    if name not in THRESHOLDINGS:
        raise ValueError(f"unknown thresholding {name!r}: choose from {', '.join(THRESHOLDINGS)}")
    return THRESHOLDINGS[name]


def split(stage: DiffusionModel, remat: Remat, scan: bool, rows: bool) -> DiffusionModel:
    """The same stage, computed over a mesh; `rows`: of pictures, over its tensor axis."""
    axes = ActivationSharding(BATCH_AXES, ("tensor",) if rows else ())
    return executed(stage, remat=remat, scan=scan, sharding=axes)


def executed(stage: DiffusionModel, **how: Any) -> DiffusionModel:
    """The same stage, computed in another way: fields of `ExecutionConfig`."""
    return replace(stage, unet=replace(stage.unet, execution=replace(stage.unet.execution, **how)))


def placement(stage: DiffusionModel, rows: bool) -> ParamSharding:
    """Layers are split over the tensor axis, unless it has the rows of pictures."""
    return ParamSharding() if rows else ParamSharding(tuple(Rule(*rule) for rule in stage.unet.tensor_rules()))

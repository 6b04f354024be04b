"""The names that command lines use, and the values they stand for."""

from dataclasses import replace

from jaxdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Sampler
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Leading, Respaced, Spacing
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.unet import Remat
from jaxdiff.systems import imagen as presets
from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.param_sharding import ParamSharding, Rule

STAGES: dict[str, dict[str, DiffusionModel]] = {
    "base32": {
        "micro": presets.BASE_32_MICRO,
        "small": presets.BASE_32_SMALL,
        "medium": presets.BASE_32_MEDIUM,
        "tiny": presets.BASE_32_TINY,
    },
    "base64": {
        "tiny": presets.BASE_64_TINY,
        "quick": presets.BASE_64_QUICK,
        "300m": presets.BASE_64_300M,
        "500m": presets.BASE_64_500M,
        "2b": presets.BASE_64_2B,
    },
    "sr256": {"tiny": presets.SR_256_TINY, "paper": presets.SR_256},
    "sr1024": {"tiny": presets.SR_1024_TINY, "paper": presets.SR_1024},
}
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "dpmpp": DPMSolverPP2M(),
    "heun": Heun(),
    "euler": Euler(),
}
RESPACINGS: dict[str, Spacing] = {
    "fast27": presets.FAST27,
    "smart27": presets.SMART27,
    "smart50": presets.SMART50,
    "smart100": presets.SMART100,
    "smart185": presets.SMART185,
    "super27": presets.SUPER27,
    "super40": presets.SUPER40,
    "super100": presets.SUPER100,
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


def sampling(name: str, preset: str) -> SamplingConfig:
    """How a stage draws unless told otherwise."""
    if name == "base32":
        return presets.SAMPLING_BASE_32
    if preset == "quick":
        return presets.SAMPLING_BASE_QUICK
    if preset == "tiny":
        return presets.SAMPLING_BASE_TINY if name == "base64" else presets.SAMPLING_SR_TINY
    return presets.SAMPLING_BASE if name == "base64" else presets.SAMPLING_SR


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
    return replace(stage, unet=replace(stage.unet, remat=remat, scan=scan, axes=axes))


def placement(stage: DiffusionModel, rows: bool) -> ParamSharding:
    """Layers are split over the tensor axis, unless it has the rows of pictures."""
    return ParamSharding() if rows else ParamSharding(tuple(Rule(*rule) for rule in stage.unet.tensor_rules()))

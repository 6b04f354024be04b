"""Command-line names of samplers, respacings and thresholdings, with their values."""

from jaxdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Sampler
from jaxdiff.diffusion.solvers import Solver
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Leading, Respaced, Spacing
from jaxdiff.systems import deepfloyd, stable_diffusion

SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "dpmpp": DPMSolverPP2M(),
    "heun": Heun(),
    "euler": Euler(),
}
SOLVERS: dict[str, Solver] = {
    "ddim": stable_diffusion.SOLVER_DDIM,
    "plms": stable_diffusion.SOLVER_PLMS,
    "euler": stable_diffusion.SOLVER_EULER,
    "euler-a": stable_diffusion.SOLVER_EULER_ANCESTRAL,
    "dpmpp-2m": stable_diffusion.SOLVER_DPMPP_2M,
    "dpmpp-2m-karras": stable_diffusion.SOLVER_DPMPP_2M_KARRAS,
}
"""Of latent diffusion, whose samplers have spacings of their own."""
RESPACINGS: dict[str, Spacing] = {
    "fast27": deepfloyd.FAST27,
    "smart27": deepfloyd.SMART27,
    "smart50": deepfloyd.SMART50,
    "smart100": deepfloyd.SMART100,
    "smart185": deepfloyd.SMART185,
    "super27": deepfloyd.SUPER27,
    "super40": deepfloyd.SUPER40,
    "super100": deepfloyd.SUPER100,
    "even": Respaced((1,)),  # --steps, evenly spaced
    "leading": Leading(),
}
THRESHOLDINGS: dict[str, Thresholding] = {
    "static": StaticThreshold(),
    "dynamic": DynamicThreshold(),
    "none": NoThreshold(),
}


def sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def solver(name: str) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"unknown sampler {name!r} of latent diffusion: choose from {', '.join(SOLVERS)}")
    return SOLVERS[name]


def respacing(name: str) -> Spacing:
    if name not in RESPACINGS:
        raise ValueError(f"unknown respacing {name!r}: choose from {', '.join(RESPACINGS)}")
    return RESPACINGS[name]


def thresholding(name: str) -> Thresholding:
    if name not in THRESHOLDINGS:
        raise ValueError(f"unknown thresholding {name!r}: choose from {', '.join(THRESHOLDINGS)}")
    return THRESHOLDINGS[name]

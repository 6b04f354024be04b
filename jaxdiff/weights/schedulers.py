"""diffusers' scheduler_config.json ⇄ a noise schedule, what the network predicts, and sampling settings.

Every setting of a supported scheduler is either read or must have a supported value. Settings of other schedulers are
ignored, as in diffusers: published files keep those of the scheduler that they were written for.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, PLMS, DPMSolverPP2M, Euler
from jaxdiff.diffusion.schedules import Schedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Leading, Linspace, Spacing, TabulatedKarras, Trailing
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.weights import hub, sizes

SPACINGS = ("leading", "trailing", "linspace")
"""diffusers' names of the timestep spacings."""
PREDICTIONS = {"epsilon": Prediction.EPSILON, "v_prediction": Prediction.V}
VARIANCES = {"fixed_small": 0.0, "fixed_small_log": 0.0, "fixed_large": 1.0, "fixed_large_log": 1.0}
"""γ of `DDPM`."""
_NO_CAP = 1e6
"""A cap of dynamic thresholding that no x₀ reaches: diffusers always has one."""
NEAR_ZERO = 2.0**-24
"""ᾱ of the last entry with zero terminal SNR, in the schedulers that divide by it."""

_COMMON: dict[str, tuple] = {
    "num_train_timesteps": (1000,),
    "beta_start": (0.0001,),
    "beta_end": (0.02,),
    "beta_schedule": ("linear", "linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (None, None),
    "prediction_type": ("epsilon", *PREDICTIONS),
    "timestep_spacing": ("leading", *SPACINGS),
    "steps_offset": (0,),
}
_FROM_LINSPACE = _COMMON | {"timestep_spacing": ("linspace", *SPACINGS), "rescale_betas_zero_snr": (False, False, True)}
_DYNAMIC: dict[str, tuple] = {
    "thresholding": (False, False, True),
    "dynamic_thresholding_ratio": (0.995,),
    "sample_max_value": (1.0,),
}
_CLIPPED = _DYNAMIC | {
    "clip_sample": (True, True, False),
    "clip_sample_range": (1.0,),
    "rescale_betas_zero_snr": (False, False, True),
}
_SIGMAS: dict[str, tuple] = {
    "use_karras_sigmas": (False, False, True),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "final_sigmas_type": ("zero", "zero"),
}
SETTINGS: dict[str, dict[str, tuple]] = {
    "PNDMScheduler": _COMMON | {"skip_prk_steps": (False, True), "set_alpha_to_one": (False, False, True)},
    "DDIMScheduler": _COMMON | _CLIPPED | {"set_alpha_to_one": (True, True, False)},
    "DDPMScheduler": _COMMON | _CLIPPED | {"variance_type": ("fixed_small",)},
    "EulerDiscreteScheduler": _FROM_LINSPACE
    | _SIGMAS
    | {
        "interpolation_type": ("linear", "linear"),
        "sigma_min": (None, None),
        "sigma_max": (None, None),
        "timestep_type": ("discrete", "discrete"),
    },
    "EulerAncestralDiscreteScheduler": _FROM_LINSPACE,
    "DPMSolverMultistepScheduler": _FROM_LINSPACE
    | _SIGMAS
    | _DYNAMIC
    | {
        "solver_order": (2, 2),
        "algorithm_type": ("dpmsolver++", "dpmsolver++", "deis"),  # diffusers takes the second as the first
        "solver_type": ("midpoint", "midpoint", "logrho", "bh1", "bh2"),
        "lower_order_final": (True, True, False),
        "euler_at_final": (False, False, True),
        "final_sigmas_type": ("zero", "zero", "sigma_min"),
        "use_lu_lambdas": (False, False),
        "use_flow_sigmas": (False, False),
        "flow_shift": (1.0, 1.0),
        "lambda_min_clipped": (-math.inf,),
        "variance_type": (None, None),
        "use_dynamic_shifting": (False, False),
        "time_shift_type": ("exponential", "exponential"),
    },
}
"""For each setting of each scheduler: the default, then the supported values if they are few."""
OTHERS = {"disable_corrector", "predict_x0", "solver_p", "original_inference_steps", "timestep_scaling", "sigma_data"}
"""Settings of other schedulers of diffusers that published files have."""


class Scheduler(NamedTuple):
    """What a scheduler_config.json says. sampling: fields of `SamplingConfig`."""

    schedule: TabulatedSchedule
    prediction: Prediction
    sampling: dict[str, Any]


def read(path: Path, learned: bool = False) -> Scheduler:
    """Read a scheduler_config.json. learned: whether the network predicts the variance.

    Raises FileNotFoundError, or ValueError that names the file and the unsupported setting.
    """
    return from_values(path, hub.read_json(path, "scheduler"), learned)


def described(
    schedule: Schedule, prediction: Prediction, sampling: SamplingConfig, learned: bool = False
) -> dict[str, Any]:
    """The inverse of `read`: the settings of a scheduler_config.json. ValueError if diffusers cannot express one.

    Of the sampling only sampler, spacing, thresholding, keep_eps (where it matters) and scaled_start are described.
    """
    threshold = sampling.thresholding
    if isinstance(threshold, DynamicThreshold) and threshold.cap is None:
        sampling = replace(sampling, thresholding=replace(threshold, cap=_NO_CAP))
    names = {value: name for name, value in PREDICTIONS.items()}
    if prediction not in names:
        raise ValueError(f"diffusers' schedulers have no prediction = {prediction} here")
    config = _sampler_config(sampling, learned) | {"prediction_type": names[prediction]}
    known = SETTINGS[config["_class_name"]]
    config |= _spacing_config(sampling.spacing, known) | _threshold_config(sampling.thresholding, known)
    config |= _betas_config(schedule, config["_class_name"])
    back = from_values(Path("scheduler_config.json"), config, learned)
    unclipped = sampling.thresholding == NoThreshold()
    for name, value in back.sampling.items():
        if getattr(sampling, name) != value and not (name == "keep_eps" and unclipped):
            raise ValueError(
                f"diffusers has no {name} = {getattr(sampling, name)} in {config['_class_name']}, "
                f"which has sampler = {sampling.sampler}"
            )
    return config


def from_values(path: Path, given: Mapping[str, Any], learned: bool = False) -> Scheduler:
    """`read` for the content of a file. path: its name in messages."""
    config = _checked(path, given)
    name = given["_class_name"]
    schedule = _schedule(config, name)
    prediction = PREDICTIONS[config.values["prediction_type"]]
    config.size("steps_offset", None, 0, schedule.steps - 1)
    sampling = _READERS[name](config, schedule, prediction, learned)
    defaults = {"thresholding": NoThreshold(), "keep_eps": False, "scaled_start": False}
    return Scheduler(schedule, prediction, defaults | sampling)


def _checked(path: Path, given: Mapping[str, Any]) -> hub.Group:
    """The settings of the file's class, with defaults; ValueError for an unsupported value or an unknown setting."""
    config = hub.Group(path, {name: value for name, value in given.items() if value is not None})
    config.require("_class_name", tuple(SETTINGS))
    known = SETTINGS[given["_class_name"]]
    elsewhere = OTHERS.union(*SETTINGS.values())
    unknown = sorted(name for name in given if not name.startswith("_") and name not in elsewhere)
    if unknown:
        raise ValueError(f"{path}: unknown settings of {given['_class_name']}: {sizes.names(unknown)}")
    values = {name: config.values.get(name, default) for name, (default, *_) in known.items()}
    for name, (_, *allowed) in known.items():
        value = values[name]
        # In Python 1 is True.
        if allowed and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            flags = set(allowed) == {False, True}
            raise config.error(name, value, "true or false" if flags else " or ".join(map(repr, allowed)))
    return hub.Group(path, values)


def _schedule(config: hub.Group, kind: str) -> TabulatedSchedule:
    steps = config.size("num_train_timesteps", None, 2, sizes.STEPS.most)
    betas = config.values["beta_schedule"]
    if betas == "squaredcos_cap_v2":
        schedule = TabulatedSchedule.cosine(steps)
    else:
        start, end = (config.fraction(name, 0.0) for name in ("beta_start", "beta_end"))
        if start > end:
            raise config.error("beta_start", start, f"a number up to beta_end {end}")
        schedule = _BETAS[betas](steps, start, end)
    return _rescaled(schedule, kind, config.path) if config.values.get("rescale_betas_zero_snr") else schedule


_BETAS: dict[str, Callable[[int, float, float], TabulatedSchedule]] = {
    "linear": TabulatedSchedule.linear,
    "scaled_linear": TabulatedSchedule.scaled_linear,
}


def _rescaled(schedule: TabulatedSchedule, kind: str, path: Path) -> TabulatedSchedule:
    try:
        return schedule.zero_terminal_snr(0.0 if kind in ("DDIMScheduler", "DDPMScheduler") else NEAR_ZERO)
    except ValueError as error:  # an entry before the last has less signal than diffusers' near zero
        raise ValueError(f"{path}: rescale_betas_zero_snr = True does not fit these betas: {error}") from error


def _spacing(
    config: hub.Group, *, rounded: bool = True, skip_cleanest: bool = False, to_first_entry: bool = False
) -> Leading | Trailing | Linspace:
    """The timestep spacing. `steps_offset` applies to leading spacing only."""
    match config.values["timestep_spacing"]:
        case "leading":
            return Leading(config.values["steps_offset"], skip_cleanest, to_first_entry)
        case "trailing":
            return Trailing(to_first_entry)
    return Linspace(rounded, skip_cleanest, to_first_entry)


def _ddim(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    spacing = _spacing(config, to_first_entry=not config.values["set_alpha_to_one"])
    return {"sampler": DDIM(), "spacing": spacing, "keep_eps": True, "thresholding": _thresholding(config)}


def _plms(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    spacing = _spacing(config, to_first_entry=not config.values["set_alpha_to_one"])
    return {"sampler": PLMS(prediction), "spacing": spacing}


def _ddpm(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    variances = VARIANCES | ({"learned_range": None} if learned else {})
    config.require("variance_type", tuple(variances))
    sampler = DDPM(variances[config.values["variance_type"]])
    return {"sampler": sampler, "spacing": _spacing(config), "thresholding": _thresholding(config)}


def _ancestral(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    scaled = config.values["timestep_spacing"] != "leading"
    return {"sampler": DDIM(eta=1.0), "spacing": _spacing(config, rounded=False), "scaled_start": scaled}


def _euler(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    scaled, spacing = config.values["timestep_spacing"] != "leading", _spacing(config, rounded=False)
    karras = config.values["use_karras_sigmas"]
    return {"sampler": Euler(), "spacing": TabulatedKarras(spacing) if karras else spacing, "scaled_start": scaled}


def _solver(config: hub.Group, schedule: TabulatedSchedule, prediction: Prediction, learned: bool) -> dict[str, Any]:
    values = config.values
    if values["use_karras_sigmas"] and values["beta_schedule"] == "squaredcos_cap_v2":
        raise config.error("use_karras_sigmas", True, "False with beta_schedule squaredcos_cap_v2")
    wanted, signal = values["lambda_min_clipped"], schedule.alpha_bar[-1]
    least = 0.5 * math.log(signal / (1.0 - signal))
    if type(wanted) not in (int, float) or not wanted <= least:
        raise config.error("lambda_min_clipped", wanted, f"numbers up to {least:.3g}, the lowest of the betas")
    first_order = values["euler_at_final"] or values["final_sigmas_type"] == "zero"
    if values["lower_order_final"] and not first_order:
        raise config.error("lower_order_final", True, "False with final_sigmas_type sigma_min, unless euler_at_final")
    last = values["final_sigmas_type"] == "sigma_min"
    spacing: Spacing = _spacing(config, skip_cleanest=True, to_first_entry=last)
    if values["use_karras_sigmas"]:
        spacing = TabulatedKarras(rounded=True, to_first_entry=last)
    return {"sampler": DPMSolverPP2M(first_order), "spacing": spacing, "thresholding": _thresholding(config)}


_READERS: dict[str, Callable[[hub.Group, TabulatedSchedule, Prediction, bool], dict[str, Any]]] = {
    "PNDMScheduler": _plms,
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "DPMSolverMultistepScheduler": _solver,
}


def _thresholding(config: hub.Group) -> Thresholding:
    if config.values["thresholding"]:
        return DynamicThreshold(
            _above_zero(config, "dynamic_thresholding_ratio", 1.0), _limit(config, "sample_max_value")
        )
    return StaticThreshold(_limit(config, "clip_sample_range")) if config.values.get("clip_sample") else NoThreshold()


def _limit(config: hub.Group, name: str) -> float:
    return _above_zero(config, name, 1e9)


def _above_zero(config: hub.Group, name: str, most: float) -> float:
    value = config.values[name]
    if type(value) not in (int, float) or not 0.0 < value <= most:
        raise config.error(name, value, f"a number above 0 and up to {most:g}")
    return float(value)


def _sampler_config(sampling: SamplingConfig, learned: bool) -> dict[str, Any]:
    match sampling.sampler:
        case DDPM(gamma) if gamma in (0.0, 1.0) or (gamma is None and learned):
            variance = "learned_range" if gamma is None else "fixed_large" if gamma else "fixed_small"
            return {"_class_name": "DDPMScheduler", "variance_type": variance}
        case DDIM(0.0) if sampling.keep_eps or sampling.thresholding == NoThreshold():
            return {"_class_name": "DDIMScheduler"}
        case DDIM(1.0):
            return {"_class_name": "EulerAncestralDiscreteScheduler"}
        case Euler():
            return {"_class_name": "EulerDiscreteScheduler"}
        case PLMS():
            return {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
        case DPMSolverPP2M(first_order):
            order = {"lower_order_final": False, "euler_at_final": first_order}
            return {"_class_name": "DPMSolverMultistepScheduler"} | order
    kept = f" with keep_eps = {sampling.keep_eps}" if isinstance(sampling.sampler, DDIM) else ""
    raise ValueError(f"diffusers has no sampler = {sampling.sampler}{kept}")


def _spacing_config(spacing: Any, known: Mapping[str, tuple]) -> dict[str, Any]:
    to_first_entry = getattr(spacing, "to_first_entry", False)
    config: dict[str, Any] = {"set_alpha_to_one": not to_first_entry} if "set_alpha_to_one" in known else {}
    if "sigma_min" in known.get("final_sigmas_type", ()):
        config["final_sigmas_type"] = "sigma_min" if to_first_entry else "zero"
    if "use_karras_sigmas" in known:
        config["use_karras_sigmas"] = isinstance(spacing, TabulatedKarras)
    if isinstance(spacing, TabulatedKarras):
        spacing = spacing.ends or Linspace()
    names: dict[type, str] = {Leading: "leading", Trailing: "trailing", Linspace: "linspace"}
    if type(spacing) not in names:
        raise ValueError(f"diffusers has no spacing = {spacing}")
    offset = {"steps_offset": spacing.offset} if isinstance(spacing, Leading) else {}
    return config | {"timestep_spacing": names[type(spacing)]} | offset


def _threshold_config(threshold: Thresholding, known: Mapping[str, tuple]) -> dict[str, Any]:
    config: dict[str, Any] = {"clip_sample": isinstance(threshold, StaticThreshold)} if "clip_sample" in known else {}
    if config and isinstance(threshold, StaticThreshold) and threshold.limit != 1.0:
        config["clip_sample_range"] = threshold.limit
    if "thresholding" in known:
        config["thresholding"] = isinstance(threshold, DynamicThreshold)
        if isinstance(threshold, DynamicThreshold):
            config |= {"dynamic_thresholding_ratio": threshold.percentile, "sample_max_value": threshold.cap}
    return config


def _betas_config(schedule: Schedule, kind: str) -> dict[str, Any]:
    """The settings of the betas; ValueError if none gives the table."""
    error = f"diffusers has no schedule = {schedule}: its betas are linear, scaled_linear or squaredcos_cap_v2"
    if not isinstance(schedule, TabulatedSchedule) or schedule.steps < 2:
        raise ValueError(error)
    for candidate in _candidates(np.asarray(schedule.alpha_bar), "rescale_betas_zero_snr" in SETTINGS[kind]):
        try:
            found = _schedule(hub.Group(Path("scheduler_config.json"), candidate), kind)
        except ValueError:
            continue
        if found.clip == schedule.clip and np.allclose(found.alpha_bar, schedule.alpha_bar, rtol=1e-7, atol=0.0):
            return candidate
    raise ValueError(error)


def _candidates(alpha_bar: np.ndarray, may_rescale: bool) -> Iterator[dict[str, Any]]:
    """Settings that may give this table."""
    first, last = (float(f"{beta:.10g}") for beta in (1.0 - alpha_bar[0], 1.0 - alpha_bar[-1] / alpha_bar[-2]))
    count: dict[str, Any] = {"num_train_timesteps": len(alpha_bar)}
    for rescaled in (False, True) if may_rescale else (False,):
        config = count | ({"rescale_betas_zero_snr": True} if rescaled else {})
        yield config | {"beta_schedule": "squaredcos_cap_v2"}
        # Rescaling hides the last beta: those of DDPM and of latent diffusion.
        for name, end in itertools.product(_BETAS, (0.02, 0.012) if rescaled else (last,)):
            yield config | {"beta_schedule": name, "beta_start": first, "beta_end": end}

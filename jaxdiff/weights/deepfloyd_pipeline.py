"""DeepFloyd IF as diffusers pipelines: one folder per stage, with its U-Net, its scheduler and the text encoder.

    STAGE_I/   model_index.json  unet/  scheduler/  text_encoder/  tokenizer/
    STAGE_II/  model_index.json  unet/  scheduler/  image_noising_scheduler/

The scheduler's settings define the stage's sampling; settings that it lacks (guidance, steps, noise level on the input
of stage II) come from `systems/deepfloyd.py`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.core.messages import quoted
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace, Spacing, Trailing
from jaxdiff.models.conditioners import Enlargement, LowResConditioner, NullText
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.text.cleaning import clean_caption
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import deepfloyd, hub, sizes, t5

INDEX = "model_index.json"
LENGTH = 77
"""Tokens per caption in IF's training."""


def load_stage(
    directory: Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> TrainedModel:
    """Load the stage of a pipeline's folder; parameters and compute type in `dtype`, "float32" or "bfloat16".

    Raises FileNotFoundError, or ValueError that names the file and the invalid setting or tensors.
    """
    if (directory / INDEX).is_file():
        kind = hub.read_json(directory / INDEX, "DeepFloyd IF").get("_class_name")
        if not str(kind).startswith("IF"):
            raise ValueError(f"{directory / INDEX}: _class_name = {quoted(kind)} is not supported, only IF's pipelines")
    config = directory / "unet" / "config.json"
    side = hub.Group(config, hub.read_json(config, "U-Net")).size("sample_size", None, *sizes.SIDE)
    network, params = deepfloyd.load_unet(directory / "unet", dtype, variant=variant, place=place)
    try:
        model = presets.if_model(network.unet, side, low_res=network.low_res).reading(LENGTH, network.text_width)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    sampling = presets.SAMPLING_II if network.low_res else presets.SAMPLING_I
    for name in ("scheduler", "image_noising_scheduler"):
        path = directory / name / "scheduler_config.json"
        if path.is_file():
            schedule, fields = read_scheduler(path, network.unet.learned_variance)
            if name == "scheduler":
                model, sampling = replace(model, schedule=schedule), replace(sampling, **fields)
            else:
                conditioners = tuple(_with_augmentation(schedule, each) for each in model.conditioners)
                model = replace(model, conditioners=conditioners)
    return TrainedModel(model, params, sampling)


def _with_augmentation(schedule: TabulatedSchedule, conditioner: Any) -> Any:
    return replace(conditioner, augmentation=schedule) if isinstance(conditioner, LowResConditioner) else conditioner


def load_text_encoder(
    directory: Path,
    dtype: str = "float32",
    *,
    clean: bool = True,
    variant: str | None = None,
    place: hub.Place = jnp.asarray,
) -> T5TextEncoder:
    """The frozen T5 of stage I. Captions are cleaned as in IF's training; with `clean=False`, only lowercased."""
    encoder = t5.load_text_encoder(
        directory / "text_encoder", LENGTH, dtype, tokenizer=directory / "tokenizer", variant=variant, place=place
    )
    return replace(encoder, padding_is_read=True, prepare=clean_caption if clean else lowered)


def lowered(caption: str) -> str:
    """`caption` in lower case, stripped."""
    return caption.lower().strip()


def read_scheduler(path: Path, learned: bool) -> tuple[TabulatedSchedule, dict[str, Any]]:
    """Read a scheduler_config.json: the schedule, and fields of `SamplingConfig`.

    learned: whether the network predicts the variance. ValueError that names an unsupported setting.
    """
    values = hub.read_json(path, "scheduler")
    config = hub.Group(path, {name: value for name, value in values.items() if value is not None})
    config.require("_class_name", ("DDPMScheduler", "DDIMScheduler"))
    unknown = sorted(name for name in values if not name.startswith("_") and name not in {*SCHEDULER, *SOLVER})
    if unknown:
        raise ValueError(f"{path}: unknown settings of {values['_class_name']}: {sizes.names(unknown)}")
    for name, (default, *allowed) in SCHEDULER.items():
        if allowed:
            config.require(name, tuple(allowed), default)
    schedule = TabulatedSchedule.cosine(config.size("num_train_timesteps", 1000, 2, sizes.STEPS.most))
    fields: dict[str, Any] = {"thresholding": _thresholding(config)} | _spacing(config, schedule.steps)
    if values["_class_name"] == "DDIMScheduler":
        return schedule, fields | {"sampler": DDIM(), "keep_eps": True}
    variances: dict[str, float | None] = {
        "fixed_small": 0.0,
        "fixed_small_log": 0.0,
        "fixed_large": 1.0,
        "fixed_large_log": 1.0,
    }
    variances |= {"learned_range": None} if learned else {}
    config.require("variance_type", tuple(variances), "fixed_small")
    return schedule, fields | {"sampler": DDPM(variances[config.values.get("variance_type", "fixed_small")])}


SPACINGS: dict[str, type[Spacing]] = {"leading": Leading, "trailing": Trailing, "linspace": Linspace}
"""diffusers' names of the timestep spacings."""
SCHEDULER: dict[str, tuple] = {
    "beta_schedule": ("linear", "squaredcos_cap_v2"),
    "trained_betas": (None, None),
    "prediction_type": ("epsilon", "epsilon"),
    "steps_offset": (0,),
    "rescale_betas_zero_snr": (False, False),
    "set_alpha_to_one": (True, True),
    "clip_sample_range": (1.0, 1.0),
    "num_train_timesteps": (1000,),
    "variance_type": ("fixed_small",),
    "clip_sample": (True,),
    "thresholding": (False,),
    "dynamic_thresholding_ratio": (0.995,),
    "sample_max_value": (1.0,),
    "beta_start": (0.0001,),  # for other schedules
    "beta_end": (0.02,),
    "timestep_spacing": ("leading", *SPACINGS),
}
"""For each setting: the schedulers' default, then the supported values if they are restricted."""
SOLVER = {"algorithm_type", "disable_corrector", "lambda_min_clipped", "lower_order_final", "predict_x0"} | {
    *("solver_order", "solver_p", "solver_type", "use_karras_sigmas"),
}
"""Settings of DPM-Solver and UniPC in the published files, which DDPM ignores."""


def _spacing(config: hub.Group, steps: int) -> dict[str, Spacing]:
    """The timestep spacing, if the file sets one. The published files do not; the default is in `systems/deepfloyd.py`.

    `steps_offset` applies to leading spacing only, as in diffusers. Each step ends where the next one begins; in
    diffusers DDIM's steps are N // k entries long, whatever the spacing.
    """
    offset = config.size("steps_offset", 0, 0, steps - 1)
    if "timestep_spacing" not in config.values and not offset:
        return {}
    kind = SPACINGS[config.values.get("timestep_spacing", "leading")]
    return {"spacing": Leading(offset) if kind is Leading else kind()}


def _thresholding(config: hub.Group) -> DynamicThreshold | StaticThreshold | NoThreshold:
    if not config.flag("thresholding", False):
        return StaticThreshold() if config.flag("clip_sample", True) else NoThreshold()
    numbers = []
    for name, most in (("dynamic_thresholding_ratio", 1.0), ("sample_max_value", 1e9)):
        value = config.values.get(name, *SCHEDULER[name])
        if type(value) not in (int, float) or not 0.0 < value <= most:
            raise config.error(name, value, f"a number above 0 and up to {most:g}")
        numbers.append(float(value))
    return DynamicThreshold(*numbers)


def described(trained: TrainedModel) -> dict[str, dict[str, Any]]:
    """The settings of each component that `export_stage` writes. ValueError if diffusers cannot express a setting."""
    model, sampling = trained.model, trained.sampling
    if not isinstance(model.unet, UNetConfig):
        raise ValueError(f"diffusers' DeepFloyd IF has no {type(model.unet).__name__}")
    text, low_res = model.text, model.low_res
    enlargement = None if low_res is None else low_res.enlargement
    for name, fits, value in (
        ("prediction", model.prediction is Prediction.EPSILON, model.prediction),
        ("low_res.enlargement", enlargement in (None, Enlargement.BILINEAR), enlargement),
        ("text.null", text is not None and text.null is NullText.EMPTY, text and text.null),
        ("text.length", text is not None and text.length == LENGTH, text and text.length),
        ("residual", not model.residual, model.residual),
        ("low_res.factor", low_res is None or model.factor == 4, model.factor),
    ):
        if not fits:
            raise ValueError(f"diffusers' DeepFloyd IF has no stage with {name} = {value}")
    sampler = _sampler_config(sampling, model.unet.learned_variance)
    config = {"scheduler": _scheduler(model.schedule, "schedule") | sampler}
    if low_res is not None:
        config["image_noising_scheduler"] = _scheduler(low_res.augmentation, "low_res.augmentation")
    return config | {"unet": deepfloyd.described(_network(model), trained.params) | {"sample_size": model.side}}


def _network(model: DiffusionModel) -> deepfloyd.Network:
    assert model.text is not None and isinstance(model.unet, UNetConfig)  # see `described`
    return deepfloyd.Network(model.unet, model.text.shape[1], model.low_res is not None)


def export_stage(
    trained: TrainedModel, directory: Path, text: T5TextEncoder | None = None, dtype: str = "float32"
) -> None:
    """Writes a stage for diffusers' IFPipeline, with its text encoder, or IFSuperResolutionPipeline.

    ValueError if diffusers cannot express a setting, before anything is written; OSError if writing fails.
    """
    config = described(trained)
    unet = config.pop("unet")
    deepfloyd.export_unet(_network(trained.model), trained.params, directory / "unet", dtype)
    hub.write_json(directory / "unet" / "config.json", unet)
    components: dict[str, Any] = dict.fromkeys(("feature_extractor", "safety_checker", "watermarker"), (None, None))
    components |= {"requires_safety_checker": False, "unet": ("diffusers", "UNet2DConditionModel")}
    for name, values in config.items():
        hub.write_json(directory / name / "scheduler_config.json", values)
        components[name] = "diffusers", values["_class_name"]
    components |= {"text_encoder": (None, None), "tokenizer": (None, None)}
    if text is not None:
        t5.export(text.config, text.params, directory / "text_encoder", dtype)
        text.tokenizer.save_pretrained(str(directory / "tokenizer"))
        components |= {"text_encoder": ("transformers", "T5EncoderModel")}
        components |= {"tokenizer": ("transformers", type(text.tokenizer).__name__)}
    name = "IFSuperResolutionPipeline" if trained.model.low_res is not None else "IFPipeline"
    hub.write_json(directory / INDEX, {"_class_name": name} | components)


def _scheduler(schedule: Any, name: str) -> dict[str, Any]:
    if not isinstance(schedule, TabulatedSchedule) or schedule != TabulatedSchedule.cosine(schedule.steps):
        raise ValueError(f"diffusers' DeepFloyd IF has no {name} = {schedule}: it has to be TabulatedSchedule.cosine()")
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": schedule.steps,
        "prediction_type": "epsilon",
    }


def _sampler_config(sampling: SamplingConfig, learned: bool) -> dict[str, Any]:
    threshold, sampler = sampling.thresholding, sampling.sampler
    config: dict[str, Any] = {"thresholding": False, "clip_sample": isinstance(threshold, StaticThreshold)}
    spacings = [name for name, kind in SPACINGS.items() if isinstance(sampling.spacing, kind)]
    config |= {"timestep_spacing": spacings[0]} if spacings else {}
    config |= {"steps_offset": sampling.spacing.offset} if isinstance(sampling.spacing, Leading) else {}
    if isinstance(threshold, DynamicThreshold):
        config["thresholding"] = True
        cap = 1e6 if threshold.cap is None else threshold.cap
        config |= {"dynamic_thresholding_ratio": threshold.percentile, "sample_max_value": cap}
    if sampler == DDIM() and sampling.keep_eps:
        return config | {"_class_name": "DDIMScheduler"}
    gammas = {0.0: "fixed_small", 1.0: "fixed_large"} | ({None: "learned_range"} if learned else {})
    if not isinstance(sampler, DDPM) or sampler.gamma not in gammas:
        kept = f" with keep_eps = {sampling.keep_eps}" if isinstance(sampler, DDIM) else ""
        raise ValueError(f"diffusers' DeepFloyd IF has no sampler = {sampler}{kept}")
    return config | {"variance_type": gammas[sampler.gamma]}

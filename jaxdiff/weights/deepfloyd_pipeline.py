"""DeepFloyd IF as diffusers pipelines: one folder per stage, with its U-Net, its scheduler and the text encoder.

    STAGE_I/   model_index.json  unet/  scheduler/  text_encoder/  tokenizer/
    STAGE_II/  model_index.json  unet/  scheduler/  image_noising_scheduler/

The scheduler's settings define the stage's sampling; settings that it lacks (guidance, steps, noise level on the input
of stage II) come from `systems/deepfloyd.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.core.messages import quoted
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.time_grid import Leading, Linspace, Trailing
from jaxdiff.models.conditioners import Enlargement, LowResConditioner, NullText
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.text.cleaning import clean_caption
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import deepfloyd, hub, schedulers, sizes, t5

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

    The spacing is among them only if the file sets one. The published files do not; the default is in
    `systems/deepfloyd.py`. learned: whether the network predicts the variance. ValueError that names an unsupported
    setting.
    """
    values = hub.read_json(path, "scheduler")
    _check_scheduler(path, values)
    schedule, _, fields = schedulers.read(path, learned)
    if values.get("timestep_spacing") is None and not values.get("steps_offset"):
        del fields["spacing"]
    return schedule, fields


def _check_scheduler(path: Path, values: Mapping[str, Any]) -> None:
    """ValueError for settings that `schedulers.read` supports, but IF does not have."""
    config = hub.Group(path, {name: value for name, value in values.items() if value is not None})
    config.require("_class_name", ("DDPMScheduler", "DDIMScheduler"))
    config.require("beta_schedule", ("squaredcos_cap_v2",), "linear")
    config.require("prediction_type", ("epsilon",), "epsilon")
    config.require("rescale_betas_zero_snr", (False,), False)
    config.require("set_alpha_to_one", (True,), True)
    config.require("clip_sample_range", (1.0,), 1.0)


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
    config = {"scheduler": _scheduler(model.schedule, "schedule") | _sampler_config(model, sampling)}
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


def _sampler_config(model: DiffusionModel, sampling: SamplingConfig) -> dict[str, Any]:
    """Without a spacing if diffusers has none like it, as IF's own."""
    known = isinstance(sampling.spacing, Leading | Trailing | Linspace)
    sampling = sampling if known else replace(sampling, spacing=Leading())
    if not isinstance(sampling.sampler, DDPM) and sampling.sampler != DDIM():
        raise ValueError(f"diffusers' DeepFloyd IF has no sampler = {sampling.sampler}")
    config = schedulers.described(model.schedule, model.prediction, sampling, model.unet.learned_variance)
    _check_scheduler(Path("scheduler_config.json"), config)
    return config if known else {name: value for name, value in config.items() if name not in _SPACING}


_SPACING = ("timestep_spacing", "steps_offset")

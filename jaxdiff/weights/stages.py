"""One diffusion model on disk: stage.json (model and sampling settings) and model.safetensors (parameters)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.weights import sizes, tree
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SETTINGS = "stage.json"


def load_model(directory: str | Path) -> TrainedModel:
    """Load one stage: settings, float32 parameters and sampling settings."""
    directory = Path(directory)
    stage, sampling, text = read_settings(directory)
    return TrainedModel(stage, load_params(stage, directory / tree.PARAMS), sampling, text)


def read_settings(directory: Path) -> tuple[DiffusionModel, SamplingConfig, str | None]:
    """Model and sampling settings of one stage, and the fingerprint of its text encoder (None if unknown)."""
    settings = directory / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(f"{directory}: no stage here (it has no {SETTINGS})")
    data = json_files.read_object(settings)
    if not {"stage", "sampling"} <= data.keys() <= {"version", "stage", "sampling", "text"}:
        raise ValueError(f"{settings}: not the settings of a stage")
    check_version(data, str(settings))
    stage, sampling = (from_json(data[name], str(settings)) for name in ("stage", "sampling"))
    text = data.get("text")
    if (
        not isinstance(stage, DiffusionModel)
        or not isinstance(sampling, SamplingConfig)
        or not isinstance(text, str | None)
    ):
        raise ValueError(f"{settings}: not the settings of a stage")
    if stage.text is not None and None in (stage.text.length, stage.text.width):
        raise ValueError(f"{settings}: length or width of TextConditioner is None, a stage has those of a text encoder")
    sizes.check_name(text or "", "text", str(settings))
    return stage, sampling, text


def load_params(stage: DiffusionModel, path: Path, part: bool = False) -> dict:
    """The float32 parameters of a stage from its safetensors file. ValueError if names or shapes differ. part: the file
    may lack some."""
    params = tree.load_expected(path, sizes.shapes(_init, stage, str(path.parent)), part)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def _init(stage: DiffusionModel) -> dict:
    return stage.init(jax.random.key(0))[0]


def save_model(model: TrainedModel, directory: str | Path, dtype: str = "float32") -> None:
    """Writes one stage atomically; `dtype` "float16" or "bfloat16" halves the file.

    OSError if writing fails, a full disk included; an older stage is then unchanged.
    """
    directory = Path(directory)
    settings = _settings_text(model)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    with tree.saving(path), replacing(path) as temporary:
        temporary.write_text(settings)
        tree.save_tree(directory / tree.PARAMS, model.params, {"format": "jaxdiff"}, dtype)


def save_settings(model: TrainedModel, directory: str | Path) -> None:
    """Writes only the settings, as `save_model` does: for a run before its first step."""
    path = Path(directory) / SETTINGS
    settings = _settings_text(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(settings)


def _settings_text(model: TrainedModel) -> str:
    content = {"version": VERSION, "stage": to_json(model.model), "sampling": to_json(model.sampling)}
    text = {} if model.text_fingerprint is None else {"text": model.text_fingerprint}
    return json.dumps(content | text, indent=1) + "\n"

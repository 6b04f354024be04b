"""A cascade on disk: one that was trained here, or DeepFloyd IF.

    DIR/text/              the text encoder: config.json, model.safetensors, tokenizer.json (transformers layout)
    DIR/base64/            stage.json (settings) and model.safetensors (averaged parameters)
    DIR/sr256/ DIR/sr1024/ the same for super-resolution

A folder of a training run (`…/model`) is one such stage. `SHIPPED` is the tiny cascade of the package. A stage of IF
is a folder that diffusers' IFPipeline or IFSuperResolutionPipeline opens (`weights/deepfloyd_pipeline.py`), the base's
with the text encoder in it; alone, or in a folder of stages under the names above.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline, check_order
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import deepfloyd_pipeline, hub, sizes, t5, tree
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SHIPPED = Path(__file__).parent / "tiny"
STAGES = ("base64", "sr256", "sr1024")
SECOND = {f"DeepFloyd/IF-I-{size}-v1.0": f"DeepFloyd/IF-II-{size.replace('X', '')}-v1.0" for size in ("M", "L", "XL")}
"""The stage II that a published stage I is drawn with, where no other is named."""

Weights = str | Path | Sequence[str | Path]
"""A folder of stages, or the pipeline of each stage by its folder or hub id (`id@revision`)."""


def load(
    weights: Weights = SHIPPED,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    clean: bool = True,
    text: TextEncoder | None = None,
    place: hub.Place = jnp.asarray,
) -> Pipeline:
    """The cascade in a folder, where super-resolution may be missing from its end; or of one or several pipelines.

    `load("DeepFloyd/IF-I-XL-v1.0")` brings the stage II that belongs to it. `text`: in place of the text encoder, which
    is then not loaded. What comes from pipelines is loaded in `dtype` ("float32" by default, or "bfloat16"), from the
    files of a `variant` ("fp16"), put on devices by `place`, and its captions are cleaned as IF's were, or with
    `clean=False` only put in lower case. Raises FileNotFoundError, or ValueError for settings, names or shapes that do
    not fit.
    """
    folder = _folder(weights)
    stage = partial(deepfloyd_pipeline.load_stage, dtype=dtype or "float32", variant=variant, place=place)
    if folder is not None:
        present = [name for name in STAGES if (folder / name).is_dir()]
        lonely = [name for name, wanted in zip(present, STAGES) if name != wanted]
        if lonely:
            raise ValueError(f"{folder}: holds {lonely[0]} without the stage before it")
        places = [folder / name for name in present or STAGES[:1]]
        models = [stage(p) if is_pipeline(p) else load_model(p) for p in places]
    else:
        models = [stage(p) for p in _pipelines(weights, variant)]
    check_order(models)
    base, *others = models
    if text is None:
        text = load_text(weights, dtype=dtype, variant=variant, clean=clean, place=place)
    return imagen(text, base, *others)


def load_text(
    weights: Weights = SHIPPED,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    clean: bool = True,
    place: hub.Place = jnp.asarray,
) -> T5TextEncoder:
    """The text encoder of a cascade alone, as `load` has it: to embed captions and leave before the rest is loaded."""
    folder = _folder(weights)
    if folder is not None and not is_pipeline(folder / STAGES[0]):
        base = read_settings(folder / STAGES[0])[0]
        if base.text is None:
            raise ValueError(f"{folder / STAGES[0]}: a stage that reads no text")
        return t5.load_text_encoder(folder / "text", base.text.shape[0])
    first = folder / STAGES[0] if folder is not None else _directory(_listed(weights)[0], variant, ("text_encoder",))
    return deepfloyd_pipeline.load_text_encoder(first, dtype or "float32", clean=clean, variant=variant, place=place)


def is_pipeline(directory: Path) -> bool:
    return (directory / deepfloyd_pipeline.INDEX).is_file()


def _listed(weights: Weights) -> list[str | Path]:
    """Where the stages are, in their order."""
    listed = [weights] if isinstance(weights, str | Path) else list(weights)
    if not listed:
        raise ValueError("no weights are named")
    if len(listed) == 1 and (hub_id := str(listed[0]).partition("@")[0]) in SECOND and not Path(listed[0]).exists():
        return [listed[0], SECOND[hub_id]]
    return listed


def _folder(weights: Weights) -> Path | None:
    """The folder of stages, where it is one that is named, and not pipelines."""
    listed = _listed(weights)
    folder = Path(listed[0])
    if len(listed) > 1 or is_pipeline(folder):
        return None
    if not folder.is_dir():
        hub_id = str(listed[0]).partition("@")[0]
        if isinstance(listed[0], Path) or hub_id.count("/") != 1 or hub_id.startswith((".", "~")):
            raise FileNotFoundError(f"{folder}: no such folder of weights")
        return None
    return folder


def _pipelines(weights: Weights, variant: str | None) -> list[Path]:
    return [_directory(place, variant, ("unet",)) for place in _listed(weights)]


def _directory(place: str | Path, variant: str | None, folders: tuple[str, ...]) -> Path:
    directory = hub.directory_of(place, "weights", folders=folders, variant=variant)
    if not is_pipeline(directory):
        raise ValueError(f"{place} holds no pipeline of DeepFloyd IF (it has no {deepfloyd_pipeline.INDEX})")
    return directory


def load_model(directory: str | Path) -> TrainedModel:
    """One stage: its settings, its parameters as float32, and how it draws."""
    directory = Path(directory)
    stage, sampling, text = read_settings(directory)
    return TrainedModel(stage, load_params(stage, directory / "model.safetensors"), sampling, text)


def read_settings(directory: Path) -> tuple[DiffusionModel, SamplingConfig, str | None]:
    """Of one stage, with the fingerprint of the text encoder that it was trained with, where that is known."""
    settings = directory / "stage.json"
    if not settings.is_file():
        raise FileNotFoundError(f"{directory}: no stage here (it has no stage.json)")
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


def load_params(stage: DiffusionModel, path: Path) -> dict:
    """The parameters of a stage from its safetensors file, float32. ValueError where names or shapes differ."""
    params = tree.load_expected(path, sizes.shapes(_init, stage, str(path.parent)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def _init(stage: DiffusionModel) -> dict:
    return stage.init(jax.random.key(0))[0]


def export(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Writes a cascade of IF's kind as pipelines in a folder of stages: diffusers opens each, `load` all of them.

    ValueError where diffusers has no words for a setting of a stage, before anything is written; OSError where
    something cannot be written.
    """
    models = trained(pipeline)
    if len(models) > len(STAGES):
        raise ValueError(f"a folder of stages holds {len(STAGES)}, not {len(models)}")
    for model in models:
        deepfloyd_pipeline.described(model)
    encoder = pipeline.text_encoder if isinstance(pipeline.text_encoder, T5TextEncoder) else None
    for number, (name, model) in enumerate(zip(STAGES, models)):
        deepfloyd_pipeline.export_stage(model, Path(directory) / name, None if number else encoder, dtype)


def trained(pipeline: Pipeline) -> tuple[TrainedModel, ...]:
    """The boxes of a pipeline whose boxes are all trained diffusion models; ValueError for any other."""
    models = tuple(box for box in pipeline.boxes if isinstance(box, TrainedModel))
    if len(models) < len(pipeline.boxes):
        raise ValueError("a pipeline with boxes that are no diffusion models")
    return models


def save_model(model: TrainedModel, directory: str | Path, dtype: str = "float32") -> None:
    """Writes one stage; `dtype` "float16" or "bfloat16" halves the file. OSError where the disk is full.

    Both files appear whole or not at all, and an older stage stays as it was where the new one cannot be saved.
    """
    directory = Path(directory)
    content = {"version": VERSION, "stage": to_json(model.model), "sampling": to_json(model.sampling)}
    text = {} if model.text_fingerprint is None else {"text": model.text_fingerprint}
    settings = json.dumps(content | text, indent=1)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "stage.json"
    with tree.saving(path), replacing(path) as temporary:
        temporary.write_text(settings + "\n")
        tree.save_tree(directory / "model.safetensors", model.params, {"format": "jaxdiff"}, dtype)

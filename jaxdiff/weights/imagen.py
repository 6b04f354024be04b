"""Loading cascades from disk: trained here, or DeepFloyd IF.

    DIR/text/              the text encoder: config.json, model.safetensors, tokenizer.json (transformers layout)
    DIR/base64/            one model (`weights/stages.py`) or its training run (`weights/runs.py`)
    DIR/sr256/ DIR/sr1024/ the same for super-resolution

`SHIPPED` is the tiny cascade of the package. A stage of IF is a folder for diffusers' IFPipeline (including the text
encoder) or IFSuperResolutionPipeline (`weights/deepfloyd_pipeline.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from jaxdiff.models.diffusion import executed
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline, check_order, check_start, with_boxes
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import deepfloyd_pipeline, hub, runs, stages, t5
from jaxdiff.weights.kinds import describe

SHIPPED = Path(__file__).parent / "tiny"
STAGES = ("base64", "sr256", "sr1024")
SECOND = {f"DeepFloyd/IF-I-{size}-v1.0": f"DeepFloyd/IF-II-{size.replace('X', '')}-v1.0" for size in ("M", "L", "XL")}
"""The default stage II of each published stage I."""

Weights = str | Path | Sequence[str | Path]
"""One or several of: a folder of stages, one stage, a training run, a DeepFloyd IF pipeline (folder or hub id,
`id@revision`)."""


def load(
    weights: Weights = SHIPPED,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    clean: bool = True,
    text: TextEncoder | None = None,
    place: hub.Place = jnp.asarray,
) -> Pipeline:
    """Load a cascade; trailing super-resolution stages may be missing.

    weights: `"runs/base64"` is a training run, finished or not; `["runs/base64", "runs/sr256"]` is two of them;
    `"DeepFloyd/IF-I-XL-v1.0"` includes its default stage II. text: replaces the text encoder, which is then not loaded.
    For IF pipelines: dtype is "float32" (default) or "bfloat16"; variant ("fp16") selects the files; place puts arrays
    on devices; captions are cleaned as in IF's training, or only lowercased with `clean=False`. Raises
    FileNotFoundError, which describes a folder without weights, or ValueError for settings, names or shapes that do
    not fit.
    """
    models, paths = [], _stages(weights, variant, ("unet",))
    for path in paths:
        if is_pipeline(path):
            models.append(deepfloyd_pipeline.load_stage(path, dtype=dtype or "float32", variant=variant, place=place))
        else:
            models.append(runs.load(path) if runs.is_run(path) else stages.load_model(path))
    try:
        check_start(models[0])
        check_order(models)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from error
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
    """The text encoder of a cascade, as in `load`, without the rest: to embed captions first and free it."""
    first = _stages_of(_listed(weights)[0], variant, ("text_encoder",))[0]
    if is_pipeline(first):
        return deepfloyd_pipeline.load_text_encoder(
            first, dtype or "float32", clean=clean, variant=variant, place=place
        )
    run = next((folder for folder in (first, first.parent) if runs.is_run(folder)), None)
    base = stages.read_settings(first if run is None else run / runs.MODEL)[0]
    if base.text is None:
        raise ValueError(f"{first}: reads no text; it must come after a stage that samples from text")
    if run is None or not runs.has_text_source(run):
        folder = first.parent / "text"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no text encoder there, which {first} needs; name one with --text")
        return t5.load_text_encoder(folder, base.text.shape[0])
    source = runs.read_text_source(run)
    return t5.load_text_encoder(source.source, source.length, source.dtype)


def text_length(weights: Weights) -> int:
    """Tokens per caption in the training of the first stage of `weights`."""
    first = _stages_of(_listed(weights)[0], None, ("unet",))[0]
    if is_pipeline(first):
        return deepfloyd_pipeline.LENGTH
    text = stages.read_settings(first / runs.MODEL if runs.is_run(first) else first)[0].text
    if text is None or text.length is None:
        raise ValueError(f"{first}: a stage that reads no text")
    return text.length


def is_pipeline(directory: Path) -> bool:
    return (directory / deepfloyd_pipeline.INDEX).is_file()


def _listed(weights: Weights) -> list[str | Path]:
    """The folders and hub ids, in the order of the stages."""
    listed = [weights] if isinstance(weights, str | Path) else list(weights)
    if not listed:
        raise ValueError("no weights given")
    if len(listed) == 1 and (hub_id := str(listed[0]).partition("@")[0]) in SECOND and not Path(listed[0]).exists():
        return [listed[0], SECOND[hub_id]]
    return listed


def _stages(weights: Weights, variant: str | None, folders: tuple[str, ...]) -> list[Path]:
    """The folder of each stage. folders: the folders to download from hub ids."""
    return [stage for place in _listed(weights) for stage in _stages_of(place, variant, folders)]


def _stages_of(place: str | Path, variant: str | None, folders: tuple[str, ...]) -> list[Path]:
    folder = Path(place)
    if not folder.is_dir():
        hub_id = str(place).partition("@")[0]
        if isinstance(place, Path) or hub_id.count("/") != 1 or hub_id.startswith((".", "~")):
            raise FileNotFoundError(f"{folder}: no such folder of weights")
        folder = hub.directory_of(place, "weights", folders=folders, variant=variant)
        if not is_pipeline(folder):
            raise ValueError(f"{place} holds no pipeline of DeepFloyd IF (it has no {deepfloyd_pipeline.INDEX})")
        return [folder]
    if is_pipeline(folder) or runs.is_run(folder) or (folder / stages.SETTINGS).is_file():
        return [folder]
    present = [name for name in STAGES if (folder / name).is_dir()]
    if not present:
        raise FileNotFoundError(f"{folder}: {describe(folder)}")
    orphans = [name for name, wanted in zip(present, STAGES) if name != wanted]
    if orphans:
        raise ValueError(f"{folder}: holds {orphans[0]} without the stage before it")
    return [folder / name for name in present]


def export(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Writes a cascade of IF's architecture as a folder of diffusers pipelines, which `load` also reads.

    ValueError if diffusers cannot express a setting of a stage, before anything is written; OSError if writing fails.
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
    """The boxes of a pipeline; ValueError unless all are trained diffusion models."""
    models = tuple(box for box in pipeline.boxes if isinstance(box, TrainedModel))
    if len(models) < len(pipeline.boxes):
        raise ValueError("the pipeline has boxes that are not diffusion models")
    return models


def with_dtype(pipeline: Pipeline, dtype: str | None) -> Pipeline:
    """The pipeline with networks that compute in `dtype` (None: unchanged). Parameters and samplers stay float32.

    ValueError unless all boxes are diffusion models.
    """
    if dtype is None:
        return pipeline
    models = [replace(each, model=executed(each.model, dtype=dtype)) for each in trained(pipeline)]
    return with_boxes(pipeline, models)

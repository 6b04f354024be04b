"""`jaxdiff.from_pretrained` and `jaxdiff.save_pretrained`."""

from pathlib import Path

import jax.numpy as jnp

from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import hub, imagen, stages, t5
from jaxdiff.weights.imagen import SHIPPED, STAGES, Weights


def from_pretrained(
    weights: Weights = SHIPPED,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    text_encoder: TextEncoder | None = None,
    place: hub.Place = jnp.asarray,
) -> Pipeline:
    """Load a pipeline: `from_pretrained("runs/base64").sample(["a red circle"])`.

    weights: the folder of a cascade or of a training run, several of them, or a hub id; by default the tiny cascade of
    the package. dtype: compute type of the networks ("float32" or "bfloat16"). variant: as in `weights.imagen.load`.
    text_encoder: replaces the one of the weights. place: puts an array on its devices. Raises FileNotFoundError or
    ValueError as `weights.imagen.load` does.
    """
    pipeline = imagen.load(weights, dtype=dtype, variant=variant, text=text_encoder, place=place)
    return pipeline if dtype is None else imagen.with_dtype(pipeline, dtype)


def save_pretrained(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Write a pipeline as a folder for `from_pretrained`: text/, base64/ and, for its decoders, sr256/ and sr1024/.

    dtype: type of the stored parameters; "float16" and "bfloat16" halve the files. ValueError for an unsupported
    pipeline, before anything is written; OSError if writing fails.
    """
    directory, models, encoder = Path(directory), imagen.trained(pipeline), pipeline.text_encoder
    if len(models) > len(STAGES):
        raise ValueError(f"a folder of stages holds {len(STAGES)}, not {len(models)}")
    if not isinstance(encoder, T5TextEncoder):
        raise ValueError("save_pretrained needs a T5 text encoder, and this pipeline has none")
    if others := [name for name in STAGES[len(models) :] if (directory / name).exists()]:
        raise ValueError(f"{directory} holds {' and '.join(others)} of another cascade: choose another folder")
    t5.export(encoder.config, encoder.params, directory / "text")
    encoder.tokenizer.save_pretrained(str(directory / "text"))
    for name, model in zip(STAGES, models):
        stages.save_model(model, directory / name, dtype)

"""A latent diffusion model's training run: its pipeline, and the record of its autoencoder.

RUN/autoencoder.json  where the autoencoder is, and the digest of its parameters
RUN/model/            the generator, as of every run (`weights/runs.py`)
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.trees import digest_of
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.diffusion import executed
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.systems.stable_diffusion import stable_diffusion
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import autoencoder, hub, imagen, runs

NAME = "autoencoder.json"


@dataclass(frozen=True)
class AutoencoderSource:
    """source: directory or hub id of the autoencoder. fingerprint: of its parameters."""

    source: str
    fingerprint: str


def load(run: Path, text: TextEncoder | None = None, dtype: str | None = None) -> Pipeline:
    """The pipeline of a run, finished or not. text: replaces its text encoder, which is then not loaded.

    Raises FileNotFoundError or ValueError as `runs.load` and `load_source`.
    """
    generator, decoder = runs.load(run), load_source(run)
    text = imagen.load_text(run) if text is None else text
    if dtype is not None:
        generator = replace(generator, model=executed(generator.model, dtype=dtype))
        decoder = replace(decoder, config=replace(decoder.config, dtype=hub.check_dtype(dtype)))
    return stable_diffusion(text, generator, decoder)


def load_autoencoder(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> TrainedAutoencoder:
    """An autoencoder in diffusers' layout: a folder with config.json, the run of one, a pipeline's folder with vae/, or
    a hub id. Raises FileNotFoundError or ValueError as `autoencoder.load`."""
    folder = Path(path_or_id)
    inner = [folder / name for name in ("", "model", "vae") if (folder / name / autoencoder.CONFIG).is_file()]
    settings, params = autoencoder.load(inner[0] if inner else path_or_id, dtype, variant=variant, place=place)
    return TrainedAutoencoder(settings.config, params, settings.scale, settings.upcast, settings.side)


def fingerprint_of(trained: TrainedAutoencoder) -> str:
    return f"{digest_of(trained.params)} x {trained.scale:.6g}"


def is_latent_run(folder: Path) -> bool:
    return (folder / NAME).is_file()


def save_source(run: Path, source: AutoencoderSource) -> None:
    """Record a run's autoencoder; a directory is stored as an absolute path."""
    place = Path(source.source)
    write_json(run / NAME, asdict(source) | ({"source": str(place.resolve())} if place.is_dir() else {}))


def load_source(run: Path) -> TrainedAutoencoder:
    """The autoencoder of a run. ValueError if its record is damaged, or its parameters are not those of the training;
    FileNotFoundError if it is gone."""
    path = run / NAME
    values = json_files.read_object(path)
    names = {field.name for field in fields(AutoencoderSource)}
    if values.keys() != names or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{path}: does not say where an autoencoder is")
    source = AutoencoderSource(**values)
    local = run / source.source  # an absolute path replaces `run`; an exported folder has a relative one
    if not local.is_dir() and Path(source.source).is_absolute():
        raise FileNotFoundError(f"{source.source}: the autoencoder of {run} is no longer there")
    trained = load_autoencoder(local if local.is_dir() else source.source)
    if fingerprint_of(trained) != source.fingerprint:
        raise ValueError(f"{source.source}: not the autoencoder that {run} was trained with, its parameters differ")
    return trained

"""DALL·E 1 on disk: the transformer of a training run, finished or not, with its tokenizer and its codes' decoder.

RUN/model/dalle.json         settings of the model and of sampling, written before the first step
RUN/checkpoints/             the newest holds the averaged parameters
RUN/model/model.safetensors  the averaged parameters, written at the end
RUN/tokenizer/               the tokenizer of the captions
RUN/codes.json               where the decoder is, and the digest of its parameters
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing, write_json
from jaxdiff.core.trees import digest_of
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.dvae import TrainedDVAE
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.systems.dalle import dalle
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.bpe import TokenTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.tokenizer import load_tokenizer
from jaxdiff.weights import autoencoder, dvae, hub, latent_runs, runs, sizes, tree, vqgan
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SETTINGS, CODES, TOKENIZER = "dalle.json", "codes.json", "tokenizer"


@dataclass(frozen=True)
class CodesSource:
    """source: directory of the dVAE or VQ autoencoder. fingerprint: of its parameters."""

    source: str
    fingerprint: str


def is_run(folder: Path) -> bool:
    """Whether the folder is the run of a transformer of an image's codes that has started."""
    return (folder / runs.MODEL / SETTINGS).is_file() and (folder / CODES).is_file()


def load(run: str | Path, text: TextEncoder | None = None, dtype: str | None = None) -> Pipeline:
    """The pipeline of a run at its newest checkpoint. text: replaces its tokenizer, which is then not loaded. Raises
    FileNotFoundError or ValueError."""
    run = Path(run)
    generator = load_generator(run)
    if dtype is not None:
        generator = in_type(generator, dtype)
    return dalle(load_text(run) if text is None else text, generator, load_source(run))


def in_type(generator: TrainedAutoregressive, dtype: str) -> TrainedAutoregressive:
    """The transformer, computed in this type. ValueError for an unknown one."""
    network = replace(generator.model.network, execution=ExecutionConfig(hub.check_dtype(dtype)))
    return replace(generator, model=replace(generator.model, network=network))


def load_text(run: str | Path) -> TokenTextEncoder:
    """The tokenizer of a run. ValueError if it is not that of the training."""
    run = Path(run)
    model, _, fingerprint = read_settings(run / runs.MODEL)
    text = TokenTextEncoder(load_tokenizer(run / TOKENIZER), model.network.text_length)
    if text.fingerprint != fingerprint:
        raise ValueError(f"{run / TOKENIZER}: not the tokenizer of the training")
    return text


def load_generator(run: Path) -> TrainedAutoregressive:
    """The transformer of a run."""
    model, sampling, text = read_settings(run / runs.MODEL)
    params = runs.averaged(run, model)
    if params is None:
        file = run / runs.MODEL / tree.PARAMS
        stored = tree.load_expected(file, sizes.shapes(_init, model, str(file.parent)))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored)
    return TrainedAutoregressive(model, params, sampling, text)


def load_decoder(path: str | Path) -> TrainedDVAE | VQCodes:
    """A decoder of codes: the folder or run of a dVAE, a VQGAN in Flax's layout (`weights/vqgan.py`), or a VQ
    autoencoder as `latent_runs.load_autoencoder` reads it.

    Raises FileNotFoundError, or ValueError for a KL autoencoder."""
    folder = dvae.folder_of(path)
    if (folder / dvae.SETTINGS).is_file():
        return dvae.load(folder)
    if vqgan.is_vqgan(path):
        return VQCodes(vqgan.load(path))
    try:
        return VQCodes(latent_runs.load_autoencoder(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fingerprint_of(decoder: TrainedDVAE | VQCodes) -> str:
    params = decoder.params if isinstance(decoder, TrainedDVAE) else decoder.autoencoder.params
    return digest_of(params)


def save_source(run: Path, source: CodesSource) -> None:
    """Record a run's decoder; a directory is stored as an absolute path."""
    place = Path(source.source)
    write_json(run / CODES, asdict(source) | ({"source": str(place.resolve())} if place.is_dir() else {}))


def load_source(run: Path) -> TrainedDVAE | VQCodes:
    """The decoder of a run. ValueError if its record is damaged, or its parameters are not those of the training."""
    path = run / CODES
    values = json_files.read_object(path)
    if values.keys() != {field.name for field in fields(CodesSource)} or not all(
        isinstance(value, str) for value in values.values()
    ):
        raise ValueError(f"{path}: does not say where a dVAE is")
    source = CodesSource(**values)
    inside = run / source.source  # an absolute path replaces `run`; an exported folder has a relative one
    decoder = load_decoder(inside if inside.exists() else source.source)
    if fingerprint_of(decoder) != source.fingerprint:
        raise ValueError(f"{source.source}: not the dVAE of the training of {run}: it was trained again, or replaced")
    return decoder


def export(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Write a pipeline as one folder in the layout of a run, with the decoder in DIR/codes. ValueError for another
    pipeline, before anything is written."""
    directory, text = Path(directory), pipeline.text_encoder
    generator, decoders = pipeline.generator, pipeline.decoders
    if not isinstance(generator, TrainedAutoregressive) or len(decoders) != 1:
        raise ValueError("not a transformer of codes with one decoder")
    if not isinstance(text, TokenTextEncoder):
        raise ValueError("the pipeline has no tokenizer: load it with its own text encoder")
    decoder, folder = decoders[0], directory / "codes"
    if isinstance(decoder, VQCodes) and decoder.unit:
        raise ValueError("the decoder's images lie in [0, 1], and the layout of a run has no place for that")
    if isinstance(decoder, TrainedDVAE):
        dvae.save(decoder, folder, dtype)
    elif isinstance(decoder, VQCodes):
        inner = decoder.autoencoder
        layout = autoencoder.Settings(inner.config, inner.scale, inner.upcast, inner.side)
        autoencoder.export(layout, inner.params, folder, dtype)
    else:
        raise ValueError("the decoder is neither a dVAE nor a VQ autoencoder")
    text.tokenizer.save_pretrained(str(directory / TOKENIZER))
    # Parameters of 16 bits have another digest.
    write_json(directory / CODES, asdict(CodesSource("codes", fingerprint_of(load_decoder(folder)))))
    save(replace(generator, text_fingerprint=text.fingerprint), directory / runs.MODEL, dtype)


def save(trained: TrainedAutoregressive, directory: Path, dtype: str = "float32") -> None:
    """Writes settings and parameters atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    with tree.saving(path), replacing(path) as temporary:
        temporary.write_text(_settings_text(trained))
        tree.save_tree(directory / tree.PARAMS, trained.params, {"format": "jaxdiff"}, dtype)


def save_settings(trained: TrainedAutoregressive, directory: Path) -> None:
    """Writes only the settings: for a run before its first step."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / SETTINGS) as temporary:
        temporary.write_text(_settings_text(trained))


def read_settings(directory: Path) -> tuple[AutoregressiveModel, TokenSampling, str | None]:
    """Settings of a model and of its sampling, and the fingerprint of its tokenizer."""
    path = directory / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no transformer of codes here (it has no {SETTINGS})")
    data = json_files.read_object(path)
    if not {"model", "sampling"} <= data.keys() <= {"version", "model", "sampling", "text"}:
        raise ValueError(f"{path}: not the settings of a transformer of codes")
    check_version(data, str(path))
    model, sampling = (from_json(data[name], str(path)) for name in ("model", "sampling"))
    text = data.get("text")
    if (
        not isinstance(model, AutoregressiveModel)
        or not isinstance(sampling, TokenSampling)
        or not isinstance(text, str | None)
    ):
        raise ValueError(f"{path}: not the settings of a transformer of codes")
    return model, sampling, text


def _settings_text(trained: TrainedAutoregressive) -> str:
    content = {"version": VERSION, "model": to_json(trained.model), "sampling": to_json(trained.sampling)}
    text = {} if trained.text_fingerprint is None else {"text": trained.text_fingerprint}
    return json.dumps(content | text, indent=1) + "\n"


def _init(model: AutoregressiveModel) -> dict:
    return model.init(jax.random.key(0))[0]

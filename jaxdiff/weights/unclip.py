"""DALL·E 2 on disk: training runs of a prior, a decoder and upsamplers, and the folder of all of them.

RUN/clip.json          where the CLIP is, its digests, the layer of the captions' states; the rest as for every run
                       (`weights/runs.py`)

DIR/unclip.json        version, number of candidates of the prior, layer of the captions' states
DIR/text/ DIR/image/   CLIP's towers in the transformers layout, the text tower with its tokenizer
DIR/prior/ DIR/decoder/ DIR/sr256/ DIR/sr1024/   one model each (`weights/stages.py`)

An autoregressive prior is stored as `weights/embedding_codes.py` describes, and has no candidates.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.models.boxes import Decoder
from jaxdiff.models.diffusion import executed
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, RankedPrior, embedding_of
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import clip, dalle, embedding_codes, hub, runs, stages
from jaxdiff.weights.settings import VERSION, check_version

SOURCE, SETTINGS, TEXT, IMAGE = "clip.json", "unclip.json", "text", "image"
STAGES = ("prior", "decoder", "sr256", "sr1024")
CANDIDATES = 2
"""Of the prior, in the paper."""

Places = Sequence[str | Path]


@dataclass(frozen=True)
class CLIPTowers:
    """Both towers of a CLIP. source: its directory or hub id."""

    text: CLIPTextEncoder
    image: CLIPImageEncoder
    source: str

    @property
    def fingerprint(self) -> str:
        """A digest of both towers."""
        return f"{self.text.fingerprint} {self.image.fingerprint}"


@dataclass(frozen=True)
class CLIPSource:
    """source: directory or hub id of a CLIP. text, image: digests of its towers. skip_last: as in `CLIPTextEncoder`."""

    source: str
    text: str
    image: str
    skip_last: int


def load_clip(path_or_id: str | Path, place: hub.Place = jnp.asarray) -> CLIPTowers:
    """Both towers: of a CLIP in the transformers layout, or of a folder that `export` wrote. Padding of captions is
    masked. FileNotFoundError or ValueError as `weights.clip`, and for towers without a common space."""
    text, image = _towers(path_or_id)
    encoder = load_clip_text(text, place)
    towers = CLIPTowers(encoder, CLIPImageEncoder(*clip.load_image(image, place=place)), str(path_or_id))
    if encoder.config.width != towers.image.width:
        raise ValueError(f"{path_or_id}: captions have embeddings of width {encoder.config.width}, images others")
    return towers


def load_clip_text(path_or_id: str | Path, place: hub.Place = jnp.asarray, skip_last: int = 0) -> CLIPTextEncoder:
    """The text tower, with masked padding, and blank captions as the null text."""
    text = clip.load_text_encoder(path_or_id, place=place)
    return replace(text, padding_is_read=False, blank_is_null=True, skip_last=skip_last)


def _towers(path_or_id: str | Path) -> tuple[str | Path, str | Path]:
    """The places of both towers."""
    folder = Path(path_or_id)
    return (folder / TEXT, folder / IMAGE) if (folder / SETTINGS).is_file() else (path_or_id, path_or_id)


def save_clip_source(run: Path, towers: CLIPTowers) -> None:
    """Record a run's CLIP; a directory is stored as an absolute path."""
    place = Path(towers.source)
    source = str(place.resolve()) if place.is_dir() else towers.source
    digests = towers.text.fingerprint, towers.image.fingerprint
    write_json(run / SOURCE, asdict(CLIPSource(source, *digests, towers.text.skip_last)))


def read_clip_source(run: Path) -> CLIPSource:
    """The CLIP of a run. ValueError if the record is damaged; FileNotFoundError if the CLIP is gone."""
    path = run / SOURCE
    values = json_files.read_object(path)
    types = {field.name: int if field.name == "skip_last" else str for field in fields(CLIPSource)}
    if {name: type(value) for name, value in values.items()} != types:
        raise ValueError(f"{path}: does not say where a CLIP is")
    source = CLIPSource(**values)
    if Path(source.source).is_absolute() and not Path(source.source).is_dir():
        raise FileNotFoundError(f"{source.source}: the CLIP of {run} is no longer there")
    return source


def is_unclip(place: str | Path) -> bool:
    """Whether this is a run of a prior or decoder, or a folder that `export` wrote."""
    return (Path(place) / SOURCE).is_file() or (Path(place) / SETTINGS).is_file()


def load(places: Places, text: TextEncoder | None = None, dtype: str | None = None) -> Pipeline:
    """The pipeline of runs in order (prior, decoder, upsamplers), or of a folder, with further upsamplers.

    Without a prior, the decoder starts from image embeddings (`SampleOptions.after`). text: replaces CLIP's text tower.
    Raises FileNotFoundError or ValueError, also for runs that were trained with different CLIPs.
    """
    first = Path(places[0])
    source, expected = _source(places)
    candidates = _read_settings(first / SETTINGS)[0] if (first / SETTINGS).is_file() else CANDIDATES
    image = CLIPImageEncoder(*clip.load_image(_towers(source)[1]))
    if expected is not None and image.fingerprint != expected.image:
        raise ValueError(f"{source}: not the CLIP of the training of {first}, its parameters differ")
    models = [_load_model(folder) for place in places for folder in _folders(Path(place))]
    boxes = [_box(each if dtype is None else _in_type(each, dtype), image, candidates) for each in models]
    text = load_text(places) if text is None else text
    try:
        generator, *others = boxes
        decoders = cast(list[Decoder], others)  # `Pipeline` refuses a prior in the place of a decoder
        return Pipeline(text, generator, tuple(decoders))
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, places))}: {error}") from error


def load_text(places: Places) -> CLIPTextEncoder:
    """The text tower of `load`, without the rest."""
    source, expected = _source(places)
    skip_last = _read_settings(Path(source) / SETTINGS)[1] if expected is None else expected.skip_last
    text = load_clip_text(_towers(source)[0], skip_last=skip_last)
    if expected is not None and text.fingerprint != expected.text:
        raise ValueError(f"{source}: not the CLIP of the training of {places[0]}, its parameters or tokenizer differ")
    return text


def _source(places: Places) -> tuple[str, CLIPSource | None]:
    """The place of the CLIP, and the record of the runs; None for an exported folder. ValueError unless all runs name
    the same CLIP."""
    sources = {str(place): read_clip_source(Path(place)) for place in places if (Path(place) / SOURCE).is_file()}
    if len({(source.text, source.image) for source in sources.values()}) > 1:
        raise ValueError(f"{' and '.join(sources)} were trained with different CLIPs")
    first = Path(places[0])
    if (first / SETTINGS).is_file():
        return str(first), None
    expected = next(iter(sources.values()))
    return expected.source, expected


def _folders(place: Path) -> list[Path]:
    """The models of a place."""
    if not (place / SETTINGS).is_file():
        return [place]
    return [place / name for name in STAGES if (place / name).is_dir()]


def _load_model(folder: Path) -> TrainedModel | TrainedPriorCodes:
    if embedding_codes.is_stored(folder):
        return embedding_codes.load(folder)
    return runs.load(folder) if runs.is_run(folder) else stages.load_model(folder)


def _in_type(box: TrainedModel | TrainedPriorCodes, dtype: str) -> TrainedModel | TrainedPriorCodes:
    """The box, computed in this type."""
    if isinstance(box, TrainedPriorCodes):
        return replace(box, transformer=dalle.in_type(box.transformer, dtype))
    return replace(box, model=executed(box.model, dtype=hub.check_dtype(dtype)))


def _box(
    trained: TrainedModel | TrainedPriorCodes, image: CLIPImageEncoder, candidates: int
) -> TrainedModel | TrainedPriorCodes:
    """The model as the box that it is."""
    if isinstance(trained, TrainedPriorCodes):
        return trained
    parts = {field.name: getattr(trained, field.name) for field in fields(trained)}
    if isinstance(trained.model.product, EmbeddingSpec):
        return RankedPrior(**parts, candidates=candidates)
    if embedding_of(trained.model) is not None:
        return EmbeddingDecoder.of(trained, image)
    return trained


def _read_settings(path: Path) -> tuple[int, int]:
    """The number of candidates, and `CLIPTextEncoder.skip_last`."""
    data = json_files.read_object(path)
    check_version(data, str(path))
    limits = {"candidates": range(1, 2**10 + 1), "skip_last": range(2**10)}
    if data.keys() != {"version", *limits} or not all(
        type(data[name]) is int and data[name] in allowed for name, allowed in limits.items()
    ):
        raise ValueError(f"{path}: not the settings of a DALL·E 2")
    return data["candidates"], data["skip_last"]


def export(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Write a pipeline as one folder. ValueError for another pipeline, before anything is written; OSError if writing
    fails."""
    directory, text, boxes = Path(directory), pipeline.text_encoder, pipeline.boxes
    prior, decoder = boxes[0], boxes[1] if len(boxes) > 1 else None
    models = [box for box in boxes if isinstance(box, TrainedModel | TrainedPriorCodes)]
    is_prior = isinstance(prior, RankedPrior | TrainedPriorCodes)
    if not is_prior or not isinstance(decoder, EmbeddingDecoder) or len(models) < len(boxes):
        raise ValueError("not a prior, a decoder of embeddings and upsamplers")
    if len(models) > len(STAGES):
        raise ValueError(f"a folder holds {len(STAGES)} models, not {len(models)}")
    if not isinstance(text, CLIPTextEncoder) or decoder.image_encoder is None:
        raise ValueError("the pipeline has no CLIP: load it with its own text encoder")
    if others := [name for name in STAGES[len(models) :] if (directory / name).exists()]:
        raise ValueError(f"{directory} holds {' and '.join(others)} of another system: choose another folder")
    image = decoder.image_encoder
    clip.export(replace(text.config, image=None), {"text": text.params["text"]}, directory / TEXT)
    text.tokenizer.save_pretrained(str(directory / TEXT))
    clip.export(replace(image.config, text=None), {"image": image.params["image"]}, directory / IMAGE)
    for name, model in zip(STAGES, models):
        if isinstance(model, TrainedPriorCodes):
            embedding_codes.save(model, directory / name, dtype)
        else:
            stages.save_model(model, directory / name, dtype)
    candidates = prior.candidates if isinstance(prior, RankedPrior) else CANDIDATES
    write_json(directory / SETTINGS, {"version": VERSION, "candidates": candidates, "skip_last": text.skip_last})

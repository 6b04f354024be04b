"""Karlo from disk: a folder of diffusers' UnCLIPPipeline ⇄ the boxes of a system.

    FOLDER/   model_index.json  prior/  prior_scheduler/  text_encoder/  tokenizer/
              decoder/  decoder_scheduler/  text_proj/  super_res_first/  super_res_last/  super_res_scheduler/
              image_encoder/ (if there; for variations of images, as in the folder of diffusers' pipeline of these)

The schedulers' settings define the sampling; settings that they lack (guidance, steps) come from `systems/karlo.py`.
Each box is loaded by a function of its own; `load` loads all.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jaxdiff.core import settings as comparison
from jaxdiff.models.conditioners import without_dropout
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, StandardizedPrior
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.experts import ExpertsConfig
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.systems import karlo
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.systems.unclip import unclip
from jaxdiff.text.clip import CLIPTextEncoder, Pooling
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import clip, hub, sizes, unclip_prior, unclip_scheduler, unclip_unet
from jaxdiff.weights.unclip_unet import Folders, Network

INDEX, NAME = "model_index.json", "UnCLIPPipeline"
UPSAMPLERS = "super_res_first", "super_res_last"
IMAGE = "image_encoder"
FOLDERS = ("prior", "text_encoder", "text_proj", "decoder", *UPSAMPLERS)
"""Folders with weights."""


class Boxes(NamedTuple):
    """What a system is filled with. The prior gives CLIP's image embeddings (b 1 1 e); the decoder reads one as the
    condition `image_embedding` (b 1 e) beside the caption; the upsampler reads the decoder's image."""

    text_encoder: CLIPTextEncoder
    prior: StandardizedPrior
    decoder: TrainedModel
    upsampler: TrainedModel
    image_encoder: CLIPImageEncoder | None = None

    def pipeline(self, text: TextEncoder | None = None) -> Pipeline:
        """The system. text: replaces the text encoder."""
        decoder = EmbeddingDecoder.of(self.decoder, self.image_encoder)
        return unclip(text or self.text_encoder, self.prior, decoder, self.upsampler)


@dataclass(frozen=True)
class Loading:
    """dtype: of parameters and computation, "float32" or "bfloat16". variant: "fp16" reads the files of that name.
    place: puts an array on its devices."""

    dtype: str = "float32"
    variant: str | None = None
    place: hub.Place = jnp.asarray

    @property
    def files(self) -> dict[str, Any]:
        """The arguments of the loaders of networks."""
        return {"dtype": self.dtype, "variant": self.variant, "place": self.place}


def is_karlo(folder: str | Path) -> bool:
    """Whether this is the folder of an UnCLIPPipeline."""
    index = Path(folder) / INDEX
    return index.is_file() and hub.read_json(index).get("_class_name") == NAME


def load(path_or_id: str | Path, loading: Loading = Loading()) -> Boxes:
    """Load all boxes from a folder or a hub id.

    Raises FileNotFoundError, or ValueError that names the file and what does not fit.
    """
    folder = hub.directory_of(path_or_id, "Karlo", folders=FOLDERS, variant=loading.variant)
    if (folder / INDEX).is_file():
        hub.require(folder / INDEX, hub.read_json(folder / INDEX), "_class_name", (NAME,))
    prior = load_prior(folder / "prior", folder / "prior_scheduler", loading)
    decoder = load_decoder(folder, loading)
    encoder = load_text_encoder(folder, loading)
    assert encoder.config.text is not None  # it is a text encoder
    width = prior.model.product.channels
    for name, value in (
        ("decoder", decoder.reads and decoder.reads[1]),
        ("text_encoder", encoder.config.width),
        ("text_encoder", encoder.width),
    ):
        if value != width:
            raise ValueError(f"{folder / name} has embeddings of width {value}, the prior those of {width}")
    length = prior.reads[0] if prior.reads else None
    if encoder.length != length:
        raise ValueError(f"{folder / 'text_encoder'} reads {encoder.length} tokens of a caption, the prior {length}")
    decoder = replace(decoder, model=decoder.model.reading(encoder.length, width))
    images = load_image_encoder(folder / IMAGE, loading) if (folder / IMAGE).is_dir() else None
    return Boxes(encoder, prior, decoder, load_upsampler(folder, decoder.side, loading), images)


def boxes_of(pipeline: Pipeline) -> Boxes:
    """The inverse of `Boxes.pipeline`. ValueError for another pipeline."""
    boxes = (pipeline.text_encoder, *pipeline.boxes)
    kinds = (CLIPTextEncoder, StandardizedPrior, EmbeddingDecoder, TrainedModel)
    if len(boxes) != len(kinds) or not all(isinstance(box, kind) for box, kind in zip(boxes, kinds)):
        raise ValueError(f"diffusers' {NAME} is CLIP's text tower, a prior, a decoder and an upsampler")
    images = cast(EmbeddingDecoder, pipeline.decoders[0]).image_encoder
    return Boxes(*cast(Any, (*boxes, images)))


def load_prior(prior: Path, scheduler: Path, loading: Loading = Loading()) -> StandardizedPrior:
    """A prior from the folders of the network and its UnCLIPScheduler: Karlo's, or Kandinsky 2.2's."""
    found = unclip_prior.load_prior(prior, **loading.files)
    model, sampling = _scheduled(karlo.prior_model(found.config), scheduler)
    settings = replace(karlo.SAMPLING_PRIOR, **sampling)
    return StandardizedPrior(model, found.params, settings, mean=found.mean, deviation=found.deviation)


def load_decoder(folder: Path, loading: Loading = Loading()) -> TrainedModel:
    """The decoder with its projections. Its captions have CLIP's length."""
    folders = Folders(folder / "decoder", folder / "text_proj")
    network, params = unclip_unet.load_decoder(folders, **loading.files)
    config = folders.unet / "config.json"
    try:
        model = karlo.decoder_model(network.unet, _side(config), karlo.CLIP_L[0], network.embedding)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    model, sampling = _scheduled(model, folder / "decoder_scheduler")
    return TrainedModel(model, params, replace(karlo.SAMPLING_DECODER, **sampling))


def load_upsampler(folder: Path, low_res: int, loading: Loading = Loading()) -> TrainedModel:
    """Both networks of the upsampler as one. low_res: side of its input."""
    both = [unclip_unet.load_upsampler(folder / name, **loading.files) for name in UPSAMPLERS]
    (network, first), (other, last) = both
    if other != network:
        raise ValueError(f"{folder}: {' and '.join(UPSAMPLERS)} have different settings")
    config = folder / UPSAMPLERS[0] / "config.json"
    side = _side(config)
    if side % low_res:
        raise ValueError(f"{config}: sample_size = {side} is not supported, only multiples of the decoder's {low_res}")
    try:
        model = karlo.upsampler_model(network.unet, side, side // low_res)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    model, sampling = _scheduled(model, folder / "super_res_scheduler")
    return TrainedModel(model, {"first": first, "last": last}, replace(karlo.SAMPLING_UPSAMPLER, **sampling))


def load_text_encoder(folder: Path, loading: Loading = Loading()) -> CLIPTextEncoder:
    """CLIP's text tower, whose padding is masked, with its embedding. ValueError for a tower without a projection."""
    encoder = clip.load_text_encoder(folder / "text_encoder", tokenizer=folder / "tokenizer", **loading.files)
    if not encoder.config.width:
        raise ValueError(f"{folder / 'text_encoder'} is a text tower without a projection: a prior reads its embedding")
    return replace(encoder, padding_is_read=False, pooling=Pooling.EMBEDDING)


def load_image_encoder(folder: Path, loading: Loading = Loading()) -> CLIPImageEncoder:
    """CLIP's image tower. ValueError for a tower without a projection."""
    try:
        return CLIPImageEncoder(*clip.load_image(folder, **loading.files))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _side(config: Path) -> int:
    return hub.Group(config, hub.read_json(config)).size("sample_size", None, *sizes.SIDE)


def _scheduled(model: DiffusionModel, folder: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """The model with the schedule and prediction of a scheduler, and fields of its `SamplingConfig`."""
    path = folder / "scheduler_config.json"
    schedule, prediction, sampling = unclip_scheduler.read(path, model.unet.learned_variance)
    return replace(model, schedule=schedule, prediction=prediction), sampling


def export(boxes: Boxes, directory: str | Path, dtype: str = "float32") -> None:
    """Writes a folder for diffusers' UnCLIPPipeline. Versions that deprecate it open the folder's components, but no
    longer the pipeline.

    ValueError if diffusers cannot express a setting, before anything is written; OSError if writing fails.
    """
    directory, text = Path(directory), boxes.text_encoder
    prior, unets, schedulers = _networks(boxes)
    clip.check(text.config, text.params)
    unclip_prior.check(prior)
    for name, (network, params, side) in unets.items():
        unclip_unet.check(network, params, f"the {name} to export")
        sizes.check(DiffusionModel, "side", side, name)
    for name, (network, params, side) in unets.items():
        folders = Folders(directory / name, directory / "text_proj" if name == "decoder" else None)
        unclip_unet.export_unet(network, params, folders, dtype, sample_size=side)
    unclip_prior.export_prior(prior, directory / "prior", dtype)
    for name, values in schedulers.items():
        hub.write_json(directory / name / "scheduler_config.json", values)
    clip.export(text.config, text.params, directory / "text_encoder", dtype)
    text.tokenizer.save_pretrained(str(directory / "tokenizer"))
    if (images := boxes.image_encoder) is not None:
        clip.export(replace(images.config, text=None), {"image": images.params["image"]}, directory / IMAGE, dtype)
    classes = {"prior": unclip_prior.NAME, "decoder": unclip_unet.CONDITIONED, "text_proj": unclip_unet.PROJECTION}
    classes |= dict.fromkeys(UPSAMPLERS, unclip_unet.UNCONDITIONED) | dict.fromkeys(schedulers, unclip_scheduler.NAME)
    index: dict[str, Any] = {"_class_name": NAME}
    index |= {name: ("diffusers", kind) for name, kind in classes.items()}
    index |= {"text_proj": ("unclip", unclip_unet.PROJECTION)}  # as in the public folder
    index |= {"text_encoder": ("transformers", "CLIPTextModelWithProjection")}
    hub.write_json(directory / INDEX, index | {"tokenizer": ("transformers", "CLIPTokenizer")})


class _Networks(NamedTuple):
    """What is written: the prior; parameters and side of each U-Net; the settings of the schedulers."""

    prior: unclip_prior.Prior
    unets: dict[str, tuple[Network, dict, int]]
    schedulers: dict[str, dict[str, Any]]


def _networks(boxes: Boxes) -> _Networks:
    """ValueError for boxes that are not Karlo's."""
    prior, decoder, upsampler = boxes.prior, boxes.decoder, boxes.upsampler
    network, reads, experts = prior.model.unet, decoder.model.unet, upsampler.model.unet
    if not isinstance(network, PriorConfig):
        raise _refused("prior", f"unet = {type(network).__name__}")
    if not isinstance(reads, UNetConfig) or decoder.model.text is None:
        raise _refused("decoder", f"unet = {type(reads).__name__} or without text")
    if not isinstance(experts, ExpertsConfig) or experts.boundary != 0.0:
        raise _refused("upsampler", f"unet = {type(experts).__name__}: it has to be ExpertsConfig with a boundary of 0")
    length, width = decoder.model.text.shape
    single = UNetConfig(**{each.name: getattr(experts, each.name) for each in fields(UNetConfig)})
    presets = {
        "prior": (prior, karlo.prior_model(network)),
        "decoder": (decoder, karlo.decoder_model(reads, decoder.side, length, width)),
        "upsampler": (upsampler, karlo.upsampler_model(single, upsampler.side, upsampler.factor)),
    }
    for name, (trained, preset) in presets.items():
        check_conditioned(NAME, name, trained.model, preset)
    halves = (upsampler.params.get(name, {}) for name in ("first", "last"))
    unets = {"decoder": (Network(reads, width), decoder.params, decoder.side)}
    unets |= {name: (Network(single, 0), params, upsampler.side) for name, params in zip(UPSAMPLERS, halves)}
    schedulers = {
        f"{folder}_scheduler": unclip_scheduler.described(each.model.schedule, each.model.prediction, each.sampling)
        for folder, each in (("prior", prior), ("decoder", decoder), ("super_res", upsampler))
    }
    statistics = boxes.prior.mean, boxes.prior.deviation
    return _Networks(unclip_prior.Prior(network, prior.params, *statistics), unets, schedulers)


def check_conditioned(pipeline: str, name: str, model: DiffusionModel, preset: DiffusionModel) -> None:
    """ValueError, naming a setting, unless a box of a pipeline differs from a preset only in training, schedule and
    prediction."""
    training: dict[str, Any] = {name: getattr(preset, name) for name in ("weighting", "time_sampler")}
    both = replace(model, schedule=preset.schedule, prediction=preset.prediction, **training), preset
    have, want = (
        comparison.flatten(replace(each, conditioners=tuple(map(without_dropout, each.conditioners)))) for each in both
    )
    difference = comparison.first_difference(want, have)
    if difference is not None:
        raise ValueError(f"diffusers' {pipeline} has no {name} with {difference} = {have.get(difference)}")


def _refused(name: str, what: str) -> ValueError:
    return ValueError(f"diffusers' {NAME} has no {name} with {what}")

"""Kandinsky 2.2 from disk: the folders of diffusers' two pipelines ⇄ the boxes of a system.

    PRIOR/     model_index.json  prior/  scheduler/  text_encoder/  tokenizer/  image_encoder/
    DECODER/   model_index.json  unet/  scheduler/  movq/

The image encoder embeds images for variations, and an empty image, which is the decoder's null condition. The prior and
the text encoder are Karlo's with other sizes (`weights/karlo.py`).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.core.products import LatentSpec
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, StandardizedPrior
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.clip import CLIP, TowerOutput
from jaxdiff.nets.image_readers import ImageTokens
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.systems import kandinsky as presets
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.systems.unclip import unclip
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import autoencoder, hub, karlo, schedulers, sizes, unclip_unet
from jaxdiff.weights.karlo import INDEX, Loading
from jaxdiff.weights.unclip_unet import NULL, Folders, Network

FLOAT32 = Loading()
PRIOR, DECODER = "KandinskyV22PriorPipeline", "KandinskyV22Pipeline"


class Boxes(NamedTuple):
    """What a system is filled with. The prior gives CLIP's image embeddings (b 1 1 e); the decoder reads one as the
    condition `image_embedding` (b 1 e), and gives latents."""

    text_encoder: CLIPTextEncoder
    prior: StandardizedPrior
    decoder: TrainedModel
    autoencoder: TrainedAutoencoder
    image_encoder: CLIPImageEncoder | None = None

    def pipeline(self, text: TextEncoder | None = None) -> Pipeline:
        """The system. text: replaces the text encoder."""
        decoder = EmbeddingDecoder.of(self.decoder, self.image_encoder)
        return unclip(text or self.text_encoder, self.prior, decoder, self.autoencoder)


def is_prior(folder: str | Path) -> bool:
    """Whether this is the folder of a KandinskyV22PriorPipeline."""
    index = Path(folder) / INDEX
    return index.is_file() and hub.read_json(index).get("_class_name") == PRIOR


def load(prior: str | Path, decoder: str | Path, loading: Loading = FLOAT32) -> Boxes:
    """Load all boxes from two folders or hub ids.

    Raises FileNotFoundError, or ValueError that names the file and what does not fit.
    """
    first = _folder(prior, ("prior", "text_encoder", "image_encoder"), PRIOR, loading)
    second = _folder(decoder, ("unet", "movq"), DECODER, loading)
    encoder = karlo.load_text_encoder(first, loading)
    embeddings = karlo.load_prior(first / "prior", first / "scheduler", loading)
    images = karlo.load_image_encoder(first / karlo.IMAGE, loading)
    null = null_embedding(images)
    network = load_decoder(second, loading)
    width = embeddings.model.product.channels
    for where, value in (
        (second / "unet", _width(network)),
        (first / "text_encoder", encoder.config.width),
        (first / karlo.IMAGE, len(null)),
    ):
        if value != width:
            raise ValueError(f"{where} has embeddings of width {value}, the prior those of {width}")
    if embeddings.reads != (encoder.length, encoder.width):
        have, want = (f"{n} of width {w}" for n, w in ((encoder.length, encoder.width), embeddings.reads or (0, 0)))
        raise ValueError(f"{first / 'text_encoder'} has states of a caption, {have}, the prior reads {want}")
    movq = load_autoencoder(second / "movq", network.side, loading)
    if movq.consumes != network.produces:
        raise ValueError(f"{second / 'movq'} reads {movq.consumes}, the decoder gives {network.produces}")
    return Boxes(encoder, embeddings, with_null(network, null), movq, images)


def _folder(path_or_id: str | Path, folders: tuple[str, ...], kind: str, loading: Loading) -> Path:
    folder = hub.directory_of(path_or_id, "Kandinsky 2.2", folders=folders, variant=loading.variant)
    if (folder / INDEX).is_file():
        hub.require(folder / INDEX, hub.read_json(folder / INDEX), "_class_name", (kind,))
    return folder


def load_decoder(folder: Path, loading: Loading = FLOAT32) -> TrainedModel:
    """The decoder. Its null embedding is zero until it is set (`with_null`)."""
    network, params = unclip_unet.load_decoder(Folders(folder / "unet"), **loading.files)
    config = folder / "unet" / "config.json"
    side = hub.Group(config, hub.read_json(config)).size("sample_size", None, *sizes.SIDE)
    try:
        model = presets.decoder_model(network.unet, side, network.embedding, LatentSpec(network.channels))
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    path = folder / "scheduler" / "scheduler_config.json"
    schedule, prediction, sampling = schedulers.read(path, network.unet.learned_variance)
    model = replace(model, schedule=schedule, prediction=prediction)
    return TrainedModel(model, params, replace(presets.SAMPLING_DECODER, **sampling))


def load_autoencoder(folder: Path, side: int, loading: Loading = FLOAT32) -> TrainedAutoencoder:
    """MoVQ, which decodes latents as they are. side: of the latents."""
    settings, params = autoencoder.load(folder, **loading.files)
    return TrainedAutoencoder(settings.config, params, 1.0, side=side * settings.config.stride, quantized=False)


def null_embedding(encoder: CLIPImageEncoder) -> Float[Array, " e"]:
    """CLIP's embedding of an empty image: zeros after CLIP's normalization."""
    image = jnp.zeros((1, encoder.resolution, encoder.resolution, 3))
    embed = jax.jit(partial(CLIP(encoder.config).apply, method="embed_image"))
    embedding = cast(TowerOutput, embed({"params": encoder.params}, image)).embedding
    assert embedding is not None  # it has a projection
    return embedding[0]


def with_null(decoder: TrainedModel, embedding: Float[Array, " e"]) -> TrainedModel:
    """The decoder with another embedding for images that are not given. ValueError for another width."""
    params = dict(decoder.params)
    null = params["text"][NULL]
    if embedding.shape != null.shape:
        raise ValueError(f"a null embedding of width {len(embedding)}: the decoder reads those of {len(null)}")
    params["text"] = params["text"] | {NULL: embedding.astype(null.dtype)}
    return replace(decoder, params=params)


def _width(decoder: TrainedModel) -> int:
    return len(decoder.params["text"][NULL])


def export_decoder(
    decoder: TrainedModel, movq: TrainedAutoencoder, directory: str | Path, dtype: str = "float32"
) -> None:
    """Writes a folder for diffusers' KandinskyV22Pipeline. The null embedding is not among its files.

    ValueError if diffusers cannot express a setting, before anything is written; OSError if writing fails.
    """
    directory, model, unet = Path(directory), decoder.model, decoder.model.unet
    if not isinstance(unet, UNetConfig) or not isinstance(unet.conditioning.text, ImageTokens):
        raise ValueError(f"diffusers' {DECODER} has no decoder with unet = {type(unet).__name__}, without ImageTokens")
    preset = presets.decoder_model(unet, model.side, _width(decoder), LatentSpec(model.product.channels))
    karlo.check_conditioned(DECODER, "decoder", model, preset)
    if movq.scale != 1.0 or movq.quantized:
        raise ValueError(f"diffusers' {DECODER} decodes latents as they are: scale = 1 and quantized = False")
    network = Network(unet, _width(decoder), model.product.channels)
    unclip_unet.check(network, decoder.params, "the decoder to export")
    settings = autoencoder.Settings(movq.config, side=movq.side)
    autoencoder.check_public(movq.config)
    autoencoder.described(settings, movq.params)
    scheduler = schedulers.described(model.schedule, model.prediction, decoder.sampling, unet.learned_variance)
    unclip_unet.export_unet(network, decoder.params, Folders(directory / "unet"), dtype, sample_size=model.side)
    autoencoder.export(settings, movq.params, directory / "movq", dtype)
    hub.write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    components = {
        "unet": ("diffusers", unclip_unet.CONDITIONED),
        "scheduler": ("diffusers", scheduler["_class_name"]),
        "movq": ("diffusers", "VQModel"),
    }
    hub.write_json(directory / INDEX, {"_class_name": DECODER} | components)

"""Stable Diffusion from disk: a single safetensors file, or a folder of a diffusers pipeline.

    pipeline = load("v1-5-pruned-emaonly.safetensors")
    pipeline = load("stable-diffusion-xl-base-1.0/", dtype="bfloat16")

Both are opened as a `Source`: per component its settings and its tensors, which are not read before they are needed.
Nothing is downloaded for a file: configurations and the tokenizer are in the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxdiff.core.messages import quoted
from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.conditioners import (
    AnyConditioner,
    LowResConditioner,
    MaskConditioner,
    NullText,
    SizeConditioner,
    TextConditioner,
)
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems import stable_diffusion as presets
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.clip import CLIPTextEncoder, Pooling
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, check_vocabulary, load_tokenizer
from jaxdiff.weights import autoencoder, clip, hub, latent_unet, schedulers, single_file, single_file_sizes
from jaxdiff.weights.adapters import LoRAs, with_controlnets
from jaxdiff.weights.lora_names import Networks
from jaxdiff.weights.single_file_families import SD_1, X4_UPSCALER, Family
from jaxdiff.weights.tree import PICKLES, Unread

INDEX = "model_index.json"
CLASSES = tuple(f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "Upscale"))
CLASSES += tuple(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
CLASSES += tuple(f"{name[:-8]}ControlNetPipeline" for name in CLASSES if "Upscale" not in name)
"""The pipelines of diffusers whose folders are read."""
FILES = (".safetensors", *PICKLES)
"""Endings of single files; pickles are refused with the command that converts them."""
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""Folders with weights."""
OLD_SCHEDULER = {"steps_offset": 1, "clip_sample": False}
"""What diffusers' pipelines of Stable Diffusion 1 and 2 set, since the first published files lack it."""
PADDING = {"<|endoftext|>": Padding.END, "!": Padding.EXCLAMATION}
"""By the token that fills a prompt up."""


class Component(NamedTuple):
    """A component that is not yet read. where: the name of its settings in messages. tensors: by the names of diffusers
    and transformers."""

    settings: Mapping[str, Any]
    where: Path
    tensors: Mapping[str, Unread]


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model. components: by diffusers' folder names. schedulers: settings by folder name. index: the content
    of model_index.json. tokenizers: of each text encoder. vae: the settings of the model's autoencoder, of which only
    the layout and the stride are used if another replaces it."""

    path: Path
    components: dict[str, Component]
    schedulers: Mapping[str, tuple[Mapping[str, Any], Path]]
    index: Mapping[str, Any]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    vae: Mapping[str, Any]

    def component(self, name: str) -> Component:
        """ValueError if the model has no such component."""
        if name not in self.components:
            raise ValueError(f"{self.path} has no {name}: its pipeline needs one")
        return self.components[name]


@dataclass(frozen=True)
class Reading:
    """How a model is read.

    dtype: type of parameters and computation, "float32" (None) or "bfloat16". variant: "fp16" selects the files of that
    name in a folder. place: puts an array on its devices. vae: a file or folder with the autoencoder, instead of the
    model's. prediction: what the U-Net predicts, if a single file does not say (`single_file_kinds.family_of`).
    ema: the averaged weights of a single file that has both.
    chunks, weights: windows of 75 tokens for a prompt, and whether `(word:1.3)` is a weight (`CLIPTextEncoder`).
    loras: merged into the U-Net and the text encoders. controls: ControlNets, for which sampling needs hints.
    """

    dtype: str | None = None
    variant: str | None = None
    place: hub.Place = jnp.asarray
    vae: str | Path | None = None
    prediction: Prediction | None = None
    ema: bool = False
    chunks: int = 1
    weights: bool = False
    loras: LoRAs = LoRAs()
    controls: tuple[str | Path, ...] = ()

    @property
    def kind(self) -> str:
        """The type, float32 by default."""
        return self.dtype or "float32"


def is_stable_diffusion(path_or_id: str | Path) -> bool:
    """Whether this is a single file, or one of diffusers' pipelines of Stable Diffusion: a folder or a hub id, of which
    the settings are downloaded."""
    folder = Path(path_or_id)
    if folder.is_file() or folder.suffix in FILES:
        return True
    hub_id = isinstance(path_or_id, str) and path_or_id.count("/") == 1 and path_or_id[0] not in "./~"
    if hub_id and not folder.is_dir():
        try:
            folder = hub.directory_of(path_or_id, folders=())  # the settings alone
        except (OSError, ValueError):  # the loader of another system says what is wrong
            return False
    if not (folder / INDEX).is_file():
        return False
    return str(hub.read_json(folder / INDEX).get("_class_name")).startswith("StableDiffusion")


def directory_of(path_or_id: str | Path, variant: str | None = None) -> Path:
    """The folder of a pipeline; of a hub id the settings are downloaded first, then the components that it has."""
    settings = hub.directory_of(path_or_id, "Stable Diffusion", folders=())
    folders = tuple(name for name in COMPONENTS if (settings / name / "config.json").is_file())
    return hub.directory_of(path_or_id, "Stable Diffusion", folders=folders, variant=variant)


def load(path_or_id: str | Path, reading: Reading = Reading(), text: TextEncoder | None = None) -> Pipeline:
    """Load a pipeline from a single file, a folder or a hub id. text: replaces the text encoder, which is not loaded.

    Raises FileNotFoundError, or ValueError that names the file and what does not fit.
    """
    source = open_source(path_or_id, reading)
    generator = load_generator(source, reading)
    decoder = load_autoencoder(source, generator.model, reading)
    if text is None:
        text = load_text(source, reading)
        _check_pooled(source, generator.model, text)
    return presets.stable_diffusion(text, generator, decoder)


def open_source(path_or_id: str | Path, reading: Reading = Reading()) -> Source:
    """Open a single file, a folder or a hub id."""
    path = Path(path_or_id)
    return _open_file(path, reading) if path.is_file() or path.suffix in FILES else _open_folder(path_or_id, reading)


def _open_file(path: Path, reading: Reading) -> Source:
    opened = single_file.open_file(path, prediction=reading.prediction, ema=reading.ema)
    family, components = opened.family, {}
    for name in ("unet", "vae", *family.text_encoders):
        if name == "vae" and reading.vae is not None:
            continue
        tensors, where = opened.component(name), Path(f"{path} ({name})")
        components[name] = Component(_settings(family, name, tensors), where, tensors)
    low_res = {} if family.low_res_scheduler is None else {"low_res_scheduler": (family.low_res_scheduler, path)}
    tokenizers = {name: clip_tokenizer(PADDING[each.pad]) for name, each in family.text_encoders.items()}
    listed = {"scheduler": (family.scheduler, path)} | low_res
    return Source(path, components, listed, family.index, tokenizers, family.vae)


def _settings(family: Family, name: str, tensors: Mapping[str, Unread]) -> Mapping[str, Any]:
    """The settings of a component of a single file."""
    if name == "unet":
        return single_file_sizes.unet(family.unet, tensors)
    if name == "vae":
        return single_file_sizes.autoencoder(family.vae, tensors)
    return single_file_sizes.text_encoder(family.text_encoders[name].config, tensors)


def _open_folder(path_or_id: str | Path, reading: Reading) -> Source:
    folder = directory_of(path_or_id, reading.variant)
    index = hub.read_json(folder / INDEX, "pipeline")
    hub.require(folder / INDEX, index, "_class_name", CLASSES)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    components = {}
    for name in ("unet", "vae", *encoders):
        if name == "vae" and (reading.vae is not None or not (folder / name).is_dir()):
            continue
        config = folder / name / "config.json"
        settings = hub.read_json(config, name)
        components[name] = Component(settings, config, hub.open_tensors(folder / name, reading.variant))
    files = {name: folder / name / "scheduler_config.json" for name in ("scheduler", "low_res_scheduler")}
    read = {name: (hub.read_json(path, "scheduler"), path) for name, path in files.items() if path.is_file()}
    if "scheduler" not in read:
        raise FileNotFoundError(f"{files['scheduler']} is missing: a pipeline needs it")
    tokenizers = {name: _tokenizer(folder / name.replace("text_encoder", "tokenizer"), name) for name in encoders}
    vae = folder / "vae" / "config.json"
    usual = X4_UPSCALER.vae if "low_res_scheduler" in read else SD_1.vae
    return Source(folder, components, read, index, tokenizers, hub.read_json(vae) if vae.is_file() else usual)


def _tokenizer(folder: Path, encoder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; without one, the package's with the padding that the public models have."""
    if folder.is_dir():
        return load_tokenizer(folder)
    return clip_tokenizer(Padding.EXCLAMATION if encoder == "text_encoder_2" else Padding.END)


def load_generator(source: Source, reading: Reading = Reading()) -> TrainedModel:
    """The latent diffusion model and its sampling settings. ValueError for a kind that is not supported."""
    unet = source.component("unet")
    network = latent_unet.read_config(unet.settings, unet.where, reading.kind)
    settings, path = source.schedulers["scheduler"]
    if network.vector is None and not network.unet.level_entries:
        settings = {**settings, **OLD_SCHEDULER}
    scheduler = schedulers.from_values(path, settings)
    stride = autoencoder.from_values(source.vae, source.path / "vae").config.stride
    model = DiffusionModel(
        unet=network.unet,
        side=_side(unet, network),
        product=LatentSpec(network.channels, stride),
        conditioners=_conditioners(source, network, reading),
        schedule=scheduler.schedule,
        prediction=scheduler.prediction,
    )
    preset = presets.SAMPLING_X4 if network.unet.level_entries else presets.SAMPLING
    preset = replace(preset, guidance=Guidance(5.0)) if network.vector is not None else preset
    params = latent_unet.load_tensors(network, unet.tensors, reading.kind, reading.place, str(unet.where))
    params = reading.loras.merged_into(params, "model", _networks(source, reading))
    trained = TrainedModel(model, params, replace(preset, **scheduler.sampling))
    return with_controlnets(trained, reading.controls, reading.kind, reading.place)


def _side(unet: Component, network: latent_unet.Network) -> int:
    """The side of the training latents."""
    side = unet.settings.get("sample_size") or 64
    if type(side) is not int or not 1 <= side <= 2**14 or side % network.unet.stride:
        raise ValueError(
            f"{unet.where}: sample_size = {quoted(side)} is not supported, only multiples of {network.unet.stride}"
        )
    return side


def _conditioners(source: Source, network: latent_unet.Network, reading: Reading) -> tuple[AnyConditioner, ...]:
    """What the network is conditioned on. ValueError, naming its inputs, for a combination that no supported model
    has."""
    where, vector, concat = source.component("unet").where, network.vector, network.concat
    conditioners: list[AnyConditioner] = []
    pooled, null = None, NullText.EMPTY
    if vector is not None:
        pooled = vector.width - 6 * vector.frequencies
        if source.index.get("requires_aesthetics_score"):
            raise ValueError(f"{where}: a refiner, which reads an aesthetic score, is not supported")
        if vector.kind != "text_time" or pooled < 1:
            raise ValueError(
                f"{where}: a vector of {vector.width} numbers ({vector.kind}) is not supported, only SDXL's"
            )
        conditioners.append(SizeConditioner(vector.frequencies))
        if source.index.get("force_zeros_for_empty_prompt", True):
            null = NullText.ZEROS
    if network.unet.level_entries and concat:
        settings, path = source.schedulers.get("low_res_scheduler", source.schedulers["scheduler"])
        most = source.index.get("max_noise_level", 350) / network.unet.level_entries
        conditioners.append(
            LowResConditioner(1, schedulers.from_values(path, settings).schedule, most, channels=concat)
        )
    elif concat == 1 + network.channels:
        conditioners.append(MaskConditioner(network.channels))
    elif concat or network.unet.level_entries:
        kinds = {1: "a depth map", network.channels: "an image to be edited"}
        what = kinds.get(concat, f"{concat} channels")
        raise ValueError(f"{where}: the network reads {what} beside the latents, which is not supported")
    text = TextConditioner(network.text_width, presets.TOKENS * reading.chunks, null=null, pooled=pooled)
    return (text, *conditioners)


def load_autoencoder(source: Source, model: DiffusionModel, reading: Reading = Reading()) -> TrainedAutoencoder:
    """The autoencoder: the model's, or that of `reading.vae`."""
    component = source.component("vae") if reading.vae is None else _other_vae(Path(reading.vae), source, reading)
    settings = autoencoder.from_values(component.settings, component.where, hub.check_dtype(reading.kind))
    assert isinstance(model.product, LatentSpec)
    for name, own in (("stride", settings.config.stride), ("channels", settings.config.code_channels)):
        if own != (wanted := getattr(model.product, name)):
            have, want = (f"{n} {name}" if name == "channels" else f"{name} {n}" for n in (own, wanted))
            raise ValueError(f"{component.where}: an autoencoder of {have}, but the model's latents have {want}")
    params = autoencoder.load_tensors(settings, component.tensors, reading.kind, reading.place, str(component.where))
    side = model.side * settings.config.stride
    # The class's default is true, but only XL's needs it.
    upcast = settings.upcast and any(isinstance(each, SizeConditioner) for each in model.conditioners)
    return TrainedAutoencoder(settings.config, params, settings.scale, upcast, side)


def _other_vae(path: Path, source: Source, reading: Reading) -> Component:
    """An autoencoder beside the model: a folder with its config.json, or a file."""
    if path.is_dir():
        config = path / "config.json"
        return Component(hub.read_json(config, "autoencoder"), config, hub.open_tensors(path, reading.variant))
    tensors = single_file.open_autoencoder(path, source.vae)
    return Component(single_file_sizes.autoencoder(dict(source.vae), tensors), path, tensors)


def load_text(source: Source, reading: Reading = Reading()) -> TextEncoder:
    """The text encoder: CLIP's text tower, or both of SDXL's."""
    names = [name for name in source.components if name.startswith("text_encoder")]
    if not names:
        raise ValueError(f"{source.path} has no text_encoder: name one")
    encoders = [_text_encoder(source, name, reading) for name in names]
    if len(encoders) == 1:
        return replace(encoders[0], pooling=Pooling.NONE)
    # SDXL: the states before the last block, without the final norm, of both; the second's embedding.
    penultimate = partial(replace, skip_last=1, final_norm=False)
    first, second = penultimate(encoders[0], pooling=Pooling.NONE), penultimate(encoders[1], pooling=Pooling.EMBEDDING)
    return CombinedTextEncoder((first, second), Axis.FEATURES)


def _check_pooled(source: Source, model: DiffusionModel, encoder: TextEncoder) -> None:
    """ValueError if the model does not read the pooled vector of its second text encoder."""
    last = encoder.encoders[-1] if isinstance(encoder, CombinedTextEncoder) else None
    given = last.config.width if isinstance(last, CLIPTextEncoder) else None
    wanted = None if model.text is None else model.text.pooled
    if given != wanted:
        have, want = ("none" if width is None else f"one of width {width}" for width in (given, wanted))
        raise ValueError(f"{source.path}: the U-Net reads {want} as pooled text, the text encoders give {have}")


def _text_encoder(source: Source, name: str, reading: Reading) -> CLIPTextEncoder:
    component, tokenizer = source.component(name), source.tokenizers[name]
    where = str(component.where)
    config, params = clip.from_tensors(
        component.settings, component.tensors, reading.kind, where=where, place=reading.place
    )
    assert config.text is not None
    check_vocabulary(tokenizer, config.text.vocab, where)
    network = name.replace("text_encoder", "text")
    params = reading.loras.merged_into(params, network, _networks(source, reading))
    return CLIPTextEncoder(config, params, tokenizer, chunks=reading.chunks, weights=reading.weights)


def _networks(source: Source, reading: Reading) -> Networks:
    """The networks that a LoRA may be of."""
    unet = source.component("unet")
    towers = [source.components[name] for name in ("text_encoder", "text_encoder_2") if name in source.components]
    text = (clip.config_of(tower.settings, str(tower.where), reading.kind) for tower in towers)
    return Networks(latent_unet.read_config(unet.settings, unet.where, reading.kind), tuple(text))

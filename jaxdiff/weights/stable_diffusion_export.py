"""Stable Diffusion to disk: the inverse of `weights/stable_diffusion.py`.

    export(pipeline, "my-model/")                                          # a folder of a diffusers pipeline
    export(pipeline, "my-model.safetensors", Layout.SINGLE_FILE, "float16")

Neither layout has the number of steps, the guidance, tiles or the noise level of an upscaler's input: read again, they
are the defaults of `systems/stable_diffusion.py`. A single file has neither tokenizer, scheduler nor the side of the
training images: these are its family's.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.core import trees
from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.diffusion.time_grid import Leading
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.conditioners import LowResConditioner, MaskConditioner, NullText, SizeConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.text.clip_tokenizer import clip_tokenizer
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.weights import autoencoder, clip, hub, latent_unet, lazy, schedulers, single_file, single_file_sizes
from jaxdiff.weights.single_file_families import FAMILIES, Family
from jaxdiff.weights.stable_diffusion import INDEX, PADDING
from jaxdiff.weights.tree import Unread

TYPES = ("float32", "float16", "bfloat16")
VERSION = "0.42.1"
"""Of the diffusers whose layout is written; its inpainting pipelines do not open a folder without one."""


class Layout(enum.Enum):
    """How a pipeline is stored."""

    FOLDER = "folder"
    """A folder of a diffusers pipeline: a folder for each component, and model_index.json."""
    SINGLE_FILE = "single_file"
    """One safetensors file with all networks, as the public checkpoints."""


@dataclass(frozen=True, eq=False)
class Contents:
    """A pipeline as diffusers has it. encoders: the text encoders by diffusers' folder names. scheduler, low_res: the
    settings of the schedulers. index: settings of model_index.json."""

    generator: TrainedModel
    network: latent_unet.Network
    decoder: TrainedAutoencoder
    encoders: dict[str, CLIPTextEncoder]
    scheduler: Mapping[str, Any]
    low_res: Mapping[str, Any] | None
    index: Mapping[str, Any]


def export(pipeline: Pipeline, path: str | Path, layout: Layout = Layout.FOLDER, dtype: str = "float32") -> None:
    """Write a pipeline for `stable_diffusion.load`, and for diffusers' `from_pretrained` or `from_single_file`.

    dtype: type of the stored parameters; "float16" and "bfloat16" halve the files. ValueError for what the layout
    cannot express, before anything is written; OSError if writing fails.
    """
    if dtype not in TYPES:
        raise ValueError(f"dtype must be one of {', '.join(TYPES)}, not {dtype}")
    contents = described(pipeline)
    if layout is Layout.SINGLE_FILE:
        family, tensors = family_of(contents), _tensors(contents)
        single_file.save(path, tensors, family, dtype)
    else:
        _write_folder(contents, Path(path), dtype)


def is_latent_diffusion(pipeline: Pipeline) -> bool:
    """Whether the boxes are those of `export`: a latent diffusion model and its autoencoder."""
    generator, decoders = pipeline.generator, pipeline.decoders
    model = generator.model if isinstance(generator, TrainedModel) else None
    latent = model is not None and isinstance(model.unet, LatentUNetConfig) and isinstance(model.product, LatentSpec)
    return latent and len(decoders) == 1 and isinstance(decoders[0], TrainedAutoencoder)


def described(pipeline: Pipeline) -> Contents:
    """The settings that are written. ValueError, naming the setting, for what diffusers cannot express."""
    if not is_latent_diffusion(pipeline):
        raise ValueError(
            "diffusers' Stable Diffusion is a latent diffusion model and an autoencoder: this pipeline is not"
        )
    generator, decoder = pipeline.generator, pipeline.decoders[0]
    assert isinstance(generator, TrainedModel) and isinstance(decoder, TrainedAutoencoder)  # `is_latent_diffusion`
    model, sampling = generator.model, generator.sampling
    for name, wanted in (("clean_known", False), ("fresh_start", True)):
        if getattr(sampling, name) is not wanted:
            raise ValueError(f"diffusers' Stable Diffusion has no {name} = {getattr(sampling, name)}")
    network = network_of(model)
    trees.check_tree(generator.params, latent_unet.shapes_of(network), "the U-Net to export")
    autoencoder.check_public(decoder.config)
    autoencoder.described(_settings(decoder), decoder.params)
    encoders = _encoders(pipeline, network)
    scheduler = schedulers.described(model.schedule, model.prediction, sampling)
    contents = Contents(generator, network, decoder, encoders, scheduler, _low_res(model), _index(model))
    latent_unet.hub_config(network)
    return contents


def network_of(model: DiffusionModel) -> latent_unet.Network:
    """The U-Net and the sizes of its inputs. ValueError for conditioners that diffusers does not have."""
    assert isinstance(model.unet, LatentUNetConfig)
    text, sizes, mask = (_only(model, kind) for kind in (TextConditioner, SizeConditioner, MaskConditioner))
    low_res = model.low_res
    if model.unet.coordinates or (text is not None and text.mean) or model.representations:
        raise ValueError("diffusers' Stable Diffusion reads no coordinates, mean of the text, class, map or embedding")
    if text is None or (text.pooled is None) != (sizes is None):
        raise ValueError("diffusers' Stable Diffusion reads text, and a pooled text and sizes both or neither")
    if (low_res is None) == bool(model.unet.level_entries) or (low_res is not None and (mask or low_res.factor != 1)):
        raise ValueError(
            "diffusers' upscaler reads an image of the latents' size and embeds the level of its noise by a table"
        )
    if sizes is None and text.null is not NullText.EMPTY:
        raise ValueError(f"diffusers' Stable Diffusion has no null text {text.null}: it is the empty prompt")
    return latent_unet.network_of(model)


def _only(model: DiffusionModel, kind: type) -> Any:
    return next((each for each in model.conditioners if isinstance(each, kind)), None)


def _settings(decoder: TrainedAutoencoder) -> autoencoder.Settings:
    return autoencoder.Settings(decoder.config, decoder.scale, decoder.upcast, decoder.side)


def _encoders(pipeline: Pipeline, network: latent_unet.Network) -> dict[str, CLIPTextEncoder]:
    """The text encoders by folder. ValueError for settings that are not those of diffusers' pipelines."""
    encoder, xl = pipeline.text_encoder, network.vector is not None
    both = (
        encoder.encoders if isinstance(encoder, CombinedTextEncoder) and encoder.axis is Axis.FEATURES else (encoder,)
    )
    if len(both) != 1 + xl or not all(isinstance(each, CLIPTextEncoder) for each in both):
        wanted = "two text towers of CLIP, combined along the features" if xl else "one text tower of CLIP"
        raise ValueError(f"this pipeline's text encoder is not {wanted}, as the U-Net's layout needs it")
    names = ("text_encoder", "text_encoder_2")
    named = {name: each for name, each in zip(names, both) if isinstance(each, CLIPTextEncoder)}
    for name, each in named.items():
        fixed = {"skip_last": int(xl), "final_norm": not xl, "padding_is_read": True, "pads_with_a_word": False}
        for setting, value in fixed.items():
            if getattr(each, setting) != value:
                raise ValueError(f"diffusers has no {setting} = {getattr(each, setting)} in the {name} of this layout")
        clip.check(*_tower(each))
    return named


def _low_res(model: DiffusionModel) -> dict[str, Any] | None:
    """The settings of the scheduler of the noise on an upscaler's input."""
    if model.low_res is None:
        return None
    if model.low_res.augmentation is None:
        raise ValueError("diffusers' upscaler noises its low-resolution input: low_res.augmentation = None is not")
    plain = SamplingConfig(DDPM(), spacing=Leading(), thresholding=StaticThreshold())
    return schedulers.described(model.low_res.augmentation, Prediction.EPSILON, plain)


def _index(model: DiffusionModel) -> dict[str, Any]:
    """The settings of model_index.json."""
    text, mask, low_res = (_only(model, kind) for kind in (TextConditioner, MaskConditioner, LowResConditioner))
    task = "Upscale" if low_res is not None else "" if mask is None else "Inpaint"
    if text.pooled is not None:
        zeros = text.null is NullText.ZEROS
        return {"_class_name": f"StableDiffusionXL{task}Pipeline", "force_zeros_for_empty_prompt": zeros}
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{task}Pipeline"}
    index |= dict.fromkeys(("safety_checker", "feature_extractor"), (None, None))
    if low_res is not None:
        assert isinstance(model.unet, LatentUNetConfig)
        return index | {"max_noise_level": round(low_res.max_level * model.unet.level_entries)}
    return index | {"requires_safety_checker": False}


def _write_folder(contents: Contents, folder: Path, dtype: str) -> None:
    components: dict[str, tuple[str, str]] = {"unet": ("diffusers", "UNet2DConditionModel")}
    settings = _settings(contents.decoder)
    components["vae"] = "diffusers", autoencoder.described(settings, contents.decoder.params)["_class_name"]
    for name, encoder in contents.encoders.items():
        kind = "CLIPTextModel" if encoder.config.width is None else "CLIPTextModelWithProjection"
        components[name] = "transformers", kind
        components[name.replace("text_encoder", "tokenizer")] = "transformers", type(encoder.tokenizer).__name__
    scheduling = {"scheduler": contents.scheduler, "low_res_scheduler": contents.low_res}
    components |= {name: ("diffusers", values["_class_name"]) for name, values in scheduling.items() if values}
    known = ("text_encoder_2", "tokenizer_2", "low_res_scheduler")
    if others := [name for name in known if name not in components and (folder / name).exists()]:
        raise ValueError(f"{folder} holds {' and '.join(others)} of another pipeline: choose another folder")
    generator, unet = contents.generator, folder / "unet"
    latent_unet.export_unet(contents.network, generator.params, unet, dtype)
    config = latent_unet.hub_config(contents.network) | {"sample_size": generator.model.side}
    hub.write_json(unet / "config.json", config)
    autoencoder.export(settings, contents.decoder.params, folder / "vae", dtype)
    for name, encoder in contents.encoders.items():
        clip.export(*_tower(encoder), folder / name, dtype)
        encoder.tokenizer.save_pretrained(str(folder / name.replace("text_encoder", "tokenizer")))
    for name, values in scheduling.items():
        if values:
            hub.write_json(folder / name / "scheduler_config.json", values)
    hub.write_json(folder / INDEX, {"_diffusers_version": VERSION} | dict(contents.index) | components)


def _tower(encoder: CLIPTextEncoder) -> tuple[Any, dict]:
    """The text tower without the image tower."""
    return replace(encoder.config, image=None), {"text": encoder.params["text"]}


def _tensors(contents: Contents) -> dict[str, dict[str, Unread]]:
    """The tensors of the components, with the names of diffusers and transformers."""
    unet, vae = contents.generator.params, contents.decoder.params
    tensors = {"unet": _named(unet, latent_unet.key_map(contents.network, unet))}
    tensors["vae"] = _named(vae, autoencoder.key_map(vae))
    towers = {name: _tower(encoder)[1] for name, encoder in contents.encoders.items()}
    return tensors | {name: _named(params, clip.key_map(params)) for name, params in towers.items()}


def _named(params: dict, names: Mapping[str, str]) -> dict[str, Unread]:
    """A tree's tensors by public name, converted to PyTorch's layout when they are read."""
    return {names[path]: _unread(path, leaf) for path, leaf in trees.flatten(params).items()}


def _unread(path: str, leaf: Any) -> Unread:
    shape = hub.theirs_shape(path, leaf.shape)
    return lazy.Derived(shape, lazy.held(leaf).dtype, lambda types: hub.theirs(path, np.asarray(leaf)))


def family_of(contents: Contents) -> Family:
    """The family of single files that a pipeline belongs to. ValueError that names what differs from all families."""
    model, network = contents.generator.model, contents.network
    inputs, width = network.channels + network.concat, 0 if network.vector is None else network.vector.width
    signature = inputs, network.text_width, width, network.unet.level_entries
    fits = [family for family in FAMILIES if _signature(family) == signature]
    if not fits:
        raise ValueError(
            f"no single file has a U-Net of {inputs} input channels, text of width {network.text_width} and a vector "
            f"of {width}: write a folder"
        )
    same = (family for family in fits if family.prediction is model.prediction)
    family = next(same, None) or fits[0].with_prediction(model.prediction)
    rescaled = replace(family, scheduler=family.scheduler | {"rescale_betas_zero_snr": True})
    fitting = (each for each in (family, rescaled) if _schedule(each.scheduler) == model.schedule)
    chosen = next(fitting, None)
    if chosen is None:
        raise ValueError(f"a single file of {family.title} has no schedule = {model.schedule}: write a folder")
    _check_settings(contents, chosen)
    return chosen


def _schedule(config: Mapping[str, Any]) -> TabulatedSchedule:
    return schedulers.from_values(Path("scheduler_config.json"), config).schedule


def _check_settings(contents: Contents, family: Family) -> None:
    """ValueError, naming the setting, unless the file's reader would take the same from the family and the tensors."""
    tensors, where, index = _tensors(contents), Path(family.title), contents.index
    unet = latent_unet.read_config(single_file_sizes.unet(family.unet, tensors["unet"]), where).unet
    _check_same(family, "U-Net", replace(contents.network.unet, execution=unet.execution), unet)
    decoder, vae = contents.decoder, single_file_sizes.autoencoder(family.vae, tensors["vae"])
    settings = autoencoder.from_values(vae, where)
    config = replace(decoder.config, dtype=settings.config.dtype, remat=settings.config.remat)
    _check_same(family, "autoencoder", config, settings.config)
    _check_same(family, "autoencoder", _settings(decoder)._replace(config=config), settings, ("scale",))
    for name, encoder in contents.encoders.items():
        own = family.text_encoders[name]
        read = clip.from_values(single_file_sizes.text_encoder(own.config, tensors[name]), where, tower="text")
        _check_same(family, name, encoder.config.text, read.text)
        if own.projected != (encoder.config.width is not None):
            raise ValueError(f"the {name} of a single file of {family.title} needs its projection, and only then")
        words = clip_tokenizer(PADDING[own.pad])
        if (words.get_vocab(), words.pad_token_id) != (encoder.tokenizer.get_vocab(), encoder.tokenizer.pad_token_id):
            raise ValueError(f"a single file holds no tokenizer, and the {name} has not CLIP's: write a folder")
    for name in ("force_zeros_for_empty_prompt", "max_noise_level"):
        if name in index and index[name] != family.index.get(name):
            raise ValueError(f"a single file of {family.title} has no {name} = {index[name]}: write a folder")
    if contents.low_res is not None and _schedule(contents.low_res) != _schedule(family.low_res_scheduler or {}):
        raise ValueError(f"a single file of {family.title} has another augmentation of its input: write a folder")


def _check_same(family: Family, what: str, own: Any, read: Any, names: tuple[str, ...] | None = None) -> None:
    for name in names or [field.name for field in fields(own)]:
        if getattr(own, name) != getattr(read, name):
            raise ValueError(
                f"the {what} of a single file of {family.title} has {name} = {getattr(read, name)}, "
                f"not {getattr(own, name)}: write a folder"
            )


def _signature(family: Family) -> tuple[int, int, int, int]:
    """As a file's is recognised in `single_file_kinds`."""
    unet = family.unet
    vector, entries = (unet[name] or 0 for name in ("projection_class_embeddings_input_dim", "num_class_embeds"))
    return unet["in_channels"], unet["cross_attention_dim"], vector, entries

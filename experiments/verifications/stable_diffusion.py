"""Stable Diffusion 1, 2 and XL, also for inpainting, against diffusers: a single file or the folder of a pipeline.

    text encoder   the prompts and the negative prompt; SDXL's pooled vector
    U-Net          both branches of guidance at five noise levels
    autoencoder    the encoder on a synthetic image, the decoder on jaxdiff's latents
    pipeline       the image of a few steps, each implementation with its own text, latents and decoder

Networks read the same arrays, so that an error is that of the network alone. Networks for inpainting read a mask and
random latents under it; their pipeline samples an image of which everything is masked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.verifications import networks
from experiments.verifications.inputs import Inputs, entries, picture
from experiments.verifications.libraries import Libraries, freed, noise_from, to_images, to_numpy
from experiments.verifications.networks import Texts
from experiments.verifications.rows import Row, arrays, images
from jaxdiff.models.conditioner import SampleInputs
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.weights import latent_unet, stable_diffusion
from jaxdiff.weights.stable_diffusion import Reading, Source, directory_of

TEXT, UNET, VAE, PIPELINE = "text encoder", "U-Net", "autoencoder", "pipeline"


class _Ours(NamedTuple):
    """The results of jaxdiff. given: the input of the U-Net beside x, in both branches. sampled: the latents."""

    model: DiffusionModel
    guidance: float
    given: Conditioning
    x: np.ndarray
    outputs: list[np.ndarray]
    sampled: np.ndarray
    image: np.ndarray
    decoded: np.ndarray
    encoded: np.ndarray


class _TheirTexts(NamedTuple):
    prompts: Any
    negative: Any
    pooled: Any = None
    negative_pooled: Any = None


class _Theirs(NamedTuple):
    outputs: list[np.ndarray]
    image: np.ndarray
    decoded: np.ndarray
    encoded: np.ndarray


def compare(places: Sequence[str | Path], inputs: Inputs, libraries: Libraries) -> Iterator[Row]:
    """The rows of one model. ValueError for an unsupported model or size, before weights are read."""
    (place,) = places
    reading = Reading(inputs.dtype, inputs.variant)
    source = stable_diffusion.open_source(_local(place, inputs), reading)
    _check(source, inputs)
    texts = freed(_our_texts, source, reading, inputs)
    their_texts = freed(_their_texts, source, inputs, libraries)
    yield from _text_rows(texts, their_texts, inputs)
    ours = freed(_ours, source, reading, inputs, texts)
    theirs = freed(_theirs, source, inputs, libraries, ours, their_texts)
    for entry, a, b in zip(entries(ours.model.schedule), ours.outputs, theirs.outputs):
        yield arrays(UNET, f"step {entry}", a, b, inputs.limits)
    yield arrays(VAE, "encoder", ours.encoded, theirs.encoded, inputs.limits)
    yield arrays(VAE, "decoder", ours.decoded, theirs.decoded, inputs.limits)
    yield images(PIPELINE, f"{inputs.steps} steps", ours.image, theirs.image, inputs.limits)


def _local(place: str | Path, inputs: Inputs) -> Path:
    """The file or folder; of a hub id, the folder of what is downloaded."""
    return Path(place) if Path(place).exists() else directory_of(place, inputs.variant)


def _check(source: Source, inputs: Inputs) -> None:
    """ValueError for models that do not sample from text, and for sizes that are no multiples of the strides."""
    unet = source.component("unet")
    network = latent_unet.read_config(unet.settings, unet.where).unet
    if network.level_entries or source.index.get("requires_aesthetics_score"):
        title = "×4 upscaler" if network.level_entries else "refiner"
        raise ValueError(f"{source.path}: the {title} is not compared, only models that sample from text")
    stride = 8 * network.stride
    for side in inputs.size or ():
        if side < stride or side % stride:
            raise ValueError(f"--size: {side} pixels are not a multiple of {stride}, which this model needs")


def _our_texts(source: Source, reading: Reading, inputs: Inputs) -> Texts:
    return networks.embedded(stable_diffusion.load_text(source, reading), inputs)


def _their_texts(source: Source, inputs: Inputs, libraries: Libraries) -> _TheirTexts:
    """By the tokenizers and text encoders of transformers, put together by diffusers' pipeline."""
    names = [name for name in source.components if name.startswith("text_encoder")]
    given = {name: _text_encoder(source, name, inputs, libraries) for name in names}
    given |= {name.replace("text_encoder", "tokenizer"): source.tokenizers[name] for name in names}
    pipeline = _pipeline(libraries, source, "", **given)
    arguments = {"prompt": list(inputs.prompts), "device": "cpu", "num_images_per_prompt": 1}
    arguments |= {"do_classifier_free_guidance": True, "negative_prompt": None}
    if inputs.negative.strip():
        arguments["negative_prompt"] = [inputs.negative] * len(inputs.prompts)
    with libraries.torch.inference_mode():
        return _TheirTexts(*pipeline.encode_prompt(**arguments))


def _text_rows(ours: Texts, theirs: _TheirTexts, inputs: Inputs) -> Iterator[Row]:
    yield arrays(TEXT, "prompt", ours.prompts.tokens, to_numpy(theirs.prompts), inputs.limits)
    if theirs.negative.any():  # SDXL's null text is zeros, not the empty caption
        yield arrays(TEXT, "negative prompt", ours.negative.tokens, to_numpy(theirs.negative), inputs.limits)
    if theirs.pooled is not None:
        yield arrays(TEXT, "pooled", ours.prompts.pooled, to_numpy(theirs.pooled), inputs.limits)


def _ours(source: Source, reading: Reading, inputs: Inputs, texts: Texts) -> _Ours:
    """The U-Net is freed before the autoencoder is loaded."""
    stage, given, x, outputs, sampled = freed(_our_latents, source, reading, inputs, texts)
    box = stable_diffusion.load_autoencoder(source, stage.model, reading)
    pixels = tuple(side * box.factor for side in sampled.shape[1:3])
    return _Ours(
        stage.model,
        stage.sampling.guidance.weight,
        given,
        np.asarray(x),
        outputs,
        sampled,
        np.asarray(box.decode(jnp.asarray(sampled), SampleRequest(inputs.keys(1), pixels))),
        np.asarray(box.decoded(jnp.asarray(sampled))),
        np.asarray(box.encode(jnp.asarray(picture(*pixels)))),
    )


def _our_latents(source: Source, reading: Reading, inputs: Inputs, texts: Texts) -> tuple:
    """The model without its parameters, the inputs of its network, and what it computed."""
    trained = stable_diffusion.load_generator(source, reading)
    trained = replace(trained, sampling=replace(trained.sampling, steps=inputs.steps))
    model, keys = trained.model, inputs.keys(0)
    size = (model.side, model.side) if inputs.size is None else tuple(side // 8 for side in inputs.size)
    text, negative = texts.of(trained, inputs)
    x = inputs.start(0, size, model.product.channels)
    mask = masked = None
    if trained.reads_mask:
        mask = jnp.zeros((*x.shape[:3], 1)).at[:, size[0] // 4 :, : size[1] // 2].set(1.0)
        masked = (1.0 - mask) * inputs.on_low_res(0, size, model.product.channels)
    given = networks.conditioning(model, SampleInputs(text, negative, mask=mask, masked=masked), keys, size)
    outputs = networks.outputs(trained, x, given)
    sampled = np.asarray(trained.generate(SampleRequest(keys, size, text, negative)))
    return replace(trained, params={}), given, x, outputs, sampled


def _theirs(source: Source, inputs: Inputs, libraries: Libraries, ours: _Ours, texts: _TheirTexts) -> _Theirs:
    unet = _network(source, "unet", libraries.diffusers.UNet2DConditionModel, inputs, libraries)
    vae = _network(source, "vae", libraries.diffusers.AutoencoderKL, inputs, libraries)
    scale = vae.config.scaling_factor
    height, width = (side * 8 for side in ours.sampled.shape[1:3])
    with libraries.torch.inference_mode():
        outputs = _their_outputs(unet, libraries, ours, (height, width))
        encoded = scale * to_images(vae.encode(libraries.images(picture(height, width))).latent_dist.mode())
        decoded = to_images(vae.decode(libraries.images(ours.sampled) / scale).sample)
        sampled = _their_latents(source, inputs, libraries, ours, texts, unet, vae)
        image = to_images(vae.decode(sampled / scale).sample).clip(-1, 1)
    return _Theirs(outputs, image, decoded, encoded)


def _their_outputs(unet: Any, libraries: Libraries, ours: _Ours, size: tuple[int, int]) -> list[np.ndarray]:
    given, x = ours.given, np.concatenate([ours.x, ours.x])
    x = libraries.images(x if given.concat is None else np.concatenate([x, given.concat], -1))
    arguments = {"encoder_hidden_states": libraries.tensor(given.tokens)}
    if given.vector is not None:
        frequencies = unet.config.addition_time_embed_dim
        pooled = np.asarray(given.vector)[:, : -6 * frequencies]
        sizes = np.tile(np.asarray([*size, 0, 0, *size], np.float32), (len(pooled), 1))
        both = {"text_embeds": libraries.tensor(pooled), "time_ids": libraries.tensor(sizes)}
        arguments["added_cond_kwargs"] = both
    return [to_images(unet(x, entry, **arguments).sample) for entry in entries(ours.model.schedule)]


def _their_latents(
    source: Source, inputs: Inputs, libraries: Libraries, ours: _Ours, texts: _TheirTexts, unet: Any, vae: Any
) -> Any:
    settings, _ = source.schedulers["scheduler"]
    scheduler = getattr(libraries.diffusers, settings["_class_name"]).from_config(settings)
    masked = ours.given.concat is not None
    pipeline = _pipeline(libraries, source, "Inpaint" if masked else "", unet=unet, vae=vae, scheduler=scheduler)
    height, width = (side * 8 for side in ours.sampled.shape[1:3])
    arguments = {"prompt_embeds": texts.prompts, "negative_prompt_embeds": texts.negative}
    if texts.pooled is not None:
        arguments |= {"pooled_prompt_embeds": texts.pooled, "negative_pooled_prompt_embeds": texts.negative_pooled}
    if masked:
        zeros = libraries.torch.zeros
        arguments |= {"image": zeros(1, 3, height, width), "mask_image": zeros(1, 1, height, width) + 1}
        arguments |= {"masked_image_latents": libraries.images(np.zeros_like(ours.sampled)), "strength": 1.0}
    size = ours.sampled.shape[1:3]
    steps = inputs.of_steps(0, size, ours.sampled.shape[3])
    with noise_from(libraries, {pipeline.scheduler: steps}):
        return pipeline(
            **arguments,
            height=height,
            width=width,
            num_inference_steps=inputs.steps,
            guidance_scale=ours.guidance,
            latents=libraries.images(ours.x),
            output_type="latent",
        ).images


def _pipeline(libraries: Libraries, source: Source, kind: str, **components: Any) -> Any:
    """diffusers' pipeline of the given components. kind: "" or "Inpaint"."""
    names = ["text_encoder", "tokenizer", "unet", "vae", "scheduler"]
    xl = "text_encoder_2" in source.components
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if xl:
        zeros = source.index.get("force_zeros_for_empty_prompt", True)
        names += ["text_encoder_2", "tokenizer_2"]
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    made = getattr(libraries.diffusers, f"StableDiffusion{'XL' * xl}{kind}Pipeline")
    pipeline = made(**dict.fromkeys(names) | components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_encoder(source: Source, name: str, inputs: Inputs, libraries: Libraries) -> Any:
    component, transformers = source.component(name), libraries.transformers
    kind = (component.settings.get("architectures") or ["CLIPTextModel"])[0]
    if source.path.is_dir():
        return libraries.loaded(getattr(transformers, kind), source.path / name, inputs.variant)
    network = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(dict(component.settings)))
    return libraries.filled(network, component.tensors, str(component.where))


def _network(source: Source, name: str, kind: Any, inputs: Inputs, libraries: Libraries) -> Any:
    if source.path.is_dir():
        return libraries.loaded(kind, source.path / name, inputs.variant)
    component = source.component(name)
    with libraries.torch.device("meta"):  # no time is spent on initial values
        network = kind.from_config(dict(component.settings))
    return libraries.filled(network.to_empty(device="cpu"), component.tensors, str(component.where))

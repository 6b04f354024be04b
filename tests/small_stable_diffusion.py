"""Stable Diffusion of the published topologies and very small: diffusers' pipelines of random weights, and the same
noise for them as for ours."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import INPUT, After, Pipeline, SampleOptions
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.weights import hub, schedulers, stable_diffusion

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*attends):
    """The types of the blocks, levels from the first."""
    each = [CROSS if attend else PLAIN for attend in attends]
    return {"down_block_types": [b[0] for b in each], "up_block_types": [b[1] for b in each[::-1]]}


PUBLIC = {
    "SD 1": {"sample_size": 64, "cross_attention_dim": 768},
    "SD 1 inpainting": {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9},
    "SD 2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "SDXL": {
        **blocks(False, True, True),
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXL refiner": {
        **blocks(False, True, True, False),
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
    "upscaler": {
        **blocks(False, True, True, True),
        "in_channels": 7,
        "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024,
        "only_cross_attention": [True, True, True, False],
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
    "stable unCLIP": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
}
"""The public configurations of U-Nets, without the settings that have diffusers' defaults."""


def torch_unet(config, device="cpu"):
    """diffusers' network; random parameters none of which is 0."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' network")
    diffusers = pytest.importorskip("diffusers")
    with torch.device(device):
        network = diffusers.UNet2DConditionModel(**config).eval()
    if device == "cpu":
        drawn(network)
    return network


def drawn(network, head=1.0):
    """Random parameters, none of them 0, in place. head: factor of those of a U-Net's last layer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        scale = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
        scale *= head if name.startswith("conv_out") else 1.0
        value.data = torch.randn(value.shape, generator=generator) * scale
        value.data += value.ndim == 1 and name.endswith("weight")
    return network


TEXT = 32
"""Width of the small text encoders; SDXL has two of them."""
SMALL = {
    "SD 1": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": TEXT},
    "SD 2": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [1, 2, 4, 4], "cross_attention_dim": TEXT},
    "SDXL": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 2 * TEXT,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": TEXT + 6 * 16,
    },
    "upscaler": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": TEXT},
}
"""Settings that differ from the public ones."""
ONE_LEVEL = {
    **blocks(True),
    "block_out_channels": [32],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "only_cross_attention": False,
}
"""For all that does not depend on the levels: cheap to compile."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
USUAL = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {**USUAL, "clip_sample": False, "set_alpha_to_one": False}),
    "PLMS": ("PNDMScheduler", {**USUAL, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "Euler": ("EulerDiscreteScheduler", USUAL),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", USUAL),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", USUAL),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**USUAL, "use_karras_sigmas": True}),
}


def scheduler(name, **change):
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind)(**settings | change)


SINGLE_FILE = {
    "SD 1": {"cross_attention_dim": 768},
    "SD 2": {"cross_attention_dim": 1024, "attention_head_dim": 1},
    "SDXL": {
        "cross_attention_dim": 2048,
        "attention_head_dim": 1,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "upscaler": {"cross_attention_dim": 1024},
}
"""For single files, whose families are recognised by the sizes of the text and the added vector."""
OPEN_CLIP = ("SD 2", "upscaler")


def torch_pipeline(family, kind="StableDiffusionPipeline", sampler="DDIM", *, single=False, **change):
    """diffusers' pipeline of a family of `SMALL`, in the class `kind`.

    single: with the public sizes of the text and depth of the autoencoder, as a single file needs them. change: of the
    settings of its U-Net.
    """
    pytest.importorskip("torch", reason="compared with diffusers' pipelines")
    diffusers = pytest.importorskip("diffusers")

    config = PUBLIC[family] | SMALL[family] | {"sample_size": 8} | (SINGLE_FILE[family] if single else {})
    unet = drawn(diffusers.UNet2DConditionModel(**config | change).eval(), head=0.3)
    activation, padding = ("gelu", Padding.EXCLAMATION) if family in OPEN_CLIP else ("quick_gelu", Padding.END)
    width = config["cross_attention_dim"] if family != "SDXL" else 768 if single else TEXT
    betas = {"beta_start": 0.0001, "beta_end": 0.02} if family == "upscaler" else {}
    components = {
        "unet": unet,
        "vae": torch_autoencoder(family, single),
        "scheduler": scheduler(sampler, prediction_type="v_prediction" if family in OPEN_CLIP else "epsilon", **betas),
        "tokenizer": clip_tokenizer(padding),
        "text_encoder": torch_text(activation, width),
    }
    if family == "SDXL":
        second = 1280 if single else TEXT
        components |= {"text_encoder_2": torch_text("gelu", second, second)}
        components |= {"tokenizer_2": clip_tokenizer(Padding.EXCLAMATION)}
    else:
        components |= {"safety_checker": None, "feature_extractor": None}
    if family == "upscaler":
        components |= {"low_res_scheduler": diffusers.DDPMScheduler(beta_schedule="scaled_linear", **betas)}
    return in_class(components, kind)


def in_class(components, kind, sampler=None):
    """diffusers' pipeline `kind` of components. sampler: another one, of `SCHEDULERS`."""
    import diffusers

    if sampler is not None:
        prediction = components["scheduler"].config["prediction_type"]
        components = components | {"scheduler": scheduler(sampler, prediction_type=prediction)}
    has_checker = "XL" not in kind and "Upscale" not in kind
    pipeline = getattr(diffusers, kind)(**components, **{"requires_safety_checker": False} if has_checker else {})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def torch_autoencoder(family="SD 1", single=False):
    """diffusers' autoencoder, with one block a level, or with two as the public ones."""
    import diffusers

    levels = 3 if family == "upscaler" else 4
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    sizes = {"block_out_channels": [32 if single else 8] * levels, "layers_per_block": 2 if single else 1}
    groups, scale = 32 if single else 4, 0.13025 if family == "SDXL" else 0.08333 if family == "upscaler" else 0.18215
    network = diffusers.AutoencoderKL(**kinds, **sizes, norm_num_groups=groups, sample_size=64, scaling_factor=scale)
    return drawn(network.eval())


def torch_text(activation, width=TEXT, projection=None):
    """transformers' text tower of two layers, with CLIP's full vocabulary."""
    import transformers

    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    heads = max(1, width // 64)
    settings = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
    settings |= {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    settings |= {"hidden_act": activation, "projection_dim": projection or 32, "pad_token_id": 1}
    return drawn(getattr(transformers, kind)(transformers.CLIPTextConfig(**settings)).eval())


def sampled_as(ours, theirs, steps):
    """Our pipeline with the scheduler of diffusers' and a number of steps."""
    config = {**theirs.scheduler.config, "_class_name": type(theirs.scheduler).__name__}
    read = schedulers.from_values(Path("scheduler_config.json"), config)
    generator = ours.generator
    model = replace(generator.model, schedule=read.schedule, prediction=read.prediction)
    sampling = replace(generator.sampling, steps=steps, **read.sampling)
    return replace(ours, generator=replace(generator, model=model, sampling=sampling))


def keys_of(count, seed=0, box=0):
    """The keys of a box for the samples of a seed."""
    return noise.fold(noise.sample_keys(jax.random.key(seed), jnp.arange(count)), box)


def to_torch(array):
    """NHWC to PyTorch's NCHW."""
    import torch

    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(array, np.float32), -1, 1)))


def feed(monkeypatch, pipeline, keys, first=0):
    """Makes diffusers' pipeline draw our noise, and encode images to the mean.

    first: number of the first step that is run.
    """
    import diffusers

    numbers = itertools.count(first)

    def noise_of(keys, shape):
        return to_torch(noise.normal_like(keys, (*shape[2:], shape[1])))

    def start(shape, **_):
        image = shape[1] == 3  # of the upscaler: the noise on the image
        return noise_of(noise.fold(keys, 2 if image else 0), shape)

    def step(shape, **_):
        return noise_of(noise.fold(noise.fold(keys, 1), next(numbers)), shape)

    for owner, function in ((pipeline, start), (pipeline.scheduler, step)):
        monkeypatch.setattr(f"{type(owner).__module__}.randn_tensor", function, raising=False)
    mode = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(mode, "sample", lambda self, generator=None: self.mode())


def difference(image, wanted) -> float:
    """Mean absolute difference of images in 1/255 of their range; `image` in [-1, 1], `wanted` in [0, 1]."""
    assert image.shape == wanted.shape
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.02 and wanted.std() > 0.05, "an image with nothing in it"
    return float(np.abs((np.asarray(image) + 1) / 2 - wanted).mean()) * 255


PROMPT, NEGATIVE, COUNT, STEPS = "a red cat!", "ugly, low quality", 2, 5
HEIGHT, WIDTH = 64, 128
LATENTS = HEIGHT // 8, WIDTH // 8
_RNG = np.random.default_rng(0)
IMAGE = _RNG.normal(size=(HEIGHT, WIDTH, 3)) * 0.3 + np.linspace(-0.8, 0.8, WIDTH)[:, None]
IMAGE = np.clip(IMAGE, -1, 1).astype("f4")
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[5:43, 20:93] = True  # edges that are no multiples of the stride
SMALL_IMAGES = np.stack([IMAGE, IMAGE[::-1]])[:, 24:40:2, ::8]
CLOSE = 0.01
"""Mean absolute difference of images, in 1/255 of their range."""


@dataclass(frozen=True)
class Pair:
    """diffusers' pipeline, and ours of the folder that it wrote."""

    theirs: Any
    folder: Path
    ours: Pipeline

    def in_class(self, kind, sampler=None):
        """The same networks in another class of diffusers, and ours with the same scheduler; few steps."""
        theirs = in_class(self.theirs.components, kind, sampler)
        return theirs, sampled_as(self.ours, theirs, STEPS)


def pair(folder, family, kind="StableDiffusionPipeline", **change):
    theirs = torch_pipeline(family, kind, **change)
    theirs.save_pretrained(folder)
    return Pair(theirs, folder, stable_diffusion.load(folder))


def tensors_of(folder):
    """The unread tensors of a folder's networks."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: hub.open_tensors(folder / name) for name in names if (folder / name).is_dir()}


def options(**given):
    return SampleOptions(per_prompt=COUNT, size=LATENTS, **given)


def compare(monkeypatch, theirs, ours, init=None, *, negative=NEGATIVE, **given):
    """One task, from the same noise. init: for image to image and inpainting; None: text to image."""
    images = ours.sample([PROMPT], options(init=init, negative=negative or ""))[-1]
    if init is None:
        given |= {"height": HEIGHT, "width": WIDTH}
    else:
        [strength] = init.strengths
        given |= {"strength": strength, "image": (init.image + 1) / 2}
        if init.mask is not None:
            given |= {"mask_image": init.mask.astype("f4"), "height": HEIGHT, "width": WIDTH}
    feed(monkeypatch, theirs, keys_of(COUNT), STEPS - int(STEPS * given.get("strength", 1.0)))
    given |= {"num_images_per_prompt": COUNT, "num_inference_steps": STEPS, "output_type": "np"}
    given["guidance_scale"] = ours.generator.sampling.guidance.weight
    check(images, theirs(PROMPT, negative_prompt=negative, **given).images, theirs)


def compare_upscaling(monkeypatch, theirs, ours):
    """From two images."""
    start = After(INPUT, SMALL_IMAGES)
    images = ours.sample([PROMPT], SampleOptions(per_prompt=COUNT, after=start, negative=NEGATIVE))[-1]
    feed(monkeypatch, theirs, keys_of(COUNT))
    settings = {"num_inference_steps": STEPS, "guidance_scale": 9.0, "noise_level": 20, "output_type": "np"}
    prompts = {"prompt": [PROMPT] * COUNT, "negative_prompt": [NEGATIVE] * COUNT}
    wanted = theirs(image=(SMALL_IMAGES + 1) / 2, **prompts, **settings).images
    check(images, wanted, theirs)


def check(images, wanted, theirs):
    found = difference(images, wanted)
    print(f"{type(theirs).__name__}, {type(theirs.scheduler).__name__}: {found:.1e} of 255")
    assert found < CLOSE


def image_to_image(strength):
    return InitImage(IMAGE, (strength,))


def inpainting(strength):
    return InitImage(IMAGE, (strength,), MASK)

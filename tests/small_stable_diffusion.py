"""Stable Diffusion of the published topologies and very small: diffusers' pipelines of random weights, and the same
noise for them as for ours."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer

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
TWO_LEVELS = {
    **blocks(True, False),
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
SMALL = {
    "SD 1": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": TEXT},
    "SD 2": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [1, 2, 4, 4], "cross_attention_dim": TEXT},
    "SDXL": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 2 * TEXT,
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": TEXT + 6 * 16,
    },
    "upscaler": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": TEXT},
    "two levels": {**TWO_LEVELS, "cross_attention_dim": TEXT},
}
"""Settings that differ from the public ones."""
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
    return getattr(diffusers, kind)(**settings, **change)


def torch_pipeline(family, kind="StableDiffusionPipeline", sampler="DDIM", **change):
    """diffusers' pipeline of a family of `SMALL`, in the class `kind`. change: of the settings of its U-Net."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' pipelines")
    diffusers = pytest.importorskip("diffusers")

    torch.manual_seed(0)
    config = {"sample_size": 8} | PUBLIC.get(family, {}) | SMALL[family] | {"sample_size": 8} | change
    unet = drawn(diffusers.UNet2DConditionModel(**config).eval(), head=0.3)
    levels = 3 if family == "upscaler" else 4
    prediction = "v_prediction" if family in ("SD 2", "upscaler") else "epsilon"
    components = {
        "unet": unet,
        "vae": torch_autoencoder(levels, 0.13025 if family == "SDXL" else 0.18215),
        "scheduler": scheduler(sampler, prediction_type=prediction),
        "tokenizer": clip_tokenizer(Padding.EXCLAMATION if family in ("SD 2", "upscaler") else Padding.END),
        "text_encoder": torch_text("gelu" if family in ("SD 2", "upscaler") else "quick_gelu"),
    }
    if family == "SDXL":
        components |= {"text_encoder_2": torch_text("gelu", TEXT)}
        components |= {"tokenizer_2": clip_tokenizer(Padding.EXCLAMATION)}
    else:
        components |= {"safety_checker": None, "feature_extractor": None}
    if family == "upscaler":
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
        components |= {"low_res_scheduler": diffusers.DDPMScheduler(**betas)}
    elif family != "SDXL":
        components |= {"requires_safety_checker": False}
    pipeline = getattr(diffusers, kind)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def torch_autoencoder(levels=4, scale=0.18215, width=8, groups=4):
    """diffusers' autoencoder, with one block a level."""
    import diffusers

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    widths = {"block_out_channels": [width] * levels, "norm_num_groups": groups, "sample_size": 64}
    network = diffusers.AutoencoderKL(**kinds, **widths, layers_per_block=1, scaling_factor=scale)
    return drawn(network.eval())


def torch_text(activation, projection=None, width=TEXT, layers=3):
    """transformers' text tower, with CLIP's full vocabulary."""
    import transformers

    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    settings = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    settings |= {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    settings |= {"hidden_act": activation, "projection_dim": projection or 32, "pad_token_id": 1}
    network = getattr(transformers, kind)(transformers.CLIPTextConfig(**settings)).eval()
    for parameter in network.parameters():
        parameter.data *= 3.0  # else all captions are embedded almost alike
    return network


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


def difference(image, wanted):
    """Mean absolute difference of images in 1/255 of their range; `image` in [-1, 1], `wanted` in [0, 1]."""
    assert image.shape == wanted.shape
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.02 and wanted.std() > 0.05, "an image with nothing in it"
    return np.abs((np.asarray(image) + 1) / 2 - wanted).mean() * 255

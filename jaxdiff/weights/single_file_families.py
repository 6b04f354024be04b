"""The families of Stable Diffusion as data: what their public repositories say, so that nothing is downloaded.

A `Family` has the configurations of the components in the layout of diffusers and transformers (the content of
config.json), and of the scheduler. Sources: arXiv 2112.10752, 2307.01952; Stability's and CompVis' public
configurations. The dicts are read, never changed.
"""

import enum
from dataclasses import dataclass, replace
from typing import Any

from jaxdiff.diffusion.parameterization import Prediction

Config = dict[str, Any]


class TextLayout(enum.Enum):
    """The names of a text encoder's tensors in a single file."""

    TRANSFORMERS = "transformers"
    OPEN_CLIP = "open_clip"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family.

    prefix: of its tensors in a single file. drop_last: the file has one layer more than is used (the states before
    the last layer are read). pad: the token that fills the prompt.
    """

    config: Config
    prefix: str
    layout: TextLayout
    drop_last: bool = False
    pad: str = "<|endoftext|>"

    @property
    def projected(self) -> bool:
        return self.config["architectures"] == ["CLIPTextModelWithProjection"]


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models with the same components. A file's is one of `FAMILIES`, or a copy with another scheduler:
    `architecture` tells which.

    title: for messages. architecture: its name in the metadata "modelspec.architecture". text_encoders: by the names of
    diffusers' folders. index: settings of model_index.json. image_size: side of the training images in pixels.
    low_res_scheduler: of the noise added to the image to be enlarged.
    """

    title: str
    architecture: str
    unet: Config
    vae: Config
    text_encoders: dict[str, TextEncoder]
    scheduler: Config
    index: Config
    image_size: int
    low_res_scheduler: Config | None = None

    @property
    def prediction(self) -> Prediction:
        return PREDICTIONS[self.scheduler["prediction_type"]]

    def with_prediction(self, prediction: Prediction) -> "Family":
        """The same family for a model that was trained with another target. ValueError unless ε or v."""
        names = {value: name for name, value in PREDICTIONS.items()}
        if prediction not in names:
            raise ValueError(f"the prediction of {self.title} is Prediction.EPSILON or Prediction.V, not {prediction}")
        return replace(self, scheduler=self.scheduler | {"prediction_type": names[prediction]})


PREDICTIONS = {"epsilon": Prediction.EPSILON, "v_prediction": Prediction.V}
"""By diffusers' names."""

_DOWN, _CROSS_DOWN, _UP, _CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,  # the number of heads: an old misnomer that diffusers keeps
    "use_linear_projection": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
}
_UNET_2 = _UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_UNET_XL = _UNET | {
    "sample_size": 128,
    "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 of the text and 6 numbers of 256
}
_UNET_REFINER = _UNET_XL | {
    "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _UP],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "projection_class_embeddings_input_dim": 2560,  # 1280 and 5 numbers of 256
}
_UNET_X4 = _UNET_2 | {
    "sample_size": 128,
    "in_channels": 7,  # 4 latent channels and the noised image
    "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, _CROSS_UP, _UP],
    "block_out_channels": [256, 512, 512, 1024],
    "only_cross_attention": [True, True, True, False],
    "attention_head_dim": 8,
    "num_class_embeds": 1000,  # the noise level of the image
}
_INPAINTING = {"in_channels": 9}  # latents, mask, latents of the masked image

_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_VAE_XL = _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_VAE_X4 = _VAE | {
    "sample_size": 256,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 512],
    "scaling_factor": 0.08333,
}

_CLIP_L: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # wrong, and kept: it means the largest id, the first end token
    "pad_token_id": 1,
}
_OPEN_CLIP_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_G = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_TEXT_1 = {"text_encoder": TextEncoder(_CLIP_L, "cond_stage_model.transformer.", TextLayout.TRANSFORMERS)}
_TEXT_2 = {
    "text_encoder": TextEncoder(_OPEN_CLIP_H, "cond_stage_model.model.", TextLayout.OPEN_CLIP, drop_last=True, pad="!")
}
_TEXT_XL = {
    "text_encoder": TextEncoder(_CLIP_L, "conditioner.embedders.0.transformer.", TextLayout.TRANSFORMERS),
    "text_encoder_2": TextEncoder(_OPEN_CLIP_G, "conditioner.embedders.1.model.", TextLayout.OPEN_CLIP, pad="!"),
}
_TEXT_REFINER = {
    "text_encoder_2": TextEncoder(_OPEN_CLIP_G, "conditioner.embedders.0.model.", TextLayout.OPEN_CLIP, pad="!")
}

_PNDM: Config = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
_DDIM_V = _PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
_EULER = _PNDM | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "use_karras_sigmas": False,
}
_X4_BETAS = {"beta_start": 0.0001, "beta_end": 0.02}
_LOW_RES = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    **_X4_BETAS,
}

_XL_INDEX = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}

SD_1 = Family(
    "Stable Diffusion 1",
    "stable-diffusion-v1",
    _UNET,
    _VAE,
    _TEXT_1,
    _PNDM,
    {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    512,
)
SD_1_INPAINTING = replace(
    SD_1,
    title="Stable Diffusion 1 for inpainting",
    architecture="stable-diffusion-v1-inpainting",
    unet=_UNET | _INPAINTING,
    index=SD_1.index | {"_class_name": "StableDiffusionInpaintPipeline"},
)
SD_2_V = Family(
    "Stable Diffusion 2 at 768 pixels",
    "stable-diffusion-v2-768-v",
    _UNET_2 | {"sample_size": 96, "upcast_attention": True},
    _VAE | {"sample_size": 768},
    _TEXT_2,
    _DDIM_V,
    SD_1.index,
    768,
)
SD_2_BASE = replace(
    SD_2_V,
    title="Stable Diffusion 2 at 512 pixels",
    architecture="stable-diffusion-v2-512",
    unet=_UNET_2,
    vae=_VAE,
    scheduler=_PNDM,
    image_size=512,
)
SD_2_INPAINTING = replace(
    SD_2_BASE,
    title="Stable Diffusion 2 for inpainting",
    architecture="stable-diffusion-v2-inpainting",
    unet=_UNET_2 | _INPAINTING,
    index=SD_1_INPAINTING.index,
)
X4_UPSCALER = Family(
    "the x4 upscaler of Stable Diffusion 2",
    "stable-diffusion-x4-upscaler",
    _UNET_X4,
    _VAE_X4,
    _TEXT_2,
    _DDIM_V | _X4_BETAS,
    {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350},
    512,
    _LOW_RES,
)
SDXL = Family(
    "Stable Diffusion XL",
    "stable-diffusion-xl-v1-base",
    _UNET_XL,
    _VAE_XL,
    _TEXT_XL,
    _EULER,
    _XL_INDEX,
    1024,
)
SDXL_INPAINTING = replace(
    SDXL,
    title="Stable Diffusion XL for inpainting",
    architecture="stable-diffusion-xl-v1-inpainting",
    unet=_UNET_XL | _INPAINTING,
    index=_XL_INDEX | {"_class_name": "StableDiffusionXLInpaintPipeline"},
)
SDXL_REFINER = replace(
    SDXL,
    title="the refiner of Stable Diffusion XL",
    architecture="stable-diffusion-xl-v1-refiner",
    unet=_UNET_REFINER,
    text_encoders=_TEXT_REFINER,
    index=_XL_INDEX
    | {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
    },
)

FAMILIES = (
    SD_1,
    SD_1_INPAINTING,
    SD_2_V,
    SD_2_BASE,
    SD_2_INPAINTING,
    X4_UPSCALER,
    SDXL,
    SDXL_INPAINTING,
    SDXL_REFINER,
)
"""Of two that only differ in the prediction, the first is the one of a file that does not say."""


def controlnet(family: Family) -> Config:
    """The config.json of a ControlNetModel for `family`: its U-Net's encoder and middle (arXiv 2302.05543)."""
    shared = (
        *("flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention"),
        *("block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn"),
        *("norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"),
        *("use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim"),
        *("num_class_embeds", "upcast_attention", "resnet_time_scale_shift", "projection_class_embeddings_input_dim"),
    )
    return {
        "_class_name": "ControlNetModel",
        "in_channels": 4,
        "conditioning_channels": 3,
        **{name: family.unet[name] for name in shared},
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    }

"""Very small public models with random parameters, as diffusers and transformers write them."""

import pytest

from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.weights import lazy
from jaxdiff.weights.single_file import save
from jaxdiff.weights.single_file_families import SD_1

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
WIDTH = 16
"""Of a text encoder; Stable Diffusion XL has two."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(network, head=1.0):
    """Random parameters, none of them 0, in place. head: factor of those of a U-Net's last layer: a network that says
    more than there is noise makes an image's every rounding error grow with each step."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        scale = 0.1 if value.ndim < 2 else value[0].numel() ** -0.5
        scale *= head if name.startswith("conv_out") else 1.0
        value.data = torch.randn(value.shape, generator=generator) * scale
        value.data += value.ndim == 1 and name.endswith("weight")
    return network.eval()


def unet(xl=False, **change):
    """Two levels with one block each."""
    import diffusers

    settings = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": [CROSS[0], PLAIN[0]],
        "up_block_types": [PLAIN[1], CROSS[1]],
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    if xl:
        settings |= {"cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time"}
        settings |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8}
    return drawn(diffusers.UNet2DConditionModel(**settings | change), head=0.3)


def autoencoder(scale=0.18215, layers=1, width=8):
    import diffusers

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": [width] * 4, "norm_num_groups": 4 if width < 32 else 32, "sample_size": 64}
    return drawn(diffusers.AutoencoderKL(**kinds, **widths, layers_per_block=layers, scaling_factor=scale))


def text_encoder(projection=None):
    import transformers

    settings = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": projection or WIDTH}
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return drawn(getattr(transformers, kind)(transformers.CLIPTextConfig(**settings)))


def stable_diffusion(folder, *, xl=False, kind="", **change):
    """Writes a pipeline's folder. change: of the settings of its U-Net."""
    pytest.importorskip("torch", reason="diffusers' pipelines are PyTorch's")
    import diffusers

    components = {
        "unet": unet(xl, **change),
        "vae": autoencoder(0.13025 if xl else 0.18215),
        "text_encoder": text_encoder(),
        "tokenizer": clip_tokenizer(),
    }
    if xl:
        components |= {
            "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
        }
        components |= {"text_encoder_2": text_encoder(WIDTH), "tokenizer_2": clip_tokenizer(Padding.EXCLAMATION)}
    else:
        plms = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
        components |= {"scheduler": diffusers.PNDMScheduler(**BETAS, **plms)}
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    name = f"StableDiffusion{'XL' * xl}{kind}Pipeline"
    getattr(diffusers, name)(**components).save_pretrained(folder)


def clip(folder, kind="CLIPModel"):
    """Writes a CLIP, without a tokenizer: both towers, or the class of one."""
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 12, "eos_token_id": 99, "bos_token_id": 98}
    text, image = {**text, "pad_token_id": 1, "projection_dim": 8}, {**sizes, "image_size": 28, "patch_size": 7}
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    elif "Text" in kind:
        config = transformers.CLIPTextConfig(**text)
    else:
        config = transformers.CLIPVisionConfig(**image, projection_dim=8)
    torch.manual_seed(0)
    drawn(getattr(transformers, kind)(config)).save_pretrained(folder)


def t5(folder, decodes=True):
    """Writes a T5 of the second generation, without a tokenizer."""
    pytest.importorskip("torch", reason="transformers' T5 is PyTorch's")
    import transformers

    settings = {"vocab_size": 90, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2}
    settings |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    kind = transformers.T5ForConditionalGeneration if decodes else transformers.T5EncoderModel
    drawn(kind(transformers.T5Config(**settings))).save_pretrained(folder)


def single_file(path, width=WIDTH):
    """Writes a single file of Stable Diffusion 1, of its depth, and returns diffusers' networks of it. width: of the
    text encoder; 768 to be sampled from."""
    pytest.importorskip("torch", reason="compared with diffusers' networks")
    import transformers

    four = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 2, "attention_head_dim": 8}
    kinds = {"down_block_types": [CROSS[0]] * 3 + [PLAIN[0]], "up_block_types": [PLAIN[1]] + [CROSS[1]] * 3}
    settings = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": max(1, width // 64), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    networks = {
        "unet": unet(**four, **kinds, cross_attention_dim=768),
        "vae": autoencoder(layers=2, width=32),
        "text_encoder": drawn(transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings))),
    }
    components = {
        name: {key: lazy.held(value.numpy()) for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }
    save(path, components, SD_1)
    return networks

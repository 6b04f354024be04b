"""CLIP in the transformers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Reads OpenAI's models and OpenCLIP's that were saved as transformers' CLIPModel, both towers with their projections.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.weights import hub, tree

UNUSED = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
"""0, 1, 2, …: in files of older versions of transformers."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels in [0, 1], of the pictures that every published model was trained with."""


def load(path_or_id: str | Path, dtype: str = "float32", *, place: hub.Place = jnp.asarray) -> tuple[CLIPConfig, dict]:
    """Configuration and parameters of a directory or hub id; floating leaves in `dtype`, "float32" or "bfloat16".

    Tensors are read one at a time and handed to `place`, which puts them on devices. Raises FileNotFoundError, or
    ValueError that names the setting or the tensors at fault.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    directory = hub.directory_of(path_or_id, "CLIP")
    config = read_config(directory / "config.json", dtype)
    shapes = _shapes(config)
    with ExitStack() as stack:
        tensors = hub.open_tensors(directory, stack)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in UNUSED}
        return config, hub.load_params(tensors, shapes, hub_names(shapes), dtype, place, str(directory))


def export(config: CLIPConfig, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors as transformers' CLIPModel opens.

    ValueError where `params` does not fit `config`, OSError where something cannot be written; each file appears whole
    or not at all.
    """
    directory = Path(directory)
    tree.check_tree(params, _shapes(config), "the CLIP to export")
    hub.write_params(directory / "model.safetensors", params, hub_names(params), dtype)
    with tree.replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(_hub_config(config, dtype), indent=2) + "\n")


def normalised(image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """A picture in [-1, 1] as the image tower takes it."""
    return ((image + 1) / 2 - jnp.array(MEAN)) / jnp.array(STD)


def hub_names(params: dict) -> dict[str, str]:
    """transformers' name of each of our parameters, its path joined by "/"."""
    return hub.names(tree.flatten(params), RULES, WORDS)


RULES = (
    ("logit_scale", "logit_scale"),
    ("text/tokens/embedding", "text_model.embeddings.token_embedding.weight"),
    ("image/first", "vision_model.embeddings.class_embedding"),
    ("image/patches/kernel", "vision_model.embeddings.patch_embedding.weight"),
    ("image/first_norm/{leaf}", "vision_model.pre_layrnorm.{leaf}"),
    ("text/norm/{leaf}", "text_model.final_layer_norm.{leaf}"),
    ("image/norm/{leaf}", "vision_model.post_layernorm.{leaf}"),
    ("text/projection/kernel", "text_projection.weight"),
    ("image/projection/kernel", "visual_projection.weight"),
    ("{tower}/positions", "{tower}.embeddings.position_embedding.weight"),
    ("{tower}/block_{i}/{part}/{leaf}", "{tower}.encoder.layers.{i}.{part}.{leaf}"),
)
"""`pre_layrnorm` is misspelt in the published files."""
WORDS = {
    "text": "text_model",
    "image": "vision_model",
    "kernel": "weight",
    "scale": "weight",
    "attention_norm": "layer_norm1",
    "feed_forward_norm": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "wi": "mlp.fc1",
    "wo": "mlp.fc2",
}

TOWER = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
TEXT = TOWER | {"vocab": "vocab_size", "length": "max_position_embeddings"}
IMAGE = TOWER | {"resolution": "image_size", "patch": "patch_size"}
LARGEST_ID = 2
"""What the first published configurations give as the end's id; it is a mistake, and stands for the largest id."""


def read_config(path: Path, dtype: str = "float32") -> CLIPConfig:
    """The settings in a transformers config.json; what it leaves out is as in ViT-B/32.

    ValueError that names a setting that is not supported.
    """
    values = hub.read_json(path, "CLIP")
    hub.require(path, values, "model_type", ("clip",))
    text, image = (values.get(name) or {} for name in ("text_config", "vision_config"))
    if not isinstance(text, dict) or not isinstance(image, dict):
        raise ValueError(f"{path}: text_config and vision_config are not groups of settings")
    for tower in (text, image):
        hub.require(path, tower, "hidden_act", ("quick_gelu", "gelu"), "quick_gelu")
    hub.require(path, image, "num_channels", (3,), 3)
    eos_id = text.get("eos_token_id", 49407)
    if not isinstance(eos_id, int):
        raise ValueError(f"{path}: eos_token_id = {eos_id!r} is not supported, only one id")
    try:
        return CLIPConfig(
            TextTowerConfig(**_given(text, TEXT), eos_id=None if eos_id == LARGEST_ID else eos_id),
            ImageTowerConfig(**_given(image, IMAGE)),
            int(values.get("projection_dim", 512)),
            dtype,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _given(values: dict, names: dict[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}


def _hub_config(config: CLIPConfig, dtype: str) -> dict[str, Any]:
    text = {theirs: getattr(config.text, ours) for ours, theirs in TEXT.items()}
    image = {theirs: getattr(config.image, ours) for ours, theirs in IMAGE.items()}
    eos_id = LARGEST_ID if config.text.eos_id is None else config.text.eos_id
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.width,
        "text_config": text | {"model_type": "clip_text_model", "projection_dim": config.width, "eos_token_id": eos_id},
        "vision_config": image | {"model_type": "clip_vision_model", "projection_dim": config.width},
        "dtype": dtype,
    }


def _shapes(config: CLIPConfig) -> dict:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    side = config.image.resolution
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), ids, image)["params"]

"""CLIP in the transformers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Reads OpenAI's models and OpenCLIP's that were saved as transformers' CLIPModel, whole or one tower of it, and towers
that were saved alone, with their projection or, as Stable Diffusion has its text tower, without.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from jaxdiff.core import trees
from jaxdiff.core.messages import quoted
from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.text.tokenizer import check_vocabulary, load_tokenizer, with_special_tokens
from jaxdiff.weights import hub, sizes

UNUSED = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
"""0, 1, 2, …: in files of older versions of transformers."""

Tower = Literal["text", "image"]


def load(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """Both towers of a directory or hub id; floating leaves in `dtype`, "float32" or "bfloat16".

    `variant` "fp16" reads the files of that name. Tensors are read one at a time and handed to `place`, which puts them
    on devices. Raises FileNotFoundError, or ValueError that names the setting or the tensors at fault.
    """
    return _load(path_or_id, dtype, variant, place, None)


def load_text(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """As `load`, but the text tower alone: of a whole CLIP, of which nothing else is read, or of one that was saved as
    CLIPTextModel or CLIPTextModelWithProjection.

    The configuration's `image` is None, its `width` too where there is no projection; the parameters are {"text": …}.
    """
    return _load(path_or_id, dtype, variant, place, "text")


def load_image(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """`load_text` of the image tower: of a whole CLIP, a CLIPVisionModel or a CLIPVisionModelWithProjection."""
    return _load(path_or_id, dtype, variant, place, "image")


def load_text_encoder(
    path_or_id: str | Path,
    dtype: str = "float32",
    *,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    place: hub.Place = jnp.asarray,
) -> CLIPTextEncoder:
    """The frozen text tower of a directory or hub id with its tokenizer, or with the one of the directory `tokenizer`
    (Stable Diffusion keeps the two apart)."""
    directory = hub.directory_of(path_or_id, "CLIP", variant=variant)
    # Before the tokenizer, whose library reads config.json too.
    settings = read_config(directory / "config.json", tower="text").text
    assert settings is not None  # the tower that was asked for
    words = load_tokenizer(directory if tokenizer is None else tokenizer)
    check_vocabulary(words, settings.vocab, str(directory))
    end = words.eos_token_id if settings.eos_id is None else settings.eos_id
    words = with_special_tokens(words, end, end)  # OpenAI's CLIP pads with the end
    config, params = load_text(directory, dtype, variant=variant, place=place)
    return CLIPTextEncoder(config, params, words)


def export(config: CLIPConfig, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors as transformers' CLIPModel opens.

    A tower alone is what CLIPTextModel or CLIPVisionModel opens, or where it has a projection, their WithProjection.
    ValueError where `params` does not fit `config`, OSError where something cannot be written; each file appears whole
    or not at all.
    """
    directory = Path(directory)
    trees.check_tree(params, _shapes(config), "the CLIP to export")
    hub.write_params(directory / "model.safetensors", params, key_map(params), dtype)
    hub.write_json(directory / "config.json", _hub_config(config, dtype))


def key_map(params: dict) -> dict[str, str]:
    """transformers' name of each of our parameters, its path joined by "/"."""
    return hub.names(trees.flatten(params), RULES, WORDS)


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

PROJECTION = {"text": "text_projection.weight", "image": "visual_projection.weight"}
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


def read_config(path: Path, dtype: hub.Dtype = "float32", tower: Tower | None = None) -> CLIPConfig:
    """The settings in a transformers config.json, of one `tower` or of both; what it leaves out is as in ViT-B/32.

    ValueError that names a setting that is not supported.
    """
    return _config(path, hub.read_json(path, "CLIP"), dtype, tower)


def _load(
    path_or_id: str | Path, dtype: str, variant: str | None, place: hub.Place, tower: Tower | None
) -> tuple[CLIPConfig, dict]:
    compute_type = hub.check_dtype(dtype)
    directory = hub.directory_of(path_or_id, "CLIP", variant=variant)
    path = directory / "config.json"
    values = hub.read_json(path, "CLIP")
    config = _config(path, values, compute_type, tower)
    tensors = hub.open_tensors(directory, variant)
    if tower:
        tensors = _of_tower(tensors, tower)
        if PROJECTION[tower] not in tensors and not _promises_projection(values):
            config = replace(config, width=None)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in UNUSED}
    shapes = sizes.shapes(_init, config, str(path))
    return config, hub.load_params(tensors, shapes, key_map(shapes), dtype, place, str(directory))


def _of_tower(tensors: Mapping[str, hub.Stored], tower: Tower) -> dict[str, hub.Stored]:
    """`tensors` without the other tower's and the temperature, under the names that they have in a whole CLIP.

    transformers 5 saves a tower that has no projection without its name before the tensors'.
    """
    if "embeddings.position_embedding.weight" in tensors:
        return {f"{WORDS[tower]}.{key}": tensor for key, tensor in tensors.items()}
    other: Tower = "image" if tower == "text" else "text"
    left_out = (f"{WORDS[other]}.", PROJECTION[other], "logit_scale")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(left_out)}


def _promises_projection(values: dict) -> bool:
    return values["model_type"] == "clip" or "WithProjection" in str(values.get("architectures"))


def _config(path: Path, values: dict, dtype: hub.Dtype, tower: Tower | None) -> CLIPConfig:
    alone = {"text": "clip_text_model", "image": "clip_vision_model"}
    if tower is None and values.get("model_type") in alone.values():
        raise ValueError(
            f"{path}: model_type = {quoted(values['model_type'])} is one tower alone: load_text or load_image"
        )
    hub.require(path, values, "model_type", ("clip", *([alone[tower]] if tower else [])))
    hub.require(path, values, "quantization_config", (None,))
    top = hub.Group(path, values)
    groups = {}
    for name in [tower] if tower else alone:
        groups[name] = top
        if values["model_type"] == "clip":
            groups[name] = top.group("text_config" if name == "text" else "vision_config")
            groups[name].require("model_type", (alone[name],), alone[name])
    return CLIPConfig(
        _text_config(groups["text"]) if "text" in groups else None,
        _image_config(groups["image"]) if "image" in groups else None,
        512 if values.get("projection_dim") is None else top.size("projection_dim", 512),
        dtype,
    )


def _text_config(group: hub.Group) -> TextTowerConfig:
    group.require("use_attention_mask", (None, False))  # diffusers' pipelines would hide what fills a caption up
    eos_id = group.size("eos_token_id", 49407, least=0)
    return replace(_tower_config(group, TextTowerConfig(), TEXT), eos_id=None if eos_id == LARGEST_ID else eos_id)


def _image_config(group: hub.Group) -> ImageTowerConfig:
    group.require("num_channels", (3,), 3)
    return _tower_config(group, ImageTowerConfig(), IMAGE)


_Config = TypeVar("_Config", TextTowerConfig, ImageTowerConfig)


def _tower_config(group: hub.Group, defaults: _Config, names: dict[str, str]) -> _Config:
    group.require("hidden_act", ("quick_gelu", "gelu"), defaults.activation)
    given: dict[str, Any] = {}
    bounds = sizes.BOUNDS[type(defaults)]
    for ours, theirs in names.items():
        default = getattr(defaults, ours)
        if type(default) is int:
            given[ours] = group.size(theirs, default, *bounds[ours])
        elif type(default) is float:
            given[ours] = group.fraction(theirs, default)
        else:
            given[ours] = group.values.get(theirs, default)
    for multiple, divisor in (("width", "heads"), ("resolution", "patch")):
        if divisor in given and given[multiple] % given[divisor]:
            wanted = f"one that divides {group.name}{names[multiple]} = {given[multiple]}"
            raise group.error(names[divisor], given[divisor], wanted)
    return replace(defaults, **given)


def _hub_config(config: CLIPConfig, dtype: str) -> dict[str, Any]:
    groups = {}
    projection = {} if config.width is None else {"projection_dim": config.width}
    if config.text is not None:
        eos_id = LARGEST_ID if config.text.eos_id is None else config.text.eos_id
        values = {theirs: getattr(config.text, ours) for ours, theirs in TEXT.items()}
        groups["text"] = {"model_type": "clip_text_model"} | values | projection | {"eos_token_id": eos_id}
        if config.text.vocab < TextTowerConfig().vocab:  # transformers would take OpenAI's start, an id beyond it
            groups["text"] |= {"bos_token_id": None}
    if config.image is not None:
        values = {theirs: getattr(config.image, ours) for ours, theirs in IMAGE.items()}
        groups["vision"] = {"model_type": "clip_vision_model"} | values | projection
    if len(groups) == 2:
        fields = {"architectures": ["CLIPModel"], "model_type": "clip", **projection}
        return fields | {f"{name}_config": values for name, values in groups.items()} | {"dtype": dtype}
    [(name, values)] = groups.items()
    architecture = f"CLIP{name.title()}Model{'WithProjection' if projection else ''}"
    return {"architectures": [architecture], **values, "dtype": dtype}


def _shapes(config: CLIPConfig) -> dict:
    return sizes.shapes_of(_init, config)


def _init(config: CLIPConfig) -> dict:
    ids = jnp.zeros((1, 1), jnp.int32)
    side = config.image.resolution if config.image else 0
    image = jnp.zeros((1, side, side, 3))
    init, key = CLIP(config).init, jax.random.key(0)
    if config.image is None:
        return init(key, ids, method="embed_text")["params"]
    if config.text is None:
        return init(key, image, method="embed_image")["params"]
    return init(key, ids, image)["params"]

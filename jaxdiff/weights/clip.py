"""CLIP in the transformers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Reads OpenAI and OpenCLIP models saved as transformers' CLIPModel (both towers or one), and towers saved alone, with
their projection or without it (Stable Diffusion's text towers). Tensors may also come from memory, for checkpoints that
hold several networks in one file.
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
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, check_vocabulary, load_tokenizer, with_special_tokens
from jaxdiff.weights import hub, sizes, tree

UNUSED = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
"""The range 0, 1, 2, …, stored by older versions of transformers."""

Tower = Literal["text", "image"]


def load(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """Load both towers from a directory or hub id; floating leaves in `dtype`, "float32" or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    return _load(path_or_id, dtype, variant, place, None)


def load_text(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """As `load`, for the text tower only: from a CLIPModel (whose other tensors are not read), CLIPTextModel or
    CLIPTextModelWithProjection.

    `config.image` is None, and so is `config.width` without a projection; the parameters are {"text": …}.
    """
    return _load(path_or_id, dtype, variant, place, "text")


def load_image(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[CLIPConfig, dict]:
    """As `load`, for the image tower only: from a CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection."""
    return _load(path_or_id, dtype, variant, place, "image")


def from_tensors(
    values: Mapping[str, Any],
    tensors: Mapping[str, tree.Unread],
    dtype: str = "float32",
    *,
    tower: Tower | None = "text",
    where: str = "CLIP",
    place: hub.Place = jnp.asarray,
) -> tuple[CLIPConfig, dict]:
    """As `load_text`, from the settings of a config.json and tensors by their transformers names.

    tower: "image" as `load_image`, None as `load`. where: the origin of the tensors, for errors.
    """
    config = _config(Path(where), dict(values), hub.check_dtype(dtype), tower)
    return _params(config, values, tensors, tower, dtype, place, where)


def config_of(values: Mapping[str, Any], where: str, dtype: str = "float32") -> CLIPConfig:
    """The text tower of a config.json's content. where: its name in messages. ValueError as `load_text`."""
    return _config(Path(where), dict(values), hub.check_dtype(dtype), "text")


def load_text_encoder(
    path_or_id: str | Path,
    dtype: str = "float32",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    variant: str | None = None,
    place: hub.Place = jnp.asarray,
) -> CLIPTextEncoder:
    """Load the frozen text tower and its tokenizer from a directory or hub id.

    tokenizer: the tokenizer's directory, if it is not beside the weights (Stable Diffusion); or a tokenizer, as
    `text.clip_tokenizer` makes it, which is used unchanged.
    """
    directory = hub.directory_of(path_or_id, "CLIP", variant=variant)
    # Validate config.json before the tokenizer library reads it.
    settings = read_config(directory / "config.json", tower="text").text
    assert settings is not None  # tower="text"
    if tokenizer is None or isinstance(tokenizer, str | Path):
        loaded = load_tokenizer(directory if tokenizer is None else tokenizer)
        end = loaded.eos_token_id if settings.eos_id is None else settings.eos_id
        loaded = with_special_tokens(loaded, end, end)  # OpenAI's CLIP pads with the end token
    else:
        loaded = tokenizer
    check_vocabulary(loaded, settings.vocab, str(directory))
    config, params = load_text(directory, dtype, variant=variant, place=place)
    return CLIPTextEncoder(config, params, loaded)


def export(config: CLIPConfig, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors, each atomically, in the layout of transformers' CLIPModel.

    A single tower is written as CLIPTextModel or CLIPVisionModel, or as their WithProjection class if it has a
    projection. ValueError if `params` does not fit `config`, OSError if writing fails.
    """
    directory = Path(directory)
    check(config, params)
    hub.write_params(directory / tree.PARAMS, params, key_map(params), dtype)
    hub.write_json(directory / "config.json", _hub_config(config, dtype))


def check(config: CLIPConfig, params: dict) -> None:
    """ValueError if `export` would refuse the parameters."""
    trees.check_tree(params, _shapes(config), "the CLIP to export")


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its transformers name."""
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
"""The wrong end-token id of the first published configurations; it means the largest id."""


def read_config(path: Path, dtype: hub.Dtype = "float32", tower: Tower | None = None) -> CLIPConfig:
    """Read a transformers config.json, for one `tower` or both. Missing settings default to those of ViT-B/32.

    ValueError that names an unsupported setting.
    """
    return _config(path, hub.read_json(path, "CLIP"), dtype, tower)


def from_values(
    values: Mapping[str, Any], path: Path, dtype: hub.Dtype = "float32", tower: Tower | None = None
) -> CLIPConfig:
    """`read_config` for the content of a file. path: its name in messages."""
    return _config(path, dict(values), dtype, tower)


def _load(
    path_or_id: str | Path, dtype: str, variant: str | None, place: hub.Place, tower: Tower | None
) -> tuple[CLIPConfig, dict]:
    compute_type = hub.check_dtype(dtype)
    directory = hub.directory_of(path_or_id, "CLIP", variant=variant)
    path = directory / "config.json"
    values = hub.read_json(path, "CLIP")
    config = _config(path, values, compute_type, tower)
    return _params(config, values, hub.open_tensors(directory, variant), tower, dtype, place, str(directory))


def _params(
    config: CLIPConfig,
    values: Mapping[str, Any],
    tensors: Mapping[str, tree.Unread],
    tower: Tower | None,
    dtype: str,
    place: hub.Place,
    where: str,
) -> tuple[CLIPConfig, dict]:
    """The parameters, and `config` without the projection if the tower has none."""
    if tower:
        tensors = _tower_tensors(tensors, tower)
        if _without_projection(values, tower):
            tensors = {key: tensor for key, tensor in tensors.items() if key != PROJECTION[tower]}
        if PROJECTION[tower] not in tensors and not _expects_projection(values):
            config = replace(config, width=None)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in UNUSED}
    shapes = sizes.shapes(_init, config, where)
    return config, hub.load_params(tensors, shapes, key_map(shapes), dtype, place, where)


def _tower_tensors(tensors: Mapping[str, tree.Unread], tower: Tower) -> dict[str, tree.Unread]:
    """The tensors of one tower, without the temperature, under their names in CLIPModel.

    transformers 5 saves a tower without a projection without the tower's prefix.
    """
    other: Tower = "image" if tower == "text" else "text"
    left_out = (f"{WORDS[other]}.", PROJECTION[other], "logit_scale")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(left_out)}
    if any(key.startswith(f"{WORDS[tower]}.") for key in kept):
        return kept
    return {key if key == PROJECTION[tower] else f"{WORDS[tower]}.{key}": tensor for key, tensor in kept.items()}


def _expects_projection(values: Mapping[str, Any]) -> bool:
    return values["model_type"] == "clip" or "WithProjection" in str(values.get("architectures"))


def _without_projection(values: Mapping[str, Any], tower: Tower) -> bool:
    """Whether the file's class has no projection: one that other tools wrote beside the tower is not used."""
    return values.get("architectures") == [f"CLIP{'Text' if tower == 'text' else 'Vision'}Model"]


def _config(path: Path, values: dict, dtype: hub.Dtype, tower: Tower | None) -> CLIPConfig:
    alone = {"text": "clip_text_model", "image": "clip_vision_model"}
    if tower is None and values.get("model_type") in alone.values():
        raise ValueError(
            f"{path}: model_type = {quoted(values['model_type'])} is a single tower: use load_text or load_image"
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
    group.require("use_attention_mask", (None, False))  # True makes diffusers mask the padding
    eos_id = group.size("eos_token_id", 49407, least=0)
    return replace(_tower_config(group, TextTowerConfig(), TEXT), eos_id=None if eos_id == LARGEST_ID else eos_id)


def _image_config(group: hub.Group) -> ImageTowerConfig:
    group.require("num_channels", (3,), 3)
    return _tower_config(group, ImageTowerConfig(), IMAGE)


_Config = TypeVar("_Config", TextTowerConfig, ImageTowerConfig)


def _tower_config(group: hub.Group, defaults: _Config, names: dict[str, str]) -> _Config:
    group.require("hidden_act", ("quick_gelu", "gelu"), defaults.activation)
    fields: dict[str, Any] = {}
    bounds = sizes.BOUNDS[type(defaults)]
    for ours, theirs in names.items():
        default = getattr(defaults, ours)
        if type(default) is int:
            fields[ours] = group.size(theirs, default, *bounds[ours])
        elif type(default) is float:
            fields[ours] = group.fraction(theirs, default)
        else:
            fields[ours] = group.values.get(theirs, default)
    for multiple, divisor in (("width", "heads"), ("resolution", "patch")):
        if divisor in fields and fields[multiple] % fields[divisor]:
            wanted = f"one that divides {group.name}{names[multiple]} = {fields[multiple]}"
            raise group.error(names[divisor], fields[divisor], wanted)
    return replace(defaults, **fields)


def _hub_config(config: CLIPConfig, dtype: str) -> dict[str, Any]:
    groups = {}
    projection = {} if config.width is None else {"projection_dim": config.width}
    if config.text is not None:
        eos_id = LARGEST_ID if config.text.eos_id is None else config.text.eos_id
        values = {theirs: getattr(config.text, ours) for ours, theirs in TEXT.items()}
        groups["text"] = {"model_type": "clip_text_model"} | values | projection | {"eos_token_id": eos_id}
        if config.text.vocab < TextTowerConfig().vocab:  # transformers' default is beyond the vocabulary
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

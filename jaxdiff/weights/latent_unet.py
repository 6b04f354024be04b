"""The latent U-Net in the diffusers layout (config.json + safetensors) ⇄ configuration and parameter tree.

diffusers' UNet2DConditionModel with cross-attention blocks: Stable Diffusion 1, 2, XL, inpainting and the ×4 upscaler.
Each setting of that class is either read or required to have the value that these have.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core import trees
from jaxdiff.models.conditioner import joined
from jaxdiff.models.conditioners import SizeConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.weights import hub, sizes
from jaxdiff.weights.tree import Unread

FILE = "diffusion_pytorch_model.safetensors"


class Vector(NamedTuple):
    """The vector added to the time embedding. `text_time`: pooled text and sizes (SDXL), with the width of a size's
    sinusoidal embedding. `projection`: any other."""

    width: int
    kind: Literal["text_time", "projection"]
    frequencies: int = 0


class Network(NamedTuple):
    """A latent U-Net and the sizes of its inputs. channels: of the latents. concat: channels beside them."""

    unet: LatentUNetConfig
    channels: int
    concat: int
    text_width: int
    vector: Vector | None = None


def network_of(model: DiffusionModel) -> Network:
    """The network of a latent diffusion model whose text encoder is set. ValueError for another kind of model."""
    if not isinstance(model.unet, LatentUNetConfig) or model.text is None:
        raise ValueError("not a latent diffusion model that reads text")
    given = joined([conditioner.example((model.unet.stride,) * 2) for conditioner in model.conditioners])
    concat = 0 if given.concat is None else given.concat.shape[-1]
    vector = None
    if given.vector is not None:
        sizes_read = next((each for each in model.conditioners if isinstance(each, SizeConditioner)), None)
        vector = Vector(given.vector.shape[-1], "projection")
        if sizes_read is not None:
            vector = Vector(given.vector.shape[-1], "text_time", sizes_read.frequencies)
    return Network(model.unet, model.product.channels, concat, model.text.shape[1], vector)


def load_unet(
    directory: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Network, dict]:
    """Load configuration and parameters from a directory; floating leaves in `dtype`, "float32" or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    directory = Path(directory)
    network = read_config(hub.read_json(directory / "config.json", "U-Net"), directory / "config.json", dtype)
    return network, load_tensors(network, hub.open_tensors(directory, variant), dtype, place, str(directory))


def load_tensors(network: Network, tensors: Mapping[str, Unread], dtype: str, place: hub.Place, where: str) -> dict:
    """The parameters from tensors with diffusers' names. ValueError, naming `where`, if names or shapes differ."""
    shapes = sizes.shapes(_init, network, where)
    return hub.load_params(tensors, shapes, key_map(network, shapes), dtype, place, where)


def export_unet(network: Network, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each atomically, for UNet2DConditionModel.

    ValueError if `params` does not fit the network, OSError if writing fails.
    """
    directory = Path(directory)
    trees.check_tree(params, shapes_of(network), "the U-Net to export")
    hub.write_params(directory / FILE, params, key_map(network, params), dtype)
    hub.write_json(directory / "config.json", hub_config(network))


def read_config(values: Mapping[str, Any], path: Path, dtype: str = "float32") -> Network:
    """Read the settings of a diffusers config.json. path: its name in messages. ValueError that names an unsupported
    setting."""
    config = open_settings(values, path, "UNet2DConditionModel", FIXED, READ)
    attends = attention_levels(config, "Down")
    if attends != attention_levels(config, "Up")[::-1]:
        raise config.error("up_block_types", config.values["up_block_types"], "those that mirror down_block_types")
    channels = config.size("out_channels")
    inputs = config.size("in_channels")
    if inputs < channels:
        raise config.error("in_channels", inputs, f"at least out_channels, {channels}")
    unet = read_unet(config, attends, dtype)
    return Network(unet, channels, inputs - channels, config.size("cross_attention_dim"), read_vector(config))


def open_settings(
    values: Mapping[str, Any], path: Path, name: str, fixed: Mapping[str, tuple], read: Mapping[str, Any]
) -> hub.Group:
    """The settings of diffusers' class `name`, with defaults. ValueError unless all are in `fixed`, with a supported
    value, or in `read`."""
    unknown = sorted(key for key in values if not key.startswith("_") and key not in {*fixed, *read})
    if unknown:
        raise ValueError(f"{path}: unknown settings of {name}: {sizes.names(unknown)}")
    config = hub.Group(path, {key: value for key, value in ({**read} | dict(values)).items() if value is not None})
    config.require("_class_name", (name,), name)
    for key, (default, *allowed) in fixed.items():
        config.require(key, tuple(allowed), default)
    return config


def read_unet(config: hub.Group, attends: tuple[bool, ...], dtype: str) -> LatentUNetConfig:
    """The settings that the U-Net and its ControlNets have in common. attends: which levels have attention."""
    count = len(attends)
    widths = _levels(config, "block_out_channels", sizes.SIZE, count)
    if any(width % widths[0] for width in widths) or widths[0] % 4:
        raise config.error("block_out_channels", list(widths), "multiples of the first, and that one of 4")
    layers = _levels(config, "transformer_layers_per_block", sizes.DEPTH, count)
    config.require("resnet_time_scale_shift", ("default", "scale_shift"))
    cross_only = _flags(config, "only_cross_attention", count)
    try:
        unet = LatentUNetConfig(
            channels=widths[0],
            multipliers=tuple(width // widths[0] for width in widths),
            blocks=_levels(config, "layers_per_block", sizes.DEPTH, count),
            transformer_layers=tuple(n if attend else 0 for n, attend in zip(layers, attends)),
            middle_layers=layers[-1],
            heads=_levels(config, "attention_head_dim", sizes.SIZE, count),
            cross_only=tuple(only and attend for only, attend in zip(cross_only, attends)),
            linear_projection=config.flag("use_linear_projection", False),
            norm_groups=config.size("norm_num_groups", 32),
            level_entries=config.size("num_class_embeds", 0, 0),
            scale_shift=config.values.get("resnet_time_scale_shift") == "scale_shift",
            execution=ExecutionConfig(dtype=hub.check_dtype(dtype)),
        )
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from error
    sizes.check_depth(unet.blocks, str(config.path))
    return unet


def read_vector(config: hub.Group) -> Vector | None:
    """The source of the added vector."""
    by_class, by_text = config.values.get("class_embed_type"), config.values.get("addition_embed_type")
    config.require("class_embed_type", (None, "projection"))
    config.require("addition_embed_type", (None, "text_time"))
    if by_class and by_text:
        raise config.error("addition_embed_type", by_text, "null beside a class_embed_type")
    if by_class or by_text:
        width = config.size("projection_class_embeddings_input_dim")
        return Vector(width, "projection") if by_class else _text_time(config, width)
    return None


def _text_time(config: hub.Group, width: int) -> Vector:
    frequencies = config.size("addition_time_embed_dim", None, 2)
    if frequencies % 2 or width <= frequencies:
        raise config.error("addition_time_embed_dim", frequencies, f"an even number below {width}")
    return Vector(width, "text_time", frequencies)


def _levels(config: hub.Group, name: str, bounds: sizes.Bounds, count: int) -> tuple[int, ...]:
    """A number within bounds for each of `count` levels; a single number applies to all."""
    value = config.values.get(name)
    values = [value] * count if type(value) is int else list(value) if isinstance(value, list | tuple) else []
    if len(values) != count or not all(type(n) is int and bounds.least <= n <= bounds.most for n in values):
        wanted = f"whole numbers from {bounds.least} to {bounds.most}, one for each level"
        raise config.error(name, value, wanted)
    return tuple(values)


def _flags(config: hub.Group, name: str, count: int) -> tuple[bool, ...]:
    value = config.values.get(name)
    values = [value] * count if isinstance(value, bool) else value
    if not isinstance(values, list | tuple) or len(values) != count or any(type(flag) is not bool for flag in values):
        raise config.error(name, value, f"true or false, or one of them for each of the {count} levels")
    return tuple(values)


def attention_levels(config: hub.Group, way: Literal["Down", "Up"]) -> tuple[bool, ...]:
    """Which levels have attention, in the order of the settings."""
    name, kinds = f"{way.lower()}_block_types", (f"{way}Block2D", f"CrossAttn{way}Block2D")
    value, widths = config.values.get(name), config.values.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list | tuple) else 0
    if not 0 < levels <= sizes.LEVELS:
        raise config.error("block_out_channels", widths, f"a width for each level, of at most {sizes.LEVELS}")
    if not isinstance(value, list | tuple) or len(value) != levels or any(kind not in kinds for kind in value):
        raise config.error(name, value, f"{levels} of {' and '.join(kinds)}")
    return tuple(kind == kinds[1] for kind in value)


FIXED_DOWN = {
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
    "downsample_padding": (1, 1),
    "norm_eps": (1e-5, 1e-5),
    "act_fn": ("silu", "silu"),
    "mid_block_scale_factor": (1, 1),
    "encoder_hid_dim": (None, None),
    "encoder_hid_dim_type": (None, None),
    "num_attention_heads": (None, None),
}
"""For each setting: diffusers' default, then the supported values."""
FIXED = FIXED_DOWN | {
    "center_input_sample": (False, False),
    "reverse_transformer_layers_per_block": (None, None),
    "dual_cross_attention": (False, False),
    "resnet_skip_time_act": (False, False),
    "resnet_out_scale_factor": (1.0, 1.0),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "time_embedding_act_fn": (None, None),
    "timestep_post_act": (None, None),
    "time_cond_proj_dim": (None, None),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "attention_type": ("default", "default"),
    "class_embeddings_concat": (False, False),
    "cross_attention_norm": (None, None),
    "mid_block_only_cross_attention": (None, None, False),
}
READ_DOWN = {
    "in_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,  # the softmax is always float32
    "addition_embed_type_num_heads": 64,  # of another addition_embed_type
}
"""The settings that differ between families, with diffusers' defaults. `attention_head_dim` is the number of heads."""
READ = READ_DOWN | {
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "sample_size": None,  # read by the model
    "dropout": 0.0,  # training only
}


def hub_config(network: Network) -> dict[str, Any]:
    """diffusers' settings of a network. ValueError for one that UNet2DConditionModel cannot express."""
    if network.unet.coordinates:
        raise ValueError("diffusers' U-Nets read no coordinates")
    values = hub_settings(network.unet, network.text_width, network.vector)
    values |= {
        "in_channels": network.channels + network.concat,
        "out_channels": network.channels,
        "up_block_types": [kind.replace("Down", "Up") for kind in values["down_block_types"]][::-1],
    }
    fixed = {name: allowed[0] for name, (_, *allowed) in FIXED.items()}
    return {"_class_name": "UNet2DConditionModel"} | fixed | READ | values


def hub_settings(unet: LatentUNetConfig, text_width: int, vector: Vector | None) -> dict[str, Any]:
    """diffusers' settings that the U-Net and its ControlNets have in common, the inverse of `read_unet`."""
    # Levels without attention need a number too: the middle's.
    layers = [count or unet.middle_layers for count in unet.transformer_layers]
    if layers[-1] != unet.middle_layers or not unet.middle_layers:
        raise ValueError(f"diffusers' U-Net has no middle of {unet.middle_layers} layers after a level of {layers[-1]}")
    values: dict[str, Any] = {
        "down_block_types": [("CrossAttn" if n else "") + "DownBlock2D" for n in unet.transformer_layers],
        "only_cross_attention": list(unet.cross_only) if any(unet.cross_only) else False,
        "block_out_channels": [unet.width(level) for level in range(len(layers))],
        "layers_per_block": unet.blocks[0] if len(set(unet.blocks)) == 1 else list(unet.blocks),
        "norm_num_groups": unet.norm_groups,
        "cross_attention_dim": text_width,
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "attention_head_dim": unet.heads[0] if len(set(unet.heads)) == 1 else list(unet.heads),
        "use_linear_projection": unet.linear_projection,
        "num_class_embeds": unet.level_entries or None,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
    }
    if vector is not None:
        values["projection_class_embeddings_input_dim"] = vector.width
        values["class_embed_type" if vector.kind == "projection" else "addition_embed_type"] = vector.kind
        values["addition_time_embed_dim"] = vector.frequencies or None
    return values


def key_map(network: Network, params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its diffusers name."""
    last = len(network.unet.blocks) - 1
    # diffusers numbers the levels of the up path from the lowest.
    up = [
        (ours.replace("{level}", str(level)), theirs.replace("{level}", str(last - level)))
        for level in range(last + 1)
        for ours, theirs in _path("up", "upsamplers")
    ]
    return hub.names(trees.flatten(params), [*up, *down_rules(network.vector), *_HEAD], WORDS)


def down_rules(vector: Vector | None) -> list[tuple[str, str]]:
    """The rules of `hub.names` for the parameters that the U-Net and its ControlNets have in common."""
    middle = [
        *_block("middle", "mid_block.attentions.0", _TRANSFORMER),
        *_block("middle_{i}", "mid_block.resnets.{i}", _RES),
    ]
    embedding = "class_embedding" if vector is None or vector.kind == "projection" else "add_embedding"
    return [
        *_path("down", "downsamplers"),
        *middle,
        ("vector/{layer}/{leaf}", embedding + ".{layer}.{leaf}"),
        ("stem/{leaf}", "conv_in.{leaf}"),
        ("time/{layer}/{leaf}", "time_embedding.{layer}.{leaf}"),
        ("aug_level/embedding", "class_embedding.weight"),
    ]


def _path(way: str, resample: str) -> list[tuple[str, str]]:
    block = way + "_blocks.{level}."
    return [
        *_block(way + "_{level}_{i}", block + "attentions.{i}", _TRANSFORMER),
        *_block(way + "_{level}_{i}", block + "resnets.{i}", _RES),
        (way + "_{level}/{leaf}", block + resample + ".0.conv.{leaf}"),
    ]


def _block(ours: str, theirs: str, layers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(f"{ours}{own}/{{leaf}}", f"{theirs}.{name}.{{leaf}}") for own, name in layers.items()]


_RES = {
    "/norm_1/GroupNorm_0": "norm1",
    "/conv_1": "conv1",
    "/time": "time_emb_proj",
    "/norm_2/GroupNorm_0": "norm2",
    "/conv_2": "conv2",
    "/shortcut": "conv_shortcut",
}
_TRANSFORMER = {
    "_attention/norm/GroupNorm_0": "norm",
    "_attention/in": "proj_in",
    "_attention/out": "proj_out",
    "_attention/block_{j}/self_norm": "transformer_blocks.{j}.norm1",
    "_attention/block_{j}/cross_norm": "transformer_blocks.{j}.norm2",
    "_attention/block_{j}/feed_forward_norm": "transformer_blocks.{j}.norm3",
    "_attention/block_{j}/self/{part}": "transformer_blocks.{j}.attn1.{part}",
    "_attention/block_{j}/cross/{part}": "transformer_blocks.{j}.attn2.{part}",
    "_attention/block_{j}/up": "transformer_blocks.{j}.ff.net.0.proj",
    "_attention/block_{j}/down": "transformer_blocks.{j}.ff.net.2",
}
_HEAD = (("head_norm/GroupNorm_0/{leaf}", "conv_norm_out.{leaf}"), ("head/{leaf}", "conv_out.{leaf}"))
WORDS = {
    "kernel": "weight",
    "scale": "weight",
    "Dense_0": "linear_1",
    "Dense_1": "linear_2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}


def shapes_of(network: Network) -> dict:
    """The shapes of the parameters."""
    return sizes.shapes_of(_init, network)


def _init(network: Network) -> dict:
    unet = network.unet
    conditioning = example(unet, network.text_width, network.vector)
    if network.concat:
        conditioning = conditioning._replace(concat=jnp.zeros((1, unet.stride, unet.stride, network.concat)))
    x = jnp.zeros((1, unet.stride, unet.stride, network.channels))
    return unet.module().init(jax.random.key(0), x, jnp.zeros(1), conditioning)["params"]


def example(unet: LatentUNetConfig, text_width: int, vector: Vector | None) -> Conditioning:
    """The inputs beside the latents, for a batch of one."""
    return Conditioning(
        tokens=jnp.zeros((1, 2, text_width)),
        vector=None if vector is None else jnp.zeros((1, vector.width)),
        aug_level=jnp.zeros(1) if unet.level_entries else None,
    )

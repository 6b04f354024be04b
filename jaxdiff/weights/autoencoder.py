"""Autoencoders of latent diffusion in the diffusers layout (config.json + safetensors) ⇄ settings and parameter tree.

diffusers' AutoencoderKL (Stable Diffusion) and VQModel (latent diffusion's VQ models). Each setting of these classes is
either read or required to have a supported value. Two are ours alone, and `check_public` refuses them: a
`norm_num_groups` of 0 (layer norm), and `local_encoder`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxdiff.core import trees
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, KLBottleneck, VQBottleneck
from jaxdiff.weights import hub, sizes, tree

CONFIG, FILE = "config.json", "diffusion_pytorch_model.safetensors"
_T = TypeVar("_T")


class Settings(NamedTuple):
    """The settings of a public autoencoder.

    scale: latents are codes times this. upcast: the published network overflows in float16, so it has to run in a wider
    type. side: of the training images; diffusers' tiles have the same.
    """

    config: AutoencoderConfig
    scale: float = 0.18215
    upcast: bool = False
    side: int = 512


def load(
    path_or_id: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Settings, dict]:
    """Load settings and parameters from a directory or hub id; floating leaves and compute type in `dtype`, "float32"
    or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    compute_type = hub.check_dtype(dtype)
    directory = hub.directory_of(path_or_id, "autoencoder", variant=variant)
    settings = read_config(directory / CONFIG, compute_type)
    return settings, load_tensors(settings, hub.open_tensors(directory, variant), dtype, place, str(directory))


def load_tensors(
    settings: Settings, tensors: Mapping[str, tree.Unread], dtype: str, place: hub.Place, where: str
) -> dict:
    """The parameters from tensors with diffusers' names, of either generation. ValueError, naming `where`, if names or
    shapes differ."""
    shapes = sizes.shapes(_init, settings.config, where)
    return hub.load_params(new_names(tensors), shapes, key_map(shapes), dtype, place, where)


def export(settings: Settings, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each atomically, for AutoencoderKL or VQModel.

    ValueError if these classes cannot express the settings or `params` does not fit them, OSError if writing fails.
    """
    directory = Path(directory)
    config, names = described(settings, params), key_map(params)
    hub.write_params(directory / FILE, params, names, dtype)
    hub.write_json(directory / CONFIG, config)


def described(settings: Settings, params: dict) -> dict[str, Any]:
    """The settings that `export` writes. Raises the same ValueError."""
    config = _hub_config(settings)
    trees.check_tree(params, sizes.shapes_of(_init, settings.config), "the autoencoder to export")
    return config


def check_public(config: AutoencoderConfig) -> None:
    """ValueError for settings that `export` writes and diffusers' classes do not have."""
    if not config.norm_groups:
        raise ValueError("diffusers' autoencoders have no layer norm: norm_groups = 0 is not")
    if config.local_encoder:
        raise ValueError("diffusers' autoencoders have no local_encoder = True")


def read_config(path: Path, dtype: hub.Dtype = "float32") -> Settings:
    """Read a diffusers config.json. ValueError that names an unsupported setting."""
    return from_values(hub.read_json(path, "autoencoder"), path, dtype)


def from_values(values: Mapping[str, Any], path: Path, dtype: hub.Dtype = "float32") -> Settings:
    """`read_config` for the content of a file. path: its name in messages."""
    hub.require(path, values, "_class_name", ("AutoencoderKL", "VQModel"))
    vq = values["_class_name"] == "VQModel"
    fixed, read = (FIXED | VQ_FIXED, READ | VQ_READ) if vq else (FIXED | KL_FIXED, READ | KL_READ)
    unknown = sorted(name for name in values if not name.startswith("_") and name not in {*fixed, *read})
    if unknown:
        raise ValueError(f"{path}: unknown settings of {values['_class_name']}: {sizes.names(unknown)}")
    group = hub.Group(path, read | {name: value for name, value in values.items() if value is not None})
    for name, (default, *allowed) in fixed.items():
        group.require(name, tuple(allowed), default)
    channels = _widths(group)
    image_channels = group.size("in_channels")
    group.require("out_channels", (image_channels,))
    latent = group.size("latent_channels")
    if values.get("norm_type") == "spatial":
        group.require("norm_num_groups", (32,))  # of these norms, whatever the setting
    config = AutoencoderConfig(
        channels=channels,
        blocks=group.size("layers_per_block", None, *sizes.DEPTH),
        latent_channels=latent,
        image_channels=image_channels,
        bottleneck=_codebook(group, latent) if vq else KLBottleneck(),
        attention_levels=_attention_levels(group, len(channels)),
        middle_attention=group.flag("mid_block_add_attention", True),
        norm_groups=group.size("norm_num_groups", None, *sizes.OPTIONAL),
        quant_conv=vq or group.flag("use_quant_conv", True),
        post_quant_conv=vq or group.flag("use_post_quant_conv", True),
        local_encoder=group.flag("local_encoder", False),
        spatial_norm=vq and group.values.get("norm_type") == "spatial",
        dtype=dtype,
    )
    return Settings(config, _scale(group), group.flag("force_upcast", False), _side(group, config))


def new_names(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """The tensors with the attention layers' names of diffusers 0.17 and later; older files have others."""
    renamed = {OLD.sub(lambda match: ATTENTION[match[1]], name): name for name in tensors}
    if len(renamed) < len(tensors):  # of both generations: named in the message about unexpected tensors
        return dict(tensors)
    return {new: tensors[old] for new, old in renamed.items()}


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its diffusers name."""
    paths = trees.flatten(params)
    levels = {int(match[1]) for path in paths if (match := re.match(r"decoder/up_(\d+)_", path))}
    # diffusers numbers the levels of the decoder from the lowest.
    up = [
        (ours.replace("{level}", str(level)), theirs.replace("{level}", str(max(levels) - level)))
        for level in levels
        for ours, theirs in UP
    ]
    return hub.names(paths, [*DOWN, *up, *TOP], WORDS)


def _block_rules(block: tuple[str, str], layers: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{block[0]}/{ours}/{{leaf}}", f"{block[1]}.{theirs}.{{leaf}}") for ours, theirs in layers.items()]


_SPATIAL = {"norm": "norm_layer", "scale": "conv_y", "offset": "conv_b"}
"""The layers of a norm that reads the code."""
_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    **{f"norm_{i}/{ours}": f"norm{i}.{theirs}" for i in (1, 2) for ours, theirs in _SPATIAL.items()},
}
_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    **{f"norm/{ours}": f"spatial_norm.{theirs}" for ours, theirs in _SPATIAL.items()},
}
DOWN = (
    *_block_rules(
        ("encoder/down_{level}_{i}_attention", "encoder.down_blocks.{level}.attentions.{i}"),
        _ATTENTION,
    ),
    *_block_rules(("encoder/down_{level}_{i}", "encoder.down_blocks.{level}.resnets.{i}"), _BLOCK),
    ("encoder/down_{level}/{leaf}", "encoder.down_blocks.{level}.downsamplers.0.conv.{leaf}"),
)
UP = (
    *_block_rules(("decoder/up_{level}_{i}_attention", "decoder.up_blocks.{level}.attentions.{i}"), _ATTENTION),
    *_block_rules(("decoder/up_{level}_{i}", "decoder.up_blocks.{level}.resnets.{i}"), _BLOCK),
    ("decoder/up_{level}/{leaf}", "decoder.up_blocks.{level}.upsamplers.0.conv.{leaf}"),
)
TOP = (
    *_block_rules(("{half}/middle_attention", "{half}.mid_block.attentions.0"), _ATTENTION),
    *_block_rules(("{half}/middle_{i}", "{half}.mid_block.resnets.{i}"), _BLOCK),
    ("{half}/stem/{leaf}", "{half}.conv_in.{leaf}"),
    ("{half}/head_norm/{leaf}", "{half}.conv_norm_out.{leaf}"),
    *_block_rules(("decoder/head_norm", "decoder.conv_norm_out"), _SPATIAL),
    ("{half}/head/{leaf}", "{half}.conv_out.{leaf}"),
    ("codebook", "quantize.embedding.weight"),
    ("quant/{leaf}", "quant_conv.{leaf}"),
    ("post_quant/{leaf}", "post_quant_conv.{leaf}"),
)
WORDS = {"kernel": "weight", "scale": "weight"}
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(rf"(?<=\.)({'|'.join(ATTENTION)})(?=\.(?:weight|bias)$)")

FIXED = {"act_fn": ("silu", "silu")}
KL_FIXED = {"shift_factor": (None, None), "latents_mean": (None, None), "latents_std": (None, None)}
VQ_FIXED = {"norm_type": ("group", "group", "spatial"), "lookup_from_codebook": (False, False)}
"""For each setting: diffusers' default, then the supported values."""
READ = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
    "local_encoder": False,
}
KL_READ = {"latent_channels": 4, "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True}
VQ_READ = {"latent_channels": 3, "force_upcast": False, "num_vq_embeddings": 256, "vq_embed_dim": None}
"""The settings that are read, with diffusers' defaults."""


def _widths(group: hub.Group) -> tuple[int, ...]:
    groups, widths = group.size("norm_num_groups", None, *sizes.OPTIONAL), group.values["block_out_channels"]
    good = isinstance(widths, list) and 0 < len(widths) <= sizes.LEVELS
    if not good or not all(type(n) is int and 0 < n <= sizes.SIZE.most and n % (groups or 1) == 0 for n in widths):
        wanted = f"multiples of norm_num_groups = {groups} up to {sizes.SIZE.most}, one for each of 1 to {sizes.LEVELS}"
        raise group.error("block_out_channels", widths, f"{wanted} levels")
    return tuple(widths)


def _attention_levels(group: hub.Group, levels: int) -> tuple[int, ...]:
    """The levels with attention; ValueError unless encoder and decoder agree."""
    attends = []
    for name, kind, step in (("down", "DownEncoderBlock2D", 1), ("up", "UpDecoderBlock2D", -1)):
        kinds, value = (kind, f"Attn{kind}"), group.values[f"{name}_block_types"]
        if not isinstance(value, list) or len(value) != levels or any(each not in kinds for each in value):
            raise group.error(f"{name}_block_types", value, f"{levels} of {' and '.join(kinds)}")
        attends.append([each == kinds[1] for each in value][::step])
    if attends[0] != attends[1]:
        raise group.error("up_block_types", group.values["up_block_types"], "those that mirror down_block_types")
    return tuple(level for level, attend in enumerate(attends[0]) if attend)


def _codebook(group: hub.Group, latent: int) -> VQBottleneck:
    width = latent if group.values["vq_embed_dim"] is None else group.size("vq_embed_dim")
    return VQBottleneck(group.size("num_vq_embeddings"), width)


def _scale(group: hub.Group) -> float:
    scale = group.values["scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1e6:
        raise group.error("scaling_factor", scale, "a number above 0 and up to 1e6")
    return float(scale)


def _side(group: hub.Group, config: AutoencoderConfig) -> int:
    """`sample_size`, a number or two equal ones, rounded up to the stride."""
    value = group.values["sample_size"]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        group = group._replace(values=group.values | {"sample_size": value[0]})
    return -(-group.size("sample_size", None, *sizes.SIDE) // config.stride) * config.stride


def _hub_config(settings: Settings) -> dict[str, Any]:
    """diffusers' settings. ValueError for one that its classes cannot express."""
    config = settings.config
    attends = ["Attn" * (level in config.attention_levels) for level in range(len(config.channels))]
    values = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [f"{attend}DownEncoderBlock2D" for attend in attends],
        "up_block_types": [f"{attend}UpDecoderBlock2D" for attend in attends[::-1]],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": settings.side,
        "scaling_factor": settings.scale,
        "force_upcast": settings.upcast,
        "mid_block_add_attention": config.middle_attention,
    } | ({"local_encoder": True} if config.local_encoder else {})
    if isinstance(config.bottleneck, VQBottleneck):
        if not (config.quant_conv and config.post_quant_conv):
            raise ValueError(
                "diffusers' VQModel has both 1×1 convolutions: quant_conv and post_quant_conv must be True"
            )
        fixed: dict[str, Any] = {name: allowed[0] for name, (_, *allowed) in (FIXED | VQ_FIXED).items()}
        if config.spatial_norm and config.norm_groups != 32:
            raise ValueError(f"diffusers' VQModel with spatial_norm has no norm_groups = {config.norm_groups}: 32")
        fixed["norm_type"] = "spatial" if config.spatial_norm else "group"
        codebook = {"num_vq_embeddings": config.bottleneck.codes, "vq_embed_dim": config.bottleneck.width}
        return {"_class_name": "VQModel"} | fixed | values | codebook
    fixed = {name: allowed[0] for name, (_, *allowed) in (FIXED | KL_FIXED).items()}
    if config.spatial_norm:
        raise ValueError("diffusers' AutoencoderKL has no spatial_norm")
    convolutions = {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.post_quant_conv}
    return {"_class_name": "AutoencoderKL"} | fixed | values | convolutions


def _init(config: AutoencoderConfig) -> dict:
    return nets.init(replace(config, dtype="float32", remat=False), jax.random.key(0))

"""VQGAN in the layout of vqgan-jax (config.json + flax_model.msgpack) ⇄ settings and parameter tree.

The names are those of taming-transformers in Flax. dalle-mini's codes are decoded by such a network: stride 16, 16384
codes of width 256.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.core import json_files, trees
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.weights import flax_files, hub, lazy, sizes, tree

CONFIG = "config.json"
GROUPS = 32
"""Of every group norm."""
FIXED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False}
READ = {
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "in_channels": 3,
    "out_ch": 3,
    "resolution": 256,
    "z_channels": 256,
    "n_embed": 1024,
    "embed_dim": 256,
}
"""The settings that are read, with the defaults of vqgan-jax; others do not affect the network."""

IMAGENET_F16_16384 = AutoencoderConfig(
    channels=(128, 128, 256, 256, 512),
    latent_channels=256,
    bottleneck=VQBottleneck(16384, 256),
    attention_levels=(4,),
)
"""The decoder of dalle-mini's codes."""


def is_vqgan(folder: str | Path) -> bool:
    """Whether the folder has a VQGAN in this layout."""
    try:
        values = json_files.read_object(Path(folder) / CONFIG)
    except (OSError, ValueError):
        return False
    return {"ch_mult", "n_embed"} <= values.keys()


def load(folder: str | Path, dtype: str = "float32", place: hub.Place = jnp.asarray) -> TrainedAutoencoder:
    """A VQGAN; floating leaves and compute type in `dtype`. Raises FileNotFoundError, or ValueError that names the
    invalid setting or tensors."""
    folder = Path(folder)
    config, side = read_config(folder / CONFIG, hub.check_dtype(dtype))
    shapes = sizes.shapes(_init, replace(config, dtype="float32"), str(folder))
    named = key_map(shapes)
    tensors: dict[str, tree.Unread] = dict(flax_files.read_index(folder / flax_files.FILE))
    for path, leaf in trees.flatten(shapes).items():
        tensor = tensors.get(named[path])
        if tensor is not None and tensor.shape == (1, 1, *leaf.shape) and leaf.ndim == 2:
            tensors[named[path]] = lazy.reshaped(tensor, leaf.shape)  # attention is made of 1×1 convolutions
    params = flax_files.load_params(tensors, shapes, named, dtype, place, str(folder))
    return TrainedAutoencoder(config, params, 1.0, side=side)


def export(trained: TrainedAutoencoder, folder: str | Path, dtype: str = "float32") -> None:
    """The inverse of `load`; each file is written atomically. ValueError, before anything is written, if the layout
    cannot express the network; OSError if writing fails."""
    folder, params = Path(folder), trees.flatten(trained.params)
    values, named = described(trained.config, trained.side), key_map(trained.params)
    tensors = {named[path]: lazy.held(leaf) for path, leaf in params.items()}
    for path, leaf in params.items():
        if "attention/" in path and path.endswith("kernel"):
            tensors[named[path]] = lazy.reshaped(tensors[named[path]], (1, 1, *leaf.shape))
    flax_files.write(folder / flax_files.FILE, tensors, dtype)
    hub.write_json(folder / CONFIG, values)


def read_config(path: Path, dtype: hub.Dtype = "float32") -> tuple[AutoencoderConfig, int]:
    """Settings, and the side of the training images. ValueError that names an unsupported setting."""
    values = hub.read_json(path, "VQGAN")
    group = hub.Group(path, READ | {name: value for name, value in values.items() if value is not None})
    for name, value in FIXED.items():
        group.require(name, (value,), value)
    multipliers, width = group.values["ch_mult"], group.size("ch")
    good = isinstance(multipliers, list) and 0 < len(multipliers) <= sizes.LEVELS
    if not good or not all(type(n) is int and 0 < n <= 2**10 for n in multipliers):
        raise group.error("ch_mult", multipliers, f"1 to {sizes.LEVELS} whole numbers")
    if width % GROUPS:
        raise group.error("ch", width, f"a multiple of {GROUPS}")
    side, attended = group.size("resolution", None, *sizes.SIDE), group.values["attn_resolutions"]
    if not isinstance(attended, list) or side % 2 ** (len(multipliers) - 1):
        raise group.error("attn_resolutions", attended, f"a list of sides in a resolution of {side}")
    image_channels = group.size("in_channels")
    group.require("out_ch", (image_channels,))
    config = AutoencoderConfig(
        channels=tuple(width * each for each in multipliers),
        blocks=group.size("num_res_blocks", None, *sizes.DEPTH),
        latent_channels=group.size("z_channels"),
        image_channels=image_channels,
        bottleneck=VQBottleneck(group.size("n_embed"), group.size("embed_dim")),
        attention_levels=tuple(level for level in range(len(multipliers)) if side >> level in attended),
        norm_groups=GROUPS,
        dtype=dtype,
    )
    return config, side


def described(config: AutoencoderConfig, side: int) -> dict[str, Any]:
    """The settings that `export` writes. ValueError if the layout cannot express them."""
    width, bottleneck = config.channels[0], config.bottleneck
    if not isinstance(bottleneck, VQBottleneck):
        raise ValueError("a KL autoencoder is no VQGAN")
    if config.norm_groups != GROUPS or any(each % width for each in config.channels):
        raise ValueError(f"VQGAN's norms have {GROUPS} groups, and its widths are multiples of the first")
    if not (config.middle_attention and config.quant_conv and config.post_quant_conv) or config.local_encoder:
        raise ValueError("a VQGAN has attention in the middle, both 1×1 convolutions, and no local_encoder")
    values: Mapping[str, Any] = {
        "ch": width,
        "ch_mult": [each // width for each in config.channels],
        "num_res_blocks": config.blocks,
        "attn_resolutions": [side >> level for level in config.attention_levels],
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "resolution": side,
        "z_channels": config.latent_channels,
        "n_embed": bottleneck.codes,
        "embed_dim": bottleneck.width,
        "num_resolutions": len(config.channels),
        "dropout": 0.0,
    }
    return {"architectures": ["VQModel"], "model_type": "vqgan", **FIXED, **values}


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path to its name in vqgan-jax, both joined by "/"."""
    return hub.names(trees.flatten(params), RULES, WORDS)


RULES = (
    *(
        rule
        for half, way, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample"))
        for rule in (
            (f"{half}/{way}_{{level}}_{{i}}_attention/{{layer}}/{{leaf}}",
             f"{half}/{way}_{{level}}/attn_{{i}}/{{layer}}/{{leaf}}"),
            (f"{half}/{way}_{{level}}_{{i}}/{{layer}}/{{leaf}}",
             f"{half}/{way}_{{level}}/block_{{i}}/{{layer}}/{{leaf}}"),
            (f"{half}/{way}_{{level}}/{{leaf}}", f"{half}/{way}_{{level}}/{change}/conv/{{leaf}}"),
        )
    ),
    ("{half}/middle_attention/{layer}/{leaf}", "{half}/mid/attn_1/{layer}/{leaf}"),
    ("{half}/middle_0/{layer}/{leaf}", "{half}/mid/block_1/{layer}/{leaf}"),
    ("{half}/middle_1/{layer}/{leaf}", "{half}/mid/block_2/{layer}/{leaf}"),
    ("{half}/stem/{leaf}", "{half}/conv_in/{leaf}"),
    ("{half}/head_norm/{leaf}", "{half}/norm_out/{leaf}"),
    ("{half}/head/{leaf}", "{half}/conv_out/{leaf}"),
    ("codebook", "quantize/embedding/embedding"),
    ("quant/{leaf}", "quant_conv/{leaf}"),
    ("post_quant/{leaf}", "post_quant_conv/{leaf}"),
)  # fmt: skip
WORDS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "nin_shortcut",
    "out": "proj_out",
}


def _init(config: AutoencoderConfig) -> dict:
    return nets.init(replace(config, remat=False), jax.random.key(0))

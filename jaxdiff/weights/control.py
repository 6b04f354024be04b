"""ControlNet in the diffusers layout (config.json + safetensors) ⇄ configuration and parameter tree.

diffusers' ControlNetModel of Stable Diffusion 1, 2 and XL. As for the U-Net (`weights/latent_unet.py`), each setting is
either read or required to have the value that these have.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core import trees
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.weights import hub, latent_unet, sizes
from jaxdiff.weights.latent_unet import Vector
from jaxdiff.weights.tree import Unread


class Network(NamedTuple):
    """A ControlNet and the sizes of its inputs beside latents and hint."""

    control: ControlNetConfig
    text_width: int
    vector: Vector | None = None


def load_control(
    directory: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Network, dict]:
    """Load configuration and parameters from a directory; floating leaves in `dtype`, "float32" or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    directory = Path(directory)
    path = directory / "config.json"
    network = read_config(hub.read_json(path, "ControlNet"), path, dtype)
    return network, load_tensors(network, hub.open_tensors(directory, variant), dtype, place, str(directory))


def load_tensors(network: Network, tensors: Mapping[str, Unread], dtype: str, place: hub.Place, where: str) -> dict:
    """The parameters from tensors with diffusers' names. ValueError, naming `where`, if names or shapes differ."""
    shapes = sizes.shapes(_init, network, where)
    return hub.load_params(tensors, shapes, key_map(network, shapes), dtype, place, where)


def export_control(network: Network, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each atomically, for ControlNetModel.

    ValueError if `params` does not fit the network, OSError if writing fails.
    """
    directory = Path(directory)
    trees.check_tree(params, shapes_of(network), "the ControlNet to export")
    config = hub_config(network)
    hub.write_params(directory / latent_unet.FILE, params, key_map(network, params), dtype)
    hub.write_json(directory / "config.json", config)


def read_config(values: Mapping[str, Any], path: Path, dtype: str = "float32") -> Network:
    """Read the settings of a diffusers config.json. path: its name in messages. ValueError that names an unsupported
    setting."""
    config = latent_unet.open_settings(values, path, "ControlNetModel", FIXED, READ)
    control = ControlNetConfig(
        latent_unet.read_unet(config, latent_unet.attention_levels(config, "Down"), dtype),
        config.size("in_channels"),
        config.size("conditioning_channels"),
        _hint_widths(config),
    )
    return Network(control, config.size("cross_attention_dim"), latent_unet.read_vector(config))


def _hint_widths(config: hub.Group) -> tuple[int, ...]:
    name, (least, most) = "conditioning_embedding_out_channels", sizes.SIZE
    widths = config.values.get(name)
    if not isinstance(widths, list | tuple) or not 0 < len(widths) <= sizes.LEVELS:
        widths = (None,)
    if not all(type(width) is int and least <= width <= most for width in widths):
        wanted = f"1 to {sizes.LEVELS} whole numbers from {least} to {most}"
        raise config.error(name, config.values.get(name), wanted)
    return tuple(widths)


FIXED = latent_unet.FIXED_DOWN | {
    "controlnet_conditioning_channel_order": ("rgb", "rgb"),
    "global_pool_conditions": (False, False),
}
"""For each setting: diffusers' default, then the supported values."""
READ = latent_unet.READ_DOWN | {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
"""The settings that differ between families, with diffusers' defaults."""


def hub_config(network: Network) -> dict[str, Any]:
    """diffusers' settings of a ControlNet. ValueError for one that ControlNetModel cannot express."""
    control = network.control
    values = latent_unet.hub_settings(control.unet, network.text_width, network.vector) | {
        "in_channels": control.inputs,
        "conditioning_channels": control.hint_channels,
        "conditioning_embedding_out_channels": list(control.hint_widths),
    }
    if isinstance(values["layers_per_block"], list):
        raise ValueError(f"diffusers' ControlNet has as many blocks at each level, not {control.unet.blocks}")
    fixed = {name: allowed[0] for name, (_, *allowed) in FIXED.items()}
    return {"_class_name": "ControlNetModel"} | fixed | READ | values


def key_map(network: Network, params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its diffusers name."""
    return hub.names(trees.flatten(params), [*_OWN, *latent_unet.down_rules(network.vector)], latent_unet.WORDS)


_OWN = (
    ("hint/in/{leaf}", "controlnet_cond_embedding.conv_in.{leaf}"),
    ("hint/block_{i}/{leaf}", "controlnet_cond_embedding.blocks.{i}.{leaf}"),
    ("hint/out/{leaf}", "controlnet_cond_embedding.conv_out.{leaf}"),
    ("zero_middle/{leaf}", "controlnet_mid_block.{leaf}"),
    ("zero_{i}/{leaf}", "controlnet_down_blocks.{i}.{leaf}"),
)


def shapes_of(network: Network) -> dict:
    """The shapes of the parameters."""
    return sizes.shapes_of(_init, network)


def _init(network: Network) -> dict:
    control, side = network.control, network.control.unet.stride
    conditioning = latent_unet.example(control.unet, network.text_width, network.vector)
    hint = jnp.zeros((1, control.hint_stride * side, control.hint_stride * side, control.hint_channels))
    x = jnp.zeros((1, side, side, control.inputs))
    return control.module().init(jax.random.key(0), x, jnp.zeros(1), hint, conditioning)["params"]

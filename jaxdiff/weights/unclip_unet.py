"""unCLIP's U-Nets in the diffusers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Karlo's decoder: a UNet2DConditionModel, with the layers before it in a folder of its own, UnCLIPTextProjModel. One of
Karlo's upsamplers: a UNet2DModel without attention. Kandinsky 2.2's decoder: a UNet2DConditionModel that reads an image
embedding. Their blocks are DeepFloyd IF's (`weights/deepfloyd.py`). Each setting of these classes is either read or
required to have the public value.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import settings, trees
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.image_readers import ImageTokens, TextWithImage
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.weights import deepfloyd, hub, sizes
from jaxdiff.weights.deepfloyd import NORM_GROUPS
from jaxdiff.weights.latent_unet import FILE, open_settings


class Network(NamedTuple):
    """A U-Net and the sizes of its inputs. embedding: width of what it reads, text states and image embedding; 0 for an
    upsampler. channels: of the images or latents."""

    unet: UNetConfig
    embedding: int
    channels: int = 3


class Folders(NamedTuple):
    """The folders of one network. projection: that of Karlo's UnCLIPTextProjModel."""

    unet: Path
    projection: Path | None = None


def load_decoder(
    folders: Folders, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Network, dict]:
    """Load a decoder: Karlo's, or without a folder of projections Kandinsky 2.2's; floating leaves in `dtype`.

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    path = folders.unet / "config.json"
    values = hub.read_json(path, "decoder")
    if folders.projection is None:
        network = read_image_decoder(values, path, dtype)
    else:
        projection = folders.projection / "config.json"
        network = read_decoder((values, path), (hub.read_json(projection, "projections"), projection), dtype)
    return network, _load(network, folders, dtype, variant, place)


def load_upsampler(
    directory: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Network, dict]:
    """Load one of Karlo's upsamplers; as `load_decoder`."""
    path = Path(directory) / "config.json"
    network = read_upsampler(hub.read_json(path, "upsampler"), path, dtype)
    return network, _load(network, Folders(Path(directory)), dtype, variant, place)


def _load(network: Network, folders: Folders, dtype: str, variant: str | None, place: hub.Place) -> dict:
    shapes = sizes.shapes(_init, network, str(folders.unet / "config.json"))
    params: dict = {}
    for folder, part in zip(folders, _parts(network, shapes)):
        if folder is not None:
            tensors = hub.open_tensors(folder, variant)
            params |= hub.load_params(tensors, part, key_map(network, part), dtype, place, str(folder))
    if isinstance(network.unet.conditioning.text, ImageTokens):
        params["text"][NULL] = place(np.zeros(network.embedding, jnp.dtype(dtype)))
    return params


NULL = "null"
"""A parameter that Kandinsky's files lack: the embedding without an image, which its pipelines compute
(`weights/kandinsky.py`). Zeros until it is set."""


def export_unet(
    network: Network, params: dict, folders: Folders, dtype: str = "float32", *, sample_size: int | None = None
) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors of each folder, each atomically.

    sample_size: side of the images, which a pipeline reads. ValueError if the network is none of unCLIP's or `params`
    does not fit it, OSError if writing fails.
    """
    check(network, params)
    unet, projection = hub_configs(network)
    values = unet | {"sample_size": sample_size}, projection
    for folder, part, config in zip(folders, _parts(network, params), values):
        if folder is not None and config is not None:
            hub.write_params(folder / FILE, part, key_map(network, part), dtype)
            hub.write_json(folder / "config.json", config)


def check(network: Network, params: dict, where: str = "the U-Net to export") -> None:
    """ValueError, naming `where` the parameters are from, if `export_unet` would refuse them."""
    hub_configs(network)
    trees.check_tree(params, shapes_of(network), where)


def _parts(network: Network, params: dict) -> tuple[dict, dict]:
    """The parameters in the folder of the U-Net, and those of Karlo's projections."""
    apart = ("text", "vector") if isinstance(network.unet.conditioning.text, TextWithImage) else ()
    unet = {name: value for name, value in params.items() if name not in apart}
    if isinstance(network.unet.conditioning.text, ImageTokens):
        unet["text"] = {name: value for name, value in unet["text"].items() if name != NULL}
    return unet, {name: value for name, value in params.items() if name in apart}


Settings = tuple[Mapping[str, Any], Path]
"""The content of a config.json, and its name in messages."""


def read_decoder(decoder: Settings, projection: Settings, dtype: str = "float32") -> Network:
    """Karlo's decoder, from the settings of both folders. ValueError that names an unsupported setting."""
    config = open_settings(*decoder, CONDITIONED, FIXED_DECODER, READ)
    before = open_settings(*projection, PROJECTION, {}, READ_PROJECTION)
    width, channels = config.size("cross_attention_dim"), deepfloyd.level_widths(config)[0]
    for name, wanted in (("cross_attention_dim", width), ("time_embed_dim", 4 * channels)):
        before.require(name, (wanted,))
    reader = TextWithImage(width, before.size("clip_extra_context_tokens", None, *sizes.STEPS))
    return Network(_attending(config, reader, dtype), before.size("clip_embeddings_dim"), config.size("in_channels"))


def read_image_decoder(values: Mapping[str, Any], path: Path, dtype: str = "float32") -> Network:
    """Kandinsky 2.2's decoder. ValueError that names an unsupported setting."""
    config = open_settings(values, path, CONDITIONED, FIXED_IMAGE_DECODER, READ)
    reader = ImageTokens(config.size("cross_attention_dim"))
    return Network(_attending(config, reader, dtype), config.size("encoder_hid_dim"), config.size("in_channels"))


def _attending(config: hub.Group, reader: TextWithImage | ImageTokens, dtype: str) -> UNetConfig:
    """The U-Net of a decoder."""
    widths, channels = deepfloyd.level_widths(config), config.size("in_channels")
    config.require("out_channels", (2 * channels, channels))
    attends = deepfloyd.attention_levels(config, len(widths))
    attending = [width for width, attend in zip(widths, attends) if attend]
    head = deepfloyd.divisor(config, "attention_head_dim", *attending)
    unet = UNetConfig(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=deepfloyd.levels(config, "layers_per_block", sizes.DEPTH, len(widths)),
        attention=AttentionConfig(attends, (False,) * len(widths), head_channels=head, normalize_text=False),
        conditioning=ConditioningConfig(4 * widths[0], reader, frequencies=widths[0]),
        learned_variance=config.values["out_channels"] == 2 * channels,
        norm_groups=NORM_GROUPS,
        execution=ExecutionConfig(dtype=hub.check_dtype(dtype)),
    )
    sizes.check_network(unet, str(config.path))
    return unet


def read_upsampler(values: Mapping[str, Any], path: Path, dtype: str = "float32") -> Network:
    """One of Karlo's upsamplers. ValueError that names an unsupported setting."""
    config = open_settings(values, path, UNCONDITIONED, FIXED_UPSAMPLER, READ_UPSAMPLER)
    widths, channels = deepfloyd.level_widths(config), config.size("out_channels")
    config.require("in_channels", (2 * channels,))
    for way in ("Down", "Up"):
        config.require(f"{way.lower()}_block_types", ([f"Resnet{way}sampleBlock2D"] * len(widths),))
    none = (False,) * len(widths)
    unet = UNetConfig(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=(config.size("layers_per_block", None, *sizes.DEPTH),) * len(widths),
        attention=AttentionConfig(none, none),
        conditioning=ConditioningConfig(4 * widths[0], None, frequencies=widths[0]),
        scale_shift=config.values["resnet_time_scale_shift"] == "scale_shift",
        norm_groups=NORM_GROUPS,
        execution=ExecutionConfig(dtype=hub.check_dtype(dtype)),
    )
    sizes.check_network(unet, str(path))
    return Network(unet, 0, channels)


CONDITIONED, UNCONDITIONED, PROJECTION = "UNet2DConditionModel", "UNet2DModel", "UnCLIPTextProjModel"
READ: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": None,  # neither default of these two is unCLIP's
    "up_block_types": None,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "sample_size": None,  # read by the model
    "dropout": 0.0,  # training only
    "addition_embed_type_num_heads": 64,  # of another addition_embed_type
}
"""The settings that differ between decoders, with diffusers' defaults."""
FIXED_DECODER: dict[str, tuple] = {
    **{name: values for name, values in deepfloyd.FIXED.items() if name not in READ},
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "mid_block_scale_factor": (1, 1),
    "act_fn": ("silu", "silu"),
    "only_cross_attention": (False, False),
    "mid_block_only_cross_attention": (None, None, False),
    "class_embed_type": (None, "identity"),
    "encoder_hid_dim_type": (None, None),
    "addition_embed_type": (None, None),
    "cross_attention_norm": (None, None),
    "resnet_skip_time_act": (False, False),
    "resnet_out_scale_factor": (1.0, 1.0),
    "time_embedding_dim": (None, None),
    "time_embedding_act_fn": (None, None),
}
"""For each setting: diffusers' default, then the supported values."""
FIXED_IMAGE_DECODER = FIXED_DECODER | {
    "class_embed_type": (None, None),
    "encoder_hid_dim_type": (None, "image_proj"),
    "addition_embed_type": (None, "image"),
}
READ_PROJECTION: dict[str, Any] = {
    "clip_extra_context_tokens": 4,
    "clip_embeddings_dim": 768,
    "time_embed_dim": None,
    "cross_attention_dim": None,
}
READ_UPSAMPLER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": None,
    "up_block_types": None,
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "resnet_time_scale_shift": "default",
    "sample_size": None,
    "dropout": 0.0,
    "attention_head_dim": 8,  # there is no attention
}
FIXED_UPSAMPLER: dict[str, tuple] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (0, 0),
    "flip_sin_to_cos": (True, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_num_groups": (32, NORM_GROUPS),
    "attn_norm_num_groups": (None, None),
    "norm_eps": (1e-5, 1e-5),
    "add_attention": (True, False),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
    "num_train_timesteps": (None, None),
}


def hub_configs(network: Network) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """diffusers' settings of a U-Net, and those of Karlo's projections. ValueError for a setting that these classes
    cannot express."""
    unet, reader, before = network.unet, network.unet.conditioning.text, None
    dtype, path, channels = unet.execution.dtype, Path("config.json"), network.channels
    if not isinstance(reader, TextWithImage | ImageTokens | None):
        raise ValueError(f"diffusers' U-Nets of unCLIP have no conditioning.text = {reader}")
    if isinstance(reader, TextWithImage):
        fixed = {"_class_name": CONDITIONED} | _first(FIXED_DECODER)
        before = {
            "_class_name": PROJECTION,
            "clip_extra_context_tokens": reader.extra,
            "clip_embeddings_dim": network.embedding,
            "time_embed_dim": unet.conditioning.width,
            "cross_attention_dim": reader.width,
        }
        config = fixed | READ | _levels(unet, channels) | {"cross_attention_dim": reader.width}
        back = read_decoder((config, path), (before, path), dtype)
    elif isinstance(reader, ImageTokens):
        fixed = {"_class_name": CONDITIONED} | _first(FIXED_IMAGE_DECODER)
        widths = {"cross_attention_dim": reader.width, "encoder_hid_dim": network.embedding}
        config = fixed | READ | _levels(unet, channels) | widths
        back = read_image_decoder(config, path, dtype)
    else:
        fixed = {"_class_name": UNCONDITIONED} | _first(FIXED_UPSAMPLER)
        config = fixed | READ_UPSAMPLER | _levels(unet, channels)
        back = read_upsampler(config, path, dtype)
    _check_same(back, network, config["_class_name"])
    return config, before


def _first(fixed: Mapping[str, tuple]) -> dict[str, Any]:
    return {name: allowed[0] for name, (_, *allowed) in fixed.items()}


def _levels(unet: UNetConfig, channels: int) -> dict[str, Any]:
    """The settings that a level or an input has."""
    attends = unet.attention.self_attention
    blocks: dict[str, Any] = {"layers_per_block": unet.blocks[0] if len(set(unet.blocks)) == 1 else list(unet.blocks)}
    down, up = (
        [f"SimpleCrossAttn{way}Block2D" if attend else f"Resnet{way}sampleBlock2D" for attend in attends]
        for way in ("Down", "Up")
    )
    values = blocks | {
        "in_channels": channels,
        "out_channels": 2 * channels if unet.learned_variance else channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [unet.width(level) for level in range(len(unet.blocks))],
    }
    if unet.attends:
        return values | {"attention_head_dim": unet.attention.head_channels}
    scale_shift = {"resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default"}
    return values | scale_shift | {"in_channels": 2 * channels}


def _check_same(back: Network, network: Network, kind: str) -> None:
    """ValueError, naming a setting, if the network that was written is another one."""
    plain = [settings.flatten(replace(each.unet, execution=ExecutionConfig())) for each in (back, network)]
    name = settings.first_difference(*plain)
    if name is not None or type(network.unet) is not UNetConfig:
        name, value = (name, plain[1].get(name)) if name else ("unet", type(network.unet).__name__)
        raise ValueError(f"diffusers' {kind} of unCLIP has no {name} = {value}")


def key_map(network: Network, params: dict) -> dict[str, str]:
    """Maps each parameter path of one folder, joined by "/", to its diffusers name."""
    text = {name: params[name] for name in ("text", "vector") if name in params}
    rest = {name: value for name, value in params.items() if name not in text}
    rules = RULES if isinstance(network.unet.conditioning.text, TextWithImage) else IMAGE_RULES
    return hub.names(trees.flatten(text), rules, deepfloyd.WORDS) | deepfloyd.key_map(network.unet, rest)


RULES = (
    ("vector/{leaf}", "embedding_proj.{leaf}"),
    ("text/null", "learned_classifier_free_guidance_embeddings"),
    ("text/image_vector/{leaf}", "clip_image_embeddings_project_to_time_embeddings.{leaf}"),
    ("text/image_tokens/{leaf}", "clip_extra_context_tokens_proj.{leaf}"),
    ("text/states/{leaf}", "encoder_hidden_states_proj.{leaf}"),
    ("text/norm/{leaf}", "text_encoder_hidden_states_norm.{leaf}"),
)
IMAGE_RULES = (
    ("text/tokens/{leaf}", "encoder_hid_proj.image_embeds.{leaf}"),
    ("text/tokens_norm/{leaf}", "encoder_hid_proj.norm.{leaf}"),
    ("text/vector/{leaf}", "add_embedding.image_proj.{leaf}"),
    ("text/vector_norm/{leaf}", "add_embedding.image_norm.{leaf}"),
)


def shapes_of(network: Network) -> dict:
    """The shapes of the parameters."""
    return sizes.shapes_of(_init, network)


def _init(network: Network) -> dict:
    side, width = network.unet.stride, network.embedding
    x, one = jnp.zeros((1, side, side, network.channels)), jnp.zeros(1)
    given = Conditioning(tokens=jnp.zeros((1, 2, width)), token_mask=jnp.ones((1, 2), bool))
    if isinstance(network.unet.conditioning.text, TextWithImage):
        given = given._replace(vector=jnp.zeros((1, width)))
    if network.unet.conditioning.text is None:
        given = Conditioning(concat=x)
    return network.unet.module().init(jax.random.key(0), x, one, given)["params"]

"""DeepFloyd IF's U-Nets in the diffusers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Both stages in every size: diffusers' UNet2DConditionModel with simple cross-attention blocks. Each setting of that
class is either read or required to have IF's value.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core import trees
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.conditioning import Conditioning, WholeText
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.weights import hub, sizes


class Network(NamedTuple):
    """One of IF's U-Nets. text_width: width of its text embeddings. low_res: whether it is super-resolution."""

    unet: UNetConfig
    text_width: int
    low_res: bool


def load_unet(
    directory: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> tuple[Network, dict]:
    """Load configuration and parameters from a directory; floating leaves in `dtype`, "float32" or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    directory, compute_type = Path(directory), hub.check_dtype(dtype)
    config = read_config(directory / "config.json", compute_type)
    tensors = hub.open_tensors(directory, variant)
    shapes = sizes.shapes(_init, config, str(directory / "config.json"))
    return config, hub.load_params(tensors, shapes, key_map(config.unet, shapes), dtype, place, str(directory))


def export_unet(network: Network, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each atomically, for UNet2DConditionModel.

    ValueError if the network is not of IF's architecture or `params` does not fit it, OSError if writing fails.
    """
    directory = Path(directory)
    config, names = described(network, params), key_map(network.unet, params)
    hub.write_params(directory / "diffusion_pytorch_model.safetensors", params, names, dtype)
    hub.write_json(directory / "config.json", config)


def described(network: Network, params: dict) -> dict[str, Any]:
    """The settings that `export_unet` writes. Raises the same ValueError."""
    config = _hub_config(network)
    trees.check_tree(params, _shapes(network), "the U-Net to export")
    return config


def read_config(path: Path, dtype: hub.Dtype = "float32") -> Network:
    """Read a diffusers config.json. ValueError that names an unsupported setting."""
    values = hub.read_json(path, "U-Net")
    unknown = sorted(name for name in values if not name.startswith("_") and name not in {*FIXED, *READ})
    if unknown:
        raise ValueError(f"{path}: unknown settings of UNet2DConditionModel: {sizes.names(unknown)}")
    settings = hub.Group(path, {name: value for name, value in (READ | values).items() if value is not None})
    settings.require("_class_name", ("UNet2DConditionModel",))
    for name, (default, *allowed) in FIXED.items():
        settings.require(name, tuple(allowed), default)
    widths = level_widths(settings)
    attends, cross = attention_levels(settings, len(widths)), settings.flag("only_cross_attention", False)
    settings.require("mid_block_only_cross_attention", (cross,), cross)
    low_res = settings.values.get("class_embed_type") is not None
    settings.require("class_embed_type", ("timestep",), "timestep")
    settings.require("in_channels", (6 if low_res else 3,))
    settings.require("out_channels", (3, 6))
    settings.require("act_fn", tuple(activation.value for activation in Activation))
    # The activation of the conditioning vector, applied once before all blocks or in each: numerically the same.
    once = settings.flag("resnet_skip_time_act", False)
    settings.require("time_embedding_act_fn", (settings.values["act_fn"],) if once else (None,))
    scale = settings.values.get("resnet_out_scale_factor")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1e30:
        raise settings.error("resnet_out_scale_factor", scale, "a number above 0 and up to 1e30")
    settings.require("mid_block_scale_factor", (scale,))
    text_width, context = settings.size("encoder_hid_dim"), _group_multiple(settings, "cross_attention_dim")
    attention = AttentionConfig(
        self_attention=tuple(attend and not cross for attend in attends),
        cross_attention=tuple(attend and cross for attend in attends),
        head_channels=divisor(settings, "attention_head_dim", *(w for w, attend in zip(widths, attends) if attend)),
        group_text=True,
    )
    config = UNetConfig(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=levels(settings, "layers_per_block", sizes.DEPTH, len(widths)),
        attention=attention,
        conditioning=ConditioningConfig(
            width=settings.size("time_embedding_dim", 4 * widths[0]),
            text=WholeText(context, pool_heads=divisor(settings, "addition_embed_type_num_heads", text_width)),
            frequencies=widths[0],
        ),
        learned_variance=settings.values["out_channels"] == 6,
        activation=Activation(settings.values["act_fn"]),
        norm_groups=NORM_GROUPS,
        residual_scale=1.0 / scale,
        execution=ExecutionConfig(dtype=dtype),
    )
    sizes.check_network(config, str(path))
    return Network(config, text_width, low_res)


def level_widths(config: hub.Group) -> tuple[int, ...]:
    """The width of each level; ValueError unless they are multiples of the first."""
    widths = levels(config, "block_out_channels", sizes.SIZE)
    if any(width % widths[0] for width in widths) or widths[0] % NORM_GROUPS:
        wanted = f"multiples of the first, and that one of {NORM_GROUPS}"
        raise config.error("block_out_channels", list(widths), wanted)
    return widths


def levels(config: hub.Group, name: str, bounds: sizes.Bounds, count: int | None = None) -> tuple[int, ...]:
    """A number within bounds for each of up to `sizes.LEVELS` levels; a single number applies to all."""
    value = config.values.get(name)
    listed = value if isinstance(value, list) else []
    values = [value] * (count or 0) if type(value) is int else listed
    good = 0 < len(values) <= sizes.LEVELS and len(values) == (count or len(values))
    if not good or not all(type(n) is int and bounds.least <= n <= bounds.most for n in values):
        wanted = f"whole numbers from {bounds.least} to {bounds.most}, one for each level of at most {sizes.LEVELS}"
        raise config.error(name, value, wanted)
    return tuple(values)


def attention_levels(config: hub.Group, count: int) -> tuple[bool, ...]:
    """Which levels have attention; ValueError unless down and up paths agree."""
    attends = []
    for name, step in (("down_block_types", 1), ("up_block_types", -1)):
        way = "Down" if step == 1 else "Up"
        kinds, value = (f"Resnet{way}sampleBlock2D", f"SimpleCrossAttn{way}Block2D"), config.values.get(name)
        if not isinstance(value, list) or len(value) != count or any(kind not in kinds for kind in value):
            raise config.error(name, value, f"{count} of {' and '.join(kinds)}")
        attends.append(tuple(kind == kinds[1] for kind in value)[::step])
    if attends[0] != attends[1] or not attends[0][-1]:
        wanted = "those that mirror down_block_types, with attention at the lowest level"
        raise config.error("up_block_types", config.values["up_block_types"], wanted)
    return attends[0]


def divisor(config: hub.Group, name: str, *widths: int) -> int:
    """A size that divides all the widths."""
    size = config.size(name)
    uneven = [width for width in widths if width % size]
    if uneven:
        raise config.error(name, size, f"a divisor of {uneven[0]}")
    return size


def _group_multiple(config: hub.Group, name: str) -> int:
    size = config.size(name)
    if size % NORM_GROUPS:
        raise config.error(name, size, f"a multiple of {NORM_GROUPS}")
    return size


NORM_GROUPS = 32
FIXED = {
    "center_input_sample": (False, False),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "downsample_padding": (1, 1),
    "norm_num_groups": (32, NORM_GROUPS),
    "norm_eps": (1e-5, 1e-5),
    "transformer_layers_per_block": (1, 1),
    "reverse_transformer_layers_per_block": (None, None),
    "encoder_hid_dim_type": (None, "text_proj", None),
    "num_attention_heads": (None, None),
    "dual_cross_attention": (False, False),
    "use_linear_projection": (False, False),
    "addition_embed_type": (None, "text"),
    "addition_time_embed_dim": (None, None),
    "num_class_embeds": (None, None),
    "upcast_attention": (False, False),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional", "positional"),
    "timestep_post_act": (None, None),
    "time_cond_proj_dim": (None, None),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "projection_class_embeddings_input_dim": (None, None),
    "attention_type": ("default", "default"),
    "class_embeddings_concat": (False, False),
    "cross_attention_norm": (None, "group_norm"),
}
"""For each setting: diffusers' default, then the supported values."""
READ = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": None,  # neither default of these two is IF's
    "up_block_types": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "mid_block_scale_factor": 1,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "sample_size": None,  # read by the stage
    "dropout": 0.0,  # training only
}
"""The settings that differ between IF's stages and sizes, with diffusers' defaults."""


def _hub_config(network: Network) -> dict[str, Any]:
    """diffusers' settings of a network. ValueError naming a setting that UNet2DConditionModel cannot express."""
    config, attention, text = network.unet, network.unet.attention, network.unet.conditioning.text
    attends = [a or b for a, b in zip(attention.self_attention, attention.cross_attention)]
    cross = any(attention.cross_attention)
    _check_exportable(config, attends)
    assert isinstance(text, WholeText)  # see `_check_exportable`
    kinds = ["SimpleCrossAttn" if a else "Resnet" for a in attends]
    plain, attending = ("DownsampleBlock2D", "UpsampleBlock2D"), ("DownBlock2D", "UpBlock2D")
    down, up = ([kind + (attending if a else plain)[i] for kind, a in zip(kinds, attends)] for i in (0, 1))
    scale = 1.0 / config.residual_scale
    values = {
        "in_channels": 6 if network.low_res else 3,
        "out_channels": 6 if config.learned_variance else 3,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "only_cross_attention": cross,
        "block_out_channels": [config.width(level) for level in range(len(config.blocks))],
        "layers_per_block": list(config.blocks),
        "act_fn": config.activation.value,
        "attention_head_dim": attention.head_channels,
        "cross_attention_dim": text.width,
        "encoder_hid_dim": network.text_width,
        "addition_embed_type_num_heads": text.pool_heads or max(1, network.text_width // 64),
        "class_embed_type": "timestep" if network.low_res else None,
        "resnet_skip_time_act": network.low_res,
        "time_embedding_act_fn": config.activation.value if network.low_res else None,
        "resnet_out_scale_factor": scale,
        "mid_block_scale_factor": scale,
        "time_embedding_dim": config.conditioning.width,
    }
    fixed = {name: allowed[0] for name, (_, *allowed) in FIXED.items()}
    return {"_class_name": "UNet2DConditionModel"} | fixed | READ | values


def _check_exportable(config: UNetConfig, attends: list[bool]) -> None:
    attention, conditioning = config.attention, config.conditioning
    text = conditioning.text
    mixed = any(attention.cross_attention) and any(attention.self_attention)
    wanted = {
        "conditioning.text": (isinstance(text, WholeText), "WholeText", text),
        "conditioning.text.pool": (isinstance(text, WholeText) and text.pool, True, False),
        "attention.group_text": (attention.group_text, True, False),
        "attention.normalize_text": (attention.normalize_text, True, False),
        "scale_shift": (config.scale_shift, True, False),
        "norm_groups": (config.norm_groups == NORM_GROUPS, NORM_GROUPS, config.norm_groups),
        "conditioning.frequencies": (
            conditioning.frequencies == config.channels,
            "that of channels",
            conditioning.frequencies,
        ),
        "attention.heads": (attention.heads == 0, 0, attention.heads),
        "attention.feed_forward": (attention.feed_forward == 0, 0, attention.feed_forward),
        "patch": (config.patch == 1, 1, config.patch),
        "skip_scale": (config.skip_scale == 1.0, 1.0, config.skip_scale),
        "coordinates": (not config.coordinates, False, config.coordinates),
        "conditioned_head": (not config.conditioned_head, False, config.conditioned_head),
        "input_skip": (not config.input_skip, False, config.input_skip),
        "multipliers": (config.multipliers[0] == 1, "1 at first", config.multipliers),
        "attention.cross_attention": (
            attends[-1] and not mixed,
            "on, or self_attention, not both",
            attention.cross_attention,
        ),
        "unet": (type(config) is UNetConfig, "UNetConfig", type(config).__name__),
    }
    for name, (fits, only, value) in wanted.items():
        if not fits:
            raise ValueError(f"diffusers' layout of DeepFloyd IF has no {name} = {value}: it has to be {only}")


def key_map(config: UNetConfig, params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its diffusers name."""
    last = len(config.blocks) - 1
    # diffusers numbers the levels of the up path from the lowest.
    up = [
        (ours.replace("{level}", str(level)), theirs.replace("{level}", str(last - level)))
        for level in range(last + 1)
        for ours, theirs in UP
    ]
    return hub.names(trees.flatten(params), [*DOWN, *up, *TOP], WORDS)


def _block_rules(block: tuple[str, str], layers: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{block[0]}/{ours}/{{leaf}}", f"{block[1]}.{theirs}.{{leaf}}") for ours, theirs in layers.items()]


_RES = {
    "Norm_0/GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "Norm_1/GroupNorm_0": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
}
_ATTENTION = {
    "Norm_0/GroupNorm_0": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "text_norm/GroupNorm_0": "norm_cross",
    "text_k": "add_k_proj",
    "text_v": "add_v_proj",
    "out": "to_out.0",
}
DOWN = (
    *_block_rules(("down_{level}_{i}_{kind}", "down_blocks.{level}.attentions.{i}"), _ATTENTION),
    *_block_rules(("down_{level}_{i}", "down_blocks.{level}.resnets.{i}"), _RES),
    *_block_rules(("down_{level}", "down_blocks.{level}.downsamplers.0"), _RES),
)
UP = (
    *_block_rules(("up_{level}_{i}_{kind}", "up_blocks.{level}.attentions.{i}"), _ATTENTION),
    *_block_rules(("up_{level}_{i}", "up_blocks.{level}.resnets.{i}"), _RES),
    *_block_rules(("up_{level}", "up_blocks.{level}.upsamplers.0"), _RES),
)
TOP = (
    *_block_rules(("middle_self", "mid_block.attentions.0"), _ATTENTION),
    *_block_rules(("middle_cross", "mid_block.attentions.0"), _ATTENTION),
    *_block_rules(("middle_{i}", "mid_block.resnets.{i}"), _RES),
    ("stem/{leaf}", "conv_in.{leaf}"),
    ("head_norm/GroupNorm_0/{leaf}", "conv_norm_out.{leaf}"),
    ("head/{leaf}", "conv_out.{leaf}"),
    ("text/{leaf}", "encoder_hid_proj.{leaf}"),
    ("time/{layer}/{leaf}", "time_embedding.{layer}.{leaf}"),
    ("aug_level/{layer}/{leaf}", "class_embedding.{layer}.{leaf}"),
    ("pool/text_norm/{leaf}", "add_embedding.norm1.{leaf}"),
    ("pool/offset", "add_embedding.pool.positional_embedding"),
    ("pool/out/{leaf}", "add_embedding.proj.{leaf}"),
    ("pool/norm/{leaf}", "add_embedding.norm2.{leaf}"),
    ("pool/{part}/{leaf}", "add_embedding.pool.{part}_proj.{leaf}"),
)
WORDS = {"kernel": "weight", "scale": "weight", "Dense_0": "linear_1", "Dense_1": "linear_2"}


def _shapes(network: Network) -> dict:
    return sizes.shapes_of(_init, network)


def _init(network: Network) -> dict:
    side = network.unet.stride
    image, one = jnp.zeros((1, side, side, 3)), jnp.zeros(1)
    conditioning = Conditioning(jnp.zeros((1, 2, network.text_width)), jnp.ones((1, 2), bool))
    if network.low_res:
        conditioning = conditioning._replace(concat=image, aug_level=one)
    return network.unet.module().init(jax.random.key(0), image, one, conditioning)["params"]

"""unCLIP's prior in the diffusers layout (config.json + safetensors) ⇄ configuration, parameters and statistics.

diffusers' PriorTransformer: Karlo's and Kandinsky 2's. Each setting of that class is either read or required to have
the value that these have. The files also hold the mean and the deviation of CLIP's image embeddings: the prior works
on embeddings that are standardized by them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.core import trees
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.prior import ADDED, PriorConfig
from jaxdiff.weights import hub, lazy, sizes, tree
from jaxdiff.weights.latent_unet import FILE, open_settings
from jaxdiff.weights.tree import Unread

NAME = "PriorTransformer"


class Prior(NamedTuple):
    """mean, deviation (e): of CLIP's image embeddings."""

    config: PriorConfig
    params: dict
    mean: Array
    deviation: Array


def load_prior(
    directory: str | Path, dtype: str = "float32", *, variant: str | None = None, place: hub.Place = jnp.asarray
) -> Prior:
    """Load a prior from a directory; floating leaves in `dtype`, "float32" or "bfloat16".

    variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors are read one at a time.
    Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    directory = Path(directory)
    config = read_config(hub.read_json(directory / "config.json", "prior"), directory / "config.json", dtype)
    shapes = sizes.shapes(_init, config, str(directory / "config.json"))
    tensors = _without_axes(hub.open_tensors(directory, variant))
    params = hub.load_params(tensors, shapes, key_map(shapes), dtype, place, str(directory))
    return Prior(config, params["network"], params["statistics"]["mean"], params["statistics"]["deviation"])


def export_prior(prior: Prior, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each atomically, for PriorTransformer.

    ValueError if PriorTransformer cannot express the configuration or the parameters do not fit it, OSError if writing
    fails.
    """
    check(prior)
    directory, params = Path(directory), _tree(prior)
    named, tensors = key_map(params), {}
    for path, leaf in trees.flatten(params).items():
        array = hub.theirs(path, np.asarray(leaf).astype(jnp.dtype(dtype)))
        tensors[named[path]] = array.reshape((1,) * AXES.get(named[path], 0) + array.shape)
    tree.write_safetensors(directory / FILE, tensors, {"format": "pt"})
    hub.write_json(directory / "config.json", hub_config(prior.config))


def check(prior: Prior) -> None:
    """ValueError if `export_prior` would refuse the prior."""
    hub_config(prior.config)
    trees.check_tree(_tree(prior), shapes_of(prior.config), "the prior to export")


def _tree(prior: Prior) -> dict:
    return {"network": prior.params, "statistics": {"mean": prior.mean, "deviation": prior.deviation}}


def read_config(values: Mapping[str, Any], path: Path, dtype: str = "float32") -> PriorConfig:
    """Read the settings of a diffusers config.json. path: its name in messages. ValueError that names an unsupported
    setting."""
    settings = open_settings(values, path, NAME, FIXED, READ)
    for name in ("encoder_hid_proj_type", "added_emb_type"):  # whose null is another value than their default
        hub.require(path, values, name, FIXED[name][1:], FIXED[name][0])
    heads, embedding = settings.size("num_attention_heads"), settings.size("embedding_dim")
    width = heads * settings.size("attention_head_dim")
    if width > sizes.SIZE.most:
        raise settings.error("num_attention_heads", heads, f"a width of up to {sizes.SIZE.most}")
    for name, wanted in (
        ("time_embed_dim", width),
        ("embedding_proj_dim", embedding),
        ("clip_embed_dim", embedding),
    ):
        settings.require(name, (None, wanted))
    return PriorConfig(
        embedding=embedding,
        text_width=embedding,
        text_length=settings.size("num_embeddings", None, *sizes.STEPS),
        width=width,
        layers=settings.size("num_layers", None, *sizes.DEPTH),
        heads=heads,
        execution=ExecutionConfig(dtype=hub.check_dtype(dtype)),
    )


FIXED: dict[str, tuple] = {
    "additional_embeddings": (ADDED, ADDED),
    "time_embed_act_fn": ("silu", "silu"),
    "norm_in_type": (None, None),
    "embedding_proj_norm_type": (None, None),
    "encoder_hid_proj_type": ("linear", "linear"),
    "added_emb_type": ("prd", "prd"),
}
"""For each setting: diffusers' default, then the supported values."""
READ: dict[str, Any] = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "dropout": 0.0,  # training only
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
"""The settings that differ between priors, with diffusers' defaults."""


def hub_config(config: PriorConfig) -> dict[str, Any]:
    """diffusers' settings of a prior. ValueError for one that PriorTransformer cannot express."""
    for name, value, wanted in (
        ("text_width", config.text_width, config.embedding),
        ("feed_forward", config.feed_forward, 4),
    ):
        if value != wanted:
            raise ValueError(f"diffusers' {NAME} has no {name} = {value}: it has to be {wanted}")
    values = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.layers,
        "embedding_dim": config.embedding,
        "num_embeddings": config.text_length,
    }
    fixed = {name: allowed[0] for name, (_, *allowed) in FIXED.items()}
    return {"_class_name": NAME} | fixed | READ | values


def key_map(params: dict) -> dict[str, str]:
    """Maps each path of {"network": …, "statistics": …}, joined by "/", to its diffusers name."""
    return hub.names(trees.flatten(params), RULES, WORDS)


RULES = (
    ("network/layer_{i}/{part}/{leaf}", "transformer_blocks.{i}.{part}.{leaf}"),
    ("network/time/{layer}/{leaf}", "time_embedding.{layer}.{leaf}"),
    ("network/states/{leaf}", "encoder_hidden_states_proj.{leaf}"),
    ("network/caption/{leaf}", "embedding_proj.{leaf}"),
    ("network/image/{leaf}", "proj_in.{leaf}"),
    ("network/norm/{leaf}", "norm_out.{leaf}"),
    ("network/head/{leaf}", "proj_to_clip_embeddings.{leaf}"),
    ("network/query", "prd_embedding"),
    ("network/position", "positional_embedding"),
    ("statistics/mean", "clip_mean"),
    ("statistics/deviation", "clip_std"),
)
WORDS = {
    "kernel": "weight",
    "scale": "weight",
    "Dense_0": "linear_1",
    "Dense_1": "linear_2",
    "attention_norm": "norm1",
    "feed_forward_norm": "norm3",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "out": "attn1.to_out.0",
    "up": "ff.net.0.proj",
    "down": "ff.net.2",
}
AXES = {"prd_embedding": 2, "positional_embedding": 1, "clip_mean": 1, "clip_std": 1}
"""Leading axes of size 1 that diffusers' tensors have, and ours do not."""


def _without_axes(tensors: Mapping[str, Unread]) -> dict[str, Unread]:
    """Without the axes of `AXES`; a tensor of another shape stays as it is, and is refused by its name later."""
    result = dict(tensors)
    for name, axes in AXES.items():
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) > axes and shape[:axes] == (1,) * axes:
            result[name] = lazy.reshaped(tensors[name], shape[axes:])
    return result


def shapes_of(config: PriorConfig) -> dict:
    """The shapes of {"network": …, "statistics": …}."""
    return sizes.shapes_of(_init, config)


def _init(config: PriorConfig) -> dict:
    states = jnp.zeros((1, config.text_length, config.text_width))
    given = Conditioning(states, jnp.ones(states.shape[:2], bool), jnp.zeros((1, config.embedding)))
    x = jnp.zeros((1, 1, 1, config.embedding))
    network = config.module().init(jax.random.key(0), x, jnp.zeros(1), given)["params"]
    statistics = {"mean": jnp.zeros(config.embedding), "deviation": jnp.ones(config.embedding)}
    return {"network": network, "statistics": statistics}

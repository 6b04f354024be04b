"""The sizes of the networks in a single file: a family's configurations with the widths and depths of its tensors.

The public files have exactly their family's; others are narrower or have fewer layers. The numbers of heads cannot be
seen in shapes: where a width differs, heads are 64 wide, or eight as in Stable Diffusion 1.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.weights.tree import Unread

Config = dict[str, Any]
_HEAD = 64
"""Width of an attention head of CLIP's towers and of the newer U-Nets."""


def unet(config: Config, tensors: Mapping[str, Unread]) -> Config:
    """The U-Net's settings. tensors: with diffusers' names."""
    widths, fitted = _widths(config, tensors, "down_blocks"), dict(config)
    layers = config["transformer_layers_per_block"]
    if isinstance(layers, list):
        counts = [_count(tensors, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks") for i in range(len(widths))]
        fitted["transformer_layers_per_block"] = [count or own for count, own in zip(counts, layers)]
    if widths != config["block_out_channels"]:
        fitted["block_out_channels"] = widths
        if isinstance(config["attention_head_dim"], list):
            fitted["attention_head_dim"] = [max(1, width // _HEAD) for width in widths]
    return fitted


def autoencoder(config: Config, tensors: Mapping[str, Unread]) -> Config:
    """The autoencoder's settings. tensors: with diffusers' names."""
    return config | {"block_out_channels": _widths(config, tensors, "encoder.down_blocks")}


def text_encoder(config: Config, tensors: Mapping[str, Unread]) -> Config:
    """The text tower's settings. tensors: with transformers' names."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    tokens = tensors.get(f"{prefix}embeddings.token_embedding.weight")
    hidden = tensors.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    projection = tensors.get("text_projection.weight")
    fitted = dict(config)
    if tokens is not None and hidden is not None:
        fitted["num_hidden_layers"] = _count(tensors, re.escape(f"{prefix}encoder.layers"))
        fitted |= {"vocab_size": tokens.shape[0], "intermediate_size": hidden.shape[0]}
        if tokens.shape[1] != config["hidden_size"]:
            fitted |= {"hidden_size": tokens.shape[1], "num_attention_heads": max(1, tokens.shape[1] // _HEAD)}
    return fitted if projection is None else fitted | {"projection_dim": projection.shape[0]}


def _widths(config: Config, tensors: Mapping[str, Unread], blocks: str) -> list[int]:
    own = config["block_out_channels"]
    first = [tensors.get(f"{blocks}.{level}.resnets.0.conv1.weight") for level in range(len(own))]
    return [width if tensor is None else tensor.shape[0] for width, tensor in zip(own, first)]


def _count(tensors: Mapping[str, Unread], module: str) -> int:
    """The number of numbered modules. module: a regular expression for the name before the number."""
    pattern = re.compile(module + r"\.(\d+)\.")
    return max((int(found[1]) + 1 for name in tensors if (found := pattern.match(name))), default=0)

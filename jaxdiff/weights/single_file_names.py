"""The names of tensors in single files (those of CompVis' and Stability's code) ⇄ in diffusers and transformers.

Names are translated module by module: a table maps each module of the one layout to that of the other, and what
follows in a name is the same in both. The tables are made from a config.json, so that they hold for any number of
levels and layers. Four kinds of tensors change more than their name: OpenCLIP joins q, k and v and transposes its
projection, and the attention of the autoencoder is a convolution of 1×1.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdiff.weights import lazy, sizes
from jaxdiff.weights.tree import Unread

Modules = dict[str, str]
"""Module names of a single file, without the component's prefix → those of diffusers or transformers."""
Tensors = Mapping[str, Unread]

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_TIME = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
}


def unet(config: Mapping[str, Any], where: str = "the U-Net") -> Modules:
    """The modules of a UNet2DConditionModel. ValueError for settings that single files cannot hold."""
    layers, modules = _layers(config, where), _encoder(config, where)
    modules |= {"out.0": "conv_norm_out", "out.2": "conv_out", **_embedding(config, where)}
    number, last = 0, len(layers) - 1
    for level, crosses in enumerate(_crosses(config, "up_block_types", "UpBlock2D", where)):
        for layer in range(layers[last - level] + 1):
            modules |= _nested(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}", _RESNET)
            if crosses:
                modules[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{layer}"
            number += 1
        if level < last:
            modules[f"output_blocks.{number - 1}.{1 + crosses}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return modules


def controlnet(config: Mapping[str, Any], where: str = "the ControlNet") -> Modules:
    """The modules of a ControlNetModel: the U-Net's encoder and middle, the hint's encoder, zero convolutions."""
    modules = _encoder(config, where) | _embedding(config, where)
    outputs = sum(layers + 1 for layers in _layers(config, where))  # conv_in, and no downsampling after the last level
    modules |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(outputs)}
    modules["middle_block_out.0"] = "controlnet_mid_block"
    blocks = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    hint = ["conv_in", *(f"blocks.{i}" for i in range(blocks)), "conv_out"]  # between them are activations
    return modules | {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}


def autoencoder(config: Mapping[str, Any]) -> Modules:
    """The modules of an AutoencoderKL. Single files number the decoder's levels from the highest resolution."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        modules |= _nested(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _ATTENTION)
        for i in (1, 2):
            modules |= _autoencoder_resnet(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            modules |= _autoencoder_resnet(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}")
        for layer in range(layers + 1):
            modules |= _autoencoder_resnet(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}")
        if level < levels - 1:
            modules[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            modules[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return modules


def open_clip(config: Mapping[str, Any]) -> Modules:
    """The modules of OpenCLIP's text tower, with q, k and v apart (`split_qkv`), as in CLIPTextModelWithProjection."""
    modules = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
        "text_projection": "text_projection.weight",
    }
    for layer in range(config["num_hidden_layers"]):
        modules |= _nested(f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}", _LAYER)
    return modules


def renamed(tensors: Tensors, modules: Mapping[str, str], where: str) -> dict[str, Unread]:
    """Each tensor under the name of its innermost module in `modules`. ValueError, naming `where`, without one."""
    result, others = {}, []
    for name, tensor in tensors.items():
        inside = next((module for module in _enclosing(name) if module in modules), None)
        if inside is None:
            others.append(name)
        else:
            result[modules[inside] + name[len(inside) :]] = tensor
    if others:
        raise ValueError(f"{where}: {len(others)} tensors are not of this network ({sizes.names(sorted(others))})")
    return result


def inverse(modules: Modules) -> Modules:
    return {theirs: ours for ours, theirs in modules.items()}


def split_qkv(tensors: Tensors) -> dict[str, Unread]:
    """OpenCLIP's joined q, k and v, apart, and its projection transposed. Other tensors are returned unchanged."""
    result: dict[str, Unread] = {}
    for name, tensor in tensors.items():
        joint = re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", name)
        if joint and len(tensor.shape) and tensor.shape[0] % 3 == 0:
            width = tensor.shape[0] // 3
            for i, part in enumerate("qkv"):
                result[f"{joint[1]}{part}_proj.{joint[2]}"] = lazy.rows(tensor, i * width, (i + 1) * width)
        else:
            result[name] = lazy.transposed(tensor) if name == "text_projection" else tensor
    return result


def join_qkv(tensors: Tensors) -> dict[str, Unread]:
    """The inverse of `split_qkv`."""
    result: dict[str, Unread] = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
        three = [f"{part[1]}{letter}_proj.{part[3]}" for letter in "qkv"] if part else []
        if part is None or not all(other in tensors for other in three):
            result[name] = lazy.transposed(tensor) if name == "text_projection" else tensor
        elif part[2] == "q":
            result[f"{part[1]}in_proj_{part[3]}"] = lazy.joined([tensors[other] for other in three])
    return result


def _is_projection(name: str) -> bool:
    return re.fullmatch(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight", name) is not None


def squeeze_attention(tensors: Tensors) -> dict[str, Unread]:
    """The autoencoder's 1×1 convolutions as matrices."""
    return {
        name: lazy.reshaped(tensor, tuple(tensor.shape[:2]))
        if _is_projection(name) and len(tensor.shape) > 2 and math.prod(tensor.shape[2:]) == 1
        else tensor
        for name, tensor in tensors.items()
    }


def expand_attention(tensors: Tensors) -> dict[str, Unread]:
    """The inverse of `squeeze_attention`."""
    return {
        name: lazy.reshaped(tensor, (*tensor.shape, 1, 1))
        if _is_projection(name) and len(tensor.shape) == 2
        else tensor
        for name, tensor in tensors.items()
    }


def _encoder(config: Mapping[str, Any], where: str) -> Modules:
    """Time embedding, input, down path and middle."""
    layers = _layers(config, where)
    modules = _TIME | {"input_blocks.0.0": "conv_in"}
    number, last = 1, len(layers) - 1
    for level, crosses in enumerate(_crosses(config, "down_block_types", "DownBlock2D", where)):
        for layer in range(layers[level]):
            modules |= _nested(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET)
            if crosses:
                modules[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < last:
            modules[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    modules |= _nested("middle_block.0", "mid_block.resnets.0", _RESNET)
    modules |= _nested("middle_block.2", "mid_block.resnets.1", _RESNET)
    return modules | {"middle_block.1": "mid_block.attentions.0"}


def _embedding(config: Mapping[str, Any], where: str) -> Modules:
    """What is added to the time embedding: a class, or a projected vector."""
    if config.get("num_class_embeds") is not None:
        return {"label_emb": "class_embedding"}
    if config.get("addition_embed_type") == "text_time":
        return {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    if config.get("class_embed_type") == "projection":
        return {"label_emb.0.0": "class_embedding.linear_1", "label_emb.0.2": "class_embedding.linear_2"}
    for name in ("addition_embed_type", "class_embed_type"):
        if config.get(name) is not None:
            raise ValueError(f"{where}: {name} = {config[name]!r} has no place in a single file")
    return {}


def _layers(config: Mapping[str, Any], where: str) -> list[int]:
    """The number of layers at each level."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    if len(layers) != levels:
        raise ValueError(f"{where}: layers_per_block = {layers!r} is not a number for each of {levels} levels")
    return layers


def _crosses(config: Mapping[str, Any], setting: str, kind: str, where: str) -> Iterator[bool]:
    """Whether each level has cross-attention."""
    levels = len(config["block_out_channels"])
    if len(config[setting]) != levels or any(block not in (kind, f"CrossAttn{kind}") for block in config[setting]):
        raise ValueError(
            f"{where}: {setting} = {config[setting]!r}: single files have {levels} of CrossAttn{kind}, {kind}"
        )
    return (block != kind for block in config[setting])


def _autoencoder_resnet(ours: str, theirs: str) -> Modules:
    return {ours: theirs, f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut"}


def _nested(ours: str, theirs: str, inner: Mapping[str, str]) -> Modules:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}


def _enclosing(name: str) -> Iterator[str]:
    """The name and the modules around it, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]

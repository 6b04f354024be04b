"""An independent writer of LoRA files: keys from the names of torch's modules, numbers from numpy."""

from types import SimpleNamespace

import numpy as np
import pytest

SMALL = {
    "SD 1": {"cross_attention_dim": 24, "block_out_channels": (32, 64)},
    "SDXL": {
        "cross_attention_dim": 40,
        "block_out_channels": (32, 64),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
}
"""Of two levels, the second without attention in SD 1, the first in SDXL."""
SMALL["SD 1"] |= {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL["SDXL"] |= {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "projection_dim": 20,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}


def torch_unet(config, device="cpu"):
    """diffusers' network with random parameters, none of which is 0."""
    torch = pytest.importorskip("torch", reason="names and numbers of diffusers' network")
    diffusers = pytest.importorskip("diffusers")
    with torch.device(device):
        network = diffusers.UNet2DConditionModel(**{"layers_per_block": 1} | config).eval()
    return filled(network) if device == "cpu" else network


def torch_text(projected, **changes):
    """transformers' text tower."""
    pytest.importorskip("torch", reason="names and numbers of transformers' network")
    import transformers

    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return filled(kind(transformers.CLIPTextConfig(**TEXT | changes)).eval())


def filled(network):
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        drawn *= 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
        value.data = drawn + (value.ndim == 1 and name.endswith("weight"))
    return network


def layers(network):
    """The layers that may have a LoRA, by name: the weight's shape."""
    import torch

    kinds = torch.nn.Linear, torch.nn.Conv2d
    return {name: tuple(m.weight.shape) for name, m in network.named_modules() if isinstance(m, kinds)}


def random_lora(shapes, seed=0, ranks=(2, 3), alphas=(1.5,)):
    """down, up and alpha of each layer, in PyTorch's layout; ranks and alphas by turns."""
    rng = np.random.default_rng(seed)
    result = {}
    for i, (name, (out, width, *sides)) in enumerate(shapes.items()):
        rank, alpha = ranks[i % len(ranks)], alphas[i // 2 % len(alphas)]
        down, up = rng.normal(size=(rank, width, *sides)), rng.normal(size=(out, rank, *(1 for _ in sides)))
        result[name] = SimpleNamespace(
            down=(0.5 * down).astype("f4"), up=(0.1 * up).astype("f4"), alpha=alpha, rank=rank
        )
    return result


def change(layer, alpha=None):
    """(alpha / rank) · up · down of a layer, in the weight's shape."""
    scale = (layer.alpha if alpha is None else alpha) / layer.rank
    return scale * np.einsum("or...,rikl->oikl" if layer.down.ndim == 4 else "or,ri->oi", layer.up.squeeze()
                             if layer.up.ndim == 4 else layer.up, layer.down)  # fmt: skip


def hooked(network, lora, weight):
    """Adds weight · alpha / rank · up(down(x)) to the output of each layer: what no merged weight is needed for."""
    import torch

    def hook(layer, module, inputs, output):
        down, up = torch.tensor(layer.down), torch.tensor(layer.up)
        if down.ndim == 2:
            added = inputs[0] @ down.T @ up.T
        else:
            inner = torch.nn.functional.conv2d(inputs[0], down, stride=module.stride, padding=module.padding)
            added = torch.nn.functional.conv2d(inner, up)
        return output + weight * layer.alpha / layer.rank * added

    modules = dict(network.named_modules())
    return [modules[name].register_forward_hook(lambda *args, own=own: hook(own, *args)) for name, own in lora.items()]

"""Names of LoRA tensors of the public networks, against those of diffusers and its own converter."""

import functools

import lora_files
import numpy as np
import pytest

from jaxdiff.nets.clip import CLIPConfig, TextTowerConfig
from jaxdiff.weights import hub, latent_unet, lora_names
from jaxdiff.weights.lora_names import Networks, Part

PUBLIC = {
    "SD 1": {"cross_attention_dim": 768},
    "SD 2": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (320, 640),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10),
        "use_linear_projection": True,
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Of SD 2, whose levels have the names of SD 1, two of four."""
TOWERS = {
    "SD 1": [CLIPConfig(TextTowerConfig(768, 12, 12, 3072), None, None)],
    "SD 2": [CLIPConfig(TextTowerConfig(1024, 23, 16, 4096), None, None)],
    "SDXL": [
        CLIPConfig(TextTowerConfig(768, 12, 12, 3072), None, None),
        CLIPConfig(TextTowerConfig(1280, 32, 20, 5120), None, 1280),
    ],
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The public networks by name, in torch without numbers, and their names in ours."""

    @functools.cache
    def case(name):
        theirs = lora_files.torch_unet({"layers_per_block": 2} | PUBLIC[name], "meta")
        values = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
        network = latent_unet.read_config(values, tmp_path_factory.getbasetemp() / "config.json")
        return theirs, lora_names.components(Networks(network, tuple(TOWERS[name])))

    return case


@pytest.mark.parametrize("name", PUBLIC)
def test_every_layer_has_its_kernel(name, cases):
    """By each of its names in files."""
    theirs, known = cases(name)
    layers = lora_files.layers(theirs)
    assert len(layers) == len(known["model"].kernels) == len(set(known["model"].modules.values()))
    for layer, shape in layers.items():
        kernel = known["model"].path(layer)
        assert hub.theirs_shape("kernel", known["model"].kernels[kernel]) == shape
        assert known["model"].modules[kernel] == layer
        for key in (f"unet.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
            parsed = lora_names.parse(key)
            assert (parsed.network, parsed.part) == ("model", Part.DOWN)
            assert known["model"].path(parsed.module) == kernel
    single = known["model"].single_file
    assert len(single) == len(set(single.values())) == len(layers)
    assert all(known["model"].path(module) == kernel for kernel, module in single.items())


@pytest.mark.parametrize("name", PUBLIC)
def test_text_towers(name, cases):
    torch = pytest.importorskip("torch", reason="transformers' towers are PyTorch's")
    import transformers

    _, known = cases(name)

    for tower, config in zip(("text", "text_2"), TOWERS[name]):
        settings = transformers.CLIPTextConfig(
            hidden_size=config.text.width, intermediate_size=config.text.feed_forward, projection_dim=config.width or 1,
            num_attention_heads=config.text.heads, num_hidden_layers=config.text.layers, vocab_size=config.text.vocab,
        )  # fmt: skip
        kind = transformers.CLIPTextModelWithProjection if config.width else transformers.CLIPTextModel
        with torch.device("meta"):
            layers = lora_files.layers(kind(settings))
        assert len(layers) == len(known[tower].kernels) == 6 * config.text.layers + bool(config.width)
        for layer, shape in layers.items():
            kernel = known[tower].path(layer)
            assert hub.theirs_shape("kernel", known[tower].kernels[kernel]) == shape
            assert known[tower].modules[kernel] == layer if config.width else f"text_model.{layer}"


def test_names_of_single_files(cases):
    """As diffusers' own converter reads them, which it does for SDXL only."""
    theirs, known = cases("SDXL")
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    single, wanted = known["model"].single_file, known["model"].modules
    one = np.zeros((1, 1))
    for kernel, module in single.items():
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors = {f"{key}.lora_down.weight": one, f"{key}.lora_up.weight": one}
        state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=theirs.config)
        names = {name.removesuffix(".lora_A.weight") for name in convert_unet_state_dict_to_peft(state)}
        assert f"unet.{wanted[kernel]}" in names, module


def test_names_that_no_rule_undoes():
    """Underscores that are dots, and underscores that are not: only the network's own names tell."""
    known = lora_names.components(Networks(latent_unet.Network(latent_unet.LatentUNetConfig(), 4, 0, 768)))["model"]
    path = known.path("down_blocks_0_resnets_1_time_emb_proj")
    assert known.modules[path] == "down_blocks.0.resnets.1.time_emb_proj"
    assert known.path("down_blocks_0_resnets_9_time_emb_proj") is None
    assert (
        known.path("mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj") == "middle_attention/block_0/up/kernel"
    )


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("unet.conv_in.lora_A.weight", ("model", "conv_in", Part.DOWN)),
        ("unet.conv_in.lora_B.my-style_2.weight", ("model", "conv_in", Part.UP)),
        ("base_model.model.unet.conv_in.lora_B.weight", ("model", "conv_in", Part.UP)),
        ("text_encoder_2.base_model.model.a.b.lora_A.default.weight", ("text_2", "a.b", Part.DOWN)),
        ("lora_te_a_b.alpha", ("text", "a_b", Part.ALPHA)),
        ("lora_te2_a_b.lora_up.weight", ("text_2", "a_b", Part.UP)),
        ("lycoris_a_b.lora_up.weight", (None, "a_b", Part.UP)),
        ("a.attn1.processor.to_q_lora.up.weight", (None, "a.attn1.processor.to_q", Part.UP)),
        ("text_encoder.a.q_proj.lora_linear_layer.down.weight", ("text", "a.q_proj", Part.DOWN)),
        ("unet.a.to_q.lora.up.weight", ("model", "a.to_q", Part.UP)),
        ("conv_in.weight", None),
        ("unet.conv_in.lora_C.weight", None),
        (".lora_up.weight", None),
    ],
)
def test_keys(key, wanted):
    assert lora_names.parse(key) == wanted


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lycoris_a.lokr_w2_b", "LoKr"),
        ("lora_unet_a.dora_scale", "DoRA"),
        ("unet.a.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_a.lora_mid.weight", "a Tucker decomposition (lora_mid)"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.a1.weight", "GLoRA"),
        ("lora_unet_a.on_input", "IA3"),
        ("lora_unet_a.diff_b", "full differences"),
        ("unet.a.lora_B.bias", "trained biases"),
        ("unet.a.lora_embedding_A", "trained embeddings"),
        ("lora_unet_a.w_norm", "trained norms"),
        ("unet.a.lora_A.weight", None),
        ("lora_unet_a.alpha", None),
        ("unet.conv_norm_out.weight", None),
    ],
)
def test_other_algorithms(key, wanted):
    assert lora_names.unsupported(key) == wanted

"""The parity table: every public model that is read, beside PyTorch's own.

First the numbers: models of few parameters and the public topology, filled at random and saved by transformers or
diffusers, loaded by us. Then the names: the public sizes, whose every tensor must have its name and its shape. By
default those of the smallest size of each family, which has all kinds of tensors; of every size, with the whole
table, by `pytest -m slow tests/weights/test_parity.py`: shapes of the largest take seconds each to trace.
"""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import executed
from small_clip import OPEN, OPENAI

from jaxdiff.core import trees
from jaxdiff.nets import clip as clip_nets
from jaxdiff.nets import t5 as t5_nets
from jaxdiff.nets.conditioning import Conditioning, WholeText
from jaxdiff.nets.unet import ConditioningConfig
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.weights import clip, deepfloyd, hub, t5

ENCODER, UNET = 1e-4, 5e-4
"""The largest error allowed, of float32 outputs, relative to the largest value."""

SMALL_T5 = {
    "vocab_size": 300,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
T5 = {
    "T5 v1.0": ("T5ForConditionalGeneration", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "T5 v1.1, Flan-T5": ("T5ForConditionalGeneration", {}),
    "ByT5": ("T5ForConditionalGeneration", {"vocab_size": 384, "num_layers": 6, "num_decoder_layers": 2}),
    "mT5": ("MT5ForConditionalGeneration", {}),
    "mT5, encoder alone": ("MT5EncoderModel", {}),
    "UMT5": ("UMT5ForConditionalGeneration", {}),
    "UMT5, encoder alone": ("UMT5EncoderModel", {}),
}


def narrow(model):
    """All levels and every kind of block; two blocks at one level, as a chain of them must keep its order."""
    blocks = (1, 2) + (1,) * (len(model.unet.blocks) - 2)
    conditioning = ConditioningConfig(128, WholeText(32 * model.unet.multipliers[-1], pool_heads=4), frequencies=32)
    attention = replace(model.unet.attention, head_channels=16)
    unet = replace(model.unet, channels=32, blocks=blocks, attention=attention, conditioning=conditioning)
    return deepfloyd.Network(unet, 48, model.low_res is not None)


UNETS = {"DeepFloyd IF-I": narrow(presets.IF_I_M), "DeepFloyd IF-II": narrow(presets.IF_II_M)}

FLAN_SIZES = {
    "small": (512, 1024, 8, 8, 6, 64),
    "base": (768, 2048, 12, 12, 12, 64),
    "large": (1024, 2816, 24, 24, 16, 64),
    "xl": (2048, 5120, 24, 24, 32, 64),
    "xxl": (4096, 10240, 24, 24, 64, 64),
}
"""d_model, d_ff, layers, those of the decoder, heads, d_kv."""
V1_0_SIZES = {
    "small": (512, 2048, 6, 6, 8, 64),
    "base": (768, 3072, 12, 12, 12, 64),
    "large": (1024, 4096, 24, 24, 16, 64),
    "3b": (1024, 16384, 24, 24, 32, 128),
    "11b": (1024, 65536, 24, 24, 128, 128),
}
BYT5_SIZES = {
    "small": (1472, 3584, 12, 4, 6, 64),
    "base": (1536, 3968, 18, 6, 12, 64),
    "large": (1536, 3840, 36, 12, 16, 64),
    "xl": (2560, 6720, 36, 12, 32, 64),
    "xxl": (4672, 12352, 36, 12, 64, 64),
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES = {
    "T5 v1.0": ({"model_type": "t5", "vocab_size": 32128}, V1_0_SIZES, "60.51 222.90 737.67 2851.60 11307.32"),
    "T5 v1.1, Flan-T5": (
        {"model_type": "t5", "vocab_size": 32128} | GATED,
        FLAN_SIZES,
        "76.96 247.58 783.15 2849.76 11135.33",
    ),
    "ByT5": ({"model_type": "t5", "vocab_size": 384} | GATED, BYT5_SIZES, "300 582 1230 3740 12900"),
    "mT5": ({"model_type": "mt5", "vocab_size": 250112} | GATED, FLAN_SIZES, "300 580 1200 3700 13000"),
    "UMT5": (
        {"model_type": "umt5", "vocab_size": 256384} | GATED,
        {size: FLAN_SIZES[size] for size in ("small", "base", "xl", "xxl")},
        "? ? ? ?",
    ),
}
"""The settings that a family's sizes share, the sizes, and the millions of parameters that are published of each, in as
many digits. Of UMT5 none are: its sizes are v1.1's with more words."""
PUBLIC_UNETS = {
    "DeepFloyd IF-I-M": (presets.IF_I_M, "371.6"),
    "DeepFloyd IF-I-L": (presets.IF_I_L, "935.4"),
    "DeepFloyd IF-I-XL": (presets.IF_I_XL, "4304.7"),
    "DeepFloyd IF-II-M": (presets.IF_II_M, "466"),
    "DeepFloyd IF-II-L": (presets.IF_II_L, "1198"),
}
"""IF-II's widths are inferred from its published sizes, 450 M and 1.2 B, of which these come nearest."""


@pytest.mark.parametrize("sizes", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["smallest", "all"])
def test_parity(sizes, tmp_path, record_property):
    pytest.importorskip("torch", reason="the models that it compares with are PyTorch's")
    pytest.importorskip("diffusers", reason="DeepFloyd IF's U-Net is diffusers'")
    numbers = []
    for i, (name, (kind, settings)) in enumerate(T5.items()):
        numbers += [(name, *row, ENCODER) for row in compare_t5(kind, settings, tmp_path / f"t5_{i}")]
    for name, config in {"CLIP, OpenAI's": OPENAI, "CLIP, OpenCLIP's": OPEN}.items():
        numbers += [(name, *row, ENCODER) for row in compare_clip(config, tmp_path / name)]
    for name, network in UNETS.items():
        numbers += [(name, *row, UNET) for row in compare_unet(network, tmp_path / name)]
    public = [*t5_names(tmp_path, sizes), *unet_names(tmp_path, sizes)]
    lines = ["| model at random | output | largest error | tensors |", "|---|---|---|---|"]
    lines += [f"| {name} | {output} | {error:.1e} | {count} |" for name, output, error, count, _ in numbers]
    lines += ["", "| public model | parameters | tensors of the same names and shapes |", "|---|---|---|"]
    for name, millions, _, ours, theirs in public:
        lines.append(f"| {name} | {millions:,.2f} M | {len(ours.items() & theirs.items())} of {len(theirs)} |")
    record_property("table", "\n".join(lines))
    assert not [row for row in numbers if not row[2] <= row[4]]
    for name, millions, published, ours, theirs in public:
        assert ours == theirs, name
        digits = len(published.replace(".", "") if "." in published else published.rstrip("0"))
        assert published == "?" or float(f"{millions:.{digits}g}") == float(published), name


def compare_t5(kind, settings, directory):
    """(output, error, tensors) of a T5 that transformers saves."""
    import torch
    import transformers

    whole = kind.endswith("Generation")
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**SMALL_T5 | settings)).eval()
    if whole and not (SMALL_T5 | settings)["tie_word_embeddings"]:
        # transformers 5 would tie it all the same; the published files have both.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    fill(model).save_pretrained(directory)
    config, params = t5.load(directory)
    assert (config.decoder_layers > 0) == whole
    rng = np.random.default_rng(1)
    ids, said = (rng.integers(3, config.vocab, (3, length), dtype=np.int32) for length in (40, 9))
    mask = np.arange(40) < np.array([[40], [17], [1]])
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        theirs = model(**given, **({"decoder_input_ids": torch.tensor(said)} if whole else {}))
    count = len(trees.flatten(params))
    if whole:
        states, logits = jax.jit(partial(t5_nets.T5(config).apply, method=_both))({"params": params}, ids, mask, said)
        yield "logits", error(logits, theirs.logits), count
    else:
        states = jax.jit(t5_nets.T5Encoder(config).apply)({"params": params}, ids, mask)
    expected = theirs.encoder_last_hidden_state if whole else theirs.last_hidden_state
    yield "encoder's states", error(states[mask], expected[torch.tensor(mask)]), count


def _both(network, ids, mask, said):
    states = network.encode(ids, mask)
    return states, network.decode(said, states, mask)


def compare_clip(config, directory):
    import torch
    from transformers import CLIPConfig, CLIPModel

    model = fill(CLIPModel(CLIPConfig(**clip._hub_config(config, "float32"))).eval())
    model.save_pretrained(directory)
    found, params = clip.load(directory)
    assert found == config
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 110, (4, 12), dtype=np.int32)
    end = config.text.vocab - 1 if config.text.eos_id is None else config.text.eos_id
    for row, at in enumerate((11, 4, 1, 7)):
        ids[row, at] = ids[row, -1] = end
    image = rng.normal(size=(3, 28, 28, 3)).astype("f4")
    with torch.no_grad():
        pixels = torch.tensor(image).permute(0, 3, 1, 2)
        theirs = model(input_ids=torch.tensor(ids).long(), pixel_values=pixels)
    text, picture, logits = jax.jit(partial(_towers, clip_nets.CLIP(config)))({"params": params}, ids, image)
    count = len(trees.flatten(params))
    yield "text states", error(text.states, theirs.text_model_output.last_hidden_state), count
    yield "text embedding", error(unit(text.embedding), theirs.text_embeds), count
    yield "image embedding", error(unit(picture.embedding), theirs.image_embeds), count
    yield "logits", error(logits, theirs.logits_per_text), count


def _towers(network, variables, ids, image):
    run = partial(network.apply, variables)
    return run(ids, method="embed_text"), run(image, method="embed_image"), run(ids, image)


def compare_unet(network, directory):
    import torch
    from diffusers import UNet2DConditionModel

    model = fill(UNet2DConditionModel.from_config(deepfloyd._hub_config(network)).eval())
    model.save_pretrained(directory)
    found, params = deepfloyd.load_unet(directory)
    assert found == network
    rng = np.random.default_rng(1)
    picture, low = (rng.normal(size=(2, 32, 32, 3)).astype("f4") for _ in range(2))
    text = rng.normal(size=(2, 11, network.text_width)).astype("f4")
    time, level = np.array([3.0, 977.0], "f4"), np.array([250, 0])
    with torch.no_grad():
        given = np.concatenate([picture, low], -1) if network.low_res else picture
        levels = {"class_labels": torch.tensor(level)} if network.low_res else {}
        given = torch.tensor(given).permute(0, 3, 1, 2)
        theirs = model(given, torch.tensor(time), encoder_hidden_states=torch.tensor(text), **levels).sample
    low_res = {"concat": low, "aug_level": (level / 1000).astype("f4")} if network.low_res else {}
    conditioning = Conditioning(text, np.ones((2, 11), bool), **low_res)
    ours = jax.jit(network.unet.module().apply)({"params": params}, picture, time, conditioning)
    yield "prediction and variance", error(ours, theirs.permute(0, 2, 3, 1)), len(trees.flatten(params))


def fill(model):
    """Numbers at random in every parameter, as large as keep the outputs near one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                values = 2 + values
            elif parameter.ndim < 2:
                values = 0.1 * values + (name.endswith("weight"))
            elif not name.endswith(("shared.weight", "relative_attention_bias.weight")):
                values *= parameter[0].numel() ** -0.5
            parameter.copy_(values)
    return model


def error(ours, theirs):
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def unit(embedding):
    return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)


def t5_names(directory, most):
    """(name, millions of parameters, those published, our names and shapes, PyTorch's) of each public size, or of the
    first few of each family."""
    import torch
    import transformers

    path = directory / "config.json"
    for family, (shared, sizes, published) in FAMILIES.items():
        for (size, numbers), millions in list(zip(sizes.items(), published.split()))[:most]:
            widths = ("d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "d_kv")
            values = shared | dict(zip(widths, numbers))
            path.write_text(json.dumps(values))
            config = replace(t5.read_config(path), dtype="bfloat16")
            shapes = t5._shapes(config)
            kind = getattr(transformers, f"{shared['model_type'].upper()}ForConditionalGeneration")
            with torch.device("meta"):
                model = kind(kind.config_class(**{k: v for k, v in values.items() if k != "model_type"}))
            # What the files may hold besides, and what is then left out: the embedding under other names.
            copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
            copies |= {"lm_head.weight"} if config.tied else set()
            yield named(f"{family} {size}", millions, shapes, t5.key_map(shapes), model, copies)


def unet_names(directory, most):
    import torch
    from diffusers import UNet2DConditionModel

    path = directory / "config.json"
    families = [[name for name in PUBLIC_UNETS if family in name] for family in ("IF-I-", "IF-II-")]
    for name in [name for names in families for name in names[:most]]:
        model, published = PUBLIC_UNETS[name]
        network = deepfloyd.Network(model.unet, presets.T5_XXL[1], model.low_res is not None)
        settings = deepfloyd._hub_config(network)
        path.write_text(json.dumps(settings))
        network = network._replace(unet=executed(model.unet, dtype="bfloat16"))
        assert deepfloyd.read_config(path, "bfloat16") == network
        shapes = deepfloyd._shapes(network)
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(settings)
        yield named(name, published, shapes, deepfloyd.key_map(network.unet, shapes), model, set())


def named(name, published, shapes, names, model, copies):
    leaves = trees.flatten(shapes)
    ours = {names[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in leaves.items()}
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in copies}
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    return name, sum(leaf.size for leaf in leaves.values()) / 1e6, published, ours, theirs

"""CLIP's config.json: what is wrong or not supported is named in one line, what older versions wrote is understood."""

import json

import pytest
from small_clip import OPEN, OPENAI, alone, init, rewrite

from jaxdiff.weights import clip


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (None, {"model_type": "siglip"}, "model_type = 'siglip' is not supported, only 'clip'"),
        (None, {"model_type": ["clip"]}, r"model_type = \['clip'\] is not supported"),
        (None, {"model_type": "clip_text_model"}, "'clip_text_model' is a single tower: use load_text or load_image"),
        (None, {"text_config": [1]}, "text_config is not a group of settings"),
        (None, {"vision_config_dict": 5}, "vision_config_dict is not a group of settings"),
        (None, {"projection_dim": [1]}, r"json: projection_dim = \[1\] is not supported"),
        (None, {"projection_dim": 41}, "2 of another shape .*text_projection.weight"),
        (None, {"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ("text_config", {"model_type": "bert"}, "text_config.model_type = 'bert' is not supported"),
        ("text_config", {"hidden_act": "relu"}, "text_config.hidden_act = 'relu' is not supported"),
        ("text_config", {"hidden_act": None}, "text_config.hidden_act = None is not supported"),
        ("text_config", {"hidden_size": "48"}, "text_config.hidden_size = '48' is not supported, only a whole number"),
        ("text_config", {"hidden_size": None}, "text_config.hidden_size = None is not supported"),
        ("text_config", {"hidden_size": 48.0}, "text_config.hidden_size = 48.0 is not supported"),
        ("text_config", {"num_hidden_layers": 2.5}, "text_config.num_hidden_layers = 2.5 is not supported"),
        ("text_config", {"num_hidden_layers": True}, "text_config.num_hidden_layers = True is not supported"),
        ("text_config", {"num_hidden_layers": 10**9}, "only a whole number from 1 to 256"),
        ("text_config", {"num_hidden_layers": 1}, "16 unexpected .*text_model.encoder.layers.1"),
        ("text_config", {"num_attention_heads": 5}, "num_attention_heads = 5 .* divides text_config.hidden_size = 48"),
        ("text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads = 0 is not supported"),
        ("text_config", {"layer_norm_eps": "a"}, "text_config.layer_norm_eps = 'a' is not supported"),
        ("text_config", {"layer_norm_eps": float("nan")}, "text_config.layer_norm_eps = nan is not supported"),
        ("text_config", {"vocab_size": 10**30}, "text_config.vocab_size = 10+ is not supported"),
        ("text_config", {"eos_token_id": None}, "text_config.eos_token_id = None is not supported"),
        ("text_config", {"eos_token_id": [1, 2]}, r"text_config.eos_token_id = \[1, 2\] is not supported"),
        ("text_config", {"use_attention_mask": True}, "text_config.use_attention_mask = True is not supported"),
        ("vision_config", {"num_channels": 4}, "vision_config.num_channels = 4 is not supported"),
        ("vision_config", {"intermediate_size": -80}, "vision_config.intermediate_size = -80 is not supported"),
        ("vision_config", {"image_size": [28, 28]}, r"vision_config.image_size = \[28, 28\] is not supported"),
        ("vision_config", {"patch_size": 9}, "vision_config.patch_size = 9 .* divides vision_config.image_size = 28"),
        ("vision_config", {"image_size": 2**14, "patch_size": 1}, "of another shape .*position_embedding"),
        ("vision_config", {"image_size": 2**14 + 1}, "image_size = 16385 is not supported, only a whole .* to 16384"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size = 0 is not supported, only a whole number"),
    ],
)
def test_settings_that_are_not_supported(group, values, message, tmp_path):
    clip.export(OPENAI, init(OPENAI), tmp_path)
    rewrite(tmp_path / "config.json", lambda config: (config[group] if group else config).update(values))
    with pytest.raises(ValueError, match=message) as refused:
        clip.load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_settings_of_one_tower(tower, tmp_path):
    config = alone(OPENAI, tower)
    load = {"text": clip.load_text, "image": clip.load_image}
    clip.export(config, init(config), tmp_path)
    with pytest.raises(ValueError, match=r"config.json: model_type = 'clip_\w+' is not supported, only 'clip' or "):
        load["image" if tower == "text" else "text"](tmp_path)
    rewrite(tmp_path / "config.json", lambda values: values.update(hidden_size="48"))
    with pytest.raises(ValueError, match="hidden_size = '48' is not supported, only a whole number"):
        load[tower](tmp_path)


def test_what_training_alone_reads_is_of_no_account(tmp_path):
    clip.export(OPENAI, init(OPENAI), tmp_path)
    rewrite(tmp_path / "config.json", lambda values: values["text_config"].update(attention_dropout=0.1))
    assert clip.load(tmp_path)[0] == OPENAI


def test_what_is_left_out_is_as_in_transformers(tmp_path):
    """Groups under their older names replace the others whole: what these leave out is not taken from those."""
    pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    from transformers import CLIPConfig

    path = tmp_path / "config.json"
    kept = {"hidden_act": "gelu", "hidden_size": 48, "num_attention_heads": 3}
    for given in (
        {},
        {"text_config": None, "projection_dim": None},
        {"text_config": kept, "vision_config": {"image_size": 64}},
        clip._hub_config(OPEN, "float32") | {"text_config_dict": kept},
        clip._hub_config(OPENAI, "float32") | {"text_config_dict": None, "vision_config_dict": {}},
    ):
        path.write_text(json.dumps({"model_type": "clip"} | given))
        found = clip._hub_config(clip.read_config(path), "float32")
        theirs = CLIPConfig(**json.loads(path.read_text())).to_dict()
        for group in ("text_config", "vision_config"):
            expected = {name: theirs[group][name] for name in found[group] if name != "projection_dim"}
            assert {name: found[group][name] for name in expected} == expected
        assert found["projection_dim"] == theirs["projection_dim"] or given.get("projection_dim", 1) is None

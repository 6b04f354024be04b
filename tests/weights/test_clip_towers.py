"""One tower of CLIP: out of a whole one, or saved alone by transformers, with a projection and without."""

import json
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_clip import CONFIGS, OPENAI, alone, close, init, rewrite

from jaxdiff.nets import clip as nets
from jaxdiff.weights import clip, hub

LOAD = {"text": clip.load_text, "image": clip.load_image}
TOWERS = pytest.mark.parametrize("tower", LOAD)
WIDTHS = pytest.mark.parametrize("width", [None, 24], ids=["states", "projected"])


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def transformers_class(tower, width):
    import transformers

    name = {"text": "CLIPTextModel", "image": "CLIPVisionModel"}[tower]
    return getattr(transformers, name if width is None else f"{name}WithProjection")


def inputs(config, tower):
    """Two captions with their ends in different places, or two images."""
    rng = np.random.default_rng(1)
    if tower == "image":
        return rng.normal(size=(2, 28, 28, 3)).astype("f4")
    ids = rng.integers(3, 110, (2, 12)).astype("i4")
    ids[0, 5] = ids[0, 9] = ids[1, 11] = 119 if config.text.eos_id is None else config.text.eos_id
    return ids


def compare(config, params, model, tower):
    """Our states, pooled states and embeddings with those of PyTorch's `model`."""
    import torch

    given = inputs(config, tower)
    found = nets.CLIP(config).apply({"params": params}, jnp.asarray(given), method=f"embed_{tower}")
    with torch.no_grad():
        if tower == "text":
            expected = model(input_ids=torch.tensor(given).long())
        else:
            expected = model(pixel_values=torch.tensor(given.transpose(0, 3, 1, 2)))
    close(found.states, expected.last_hidden_state.numpy())
    if config.width is None:
        close(found.pooled, expected.pooler_output.numpy())
        assert found.embedding is None
    else:
        close(found.embedding, (expected.text_embeds if tower == "text" else expected.image_embeds).numpy())


@CONFIGS
@TOWERS
@WIDTHS
def test_exported_towers_open_in_pytorch(config, tower, width, tmp_path):
    pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    config = alone(config, tower, width)
    params = init(config)
    clip.export(config, params, tmp_path)
    kind = transformers_class(tower, width)
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.architectures == [kind.__name__]
    compare(config, params, model, tower)


@CONFIGS
@TOWERS
@WIDTHS
def test_towers_of_pytorch_can_be_read(config, tower, width, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    config = alone(config, tower, width)
    kind = transformers_class(tower, width)
    torch.manual_seed(0)
    model = kind(kind.config_class(**clip._hub_config(config, "float32")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path)
    found, params = LOAD[tower](tmp_path)
    assert found == config
    compare(config, params, model, tower)


@CONFIGS
@TOWERS
@WIDTHS
def test_export_and_load_are_inverse(config, tower, width, tmp_path):
    config = alone(config, tower, width)
    params = init(config)
    clip.export(config, params, tmp_path)
    found_config, found = LOAD[tower](tmp_path)
    assert found_config == config
    equal(found, params)
    assert LOAD[tower](tmp_path, "bfloat16")[0] == replace(config, dtype="bfloat16")


@TOWERS
def test_one_tower_of_a_whole_clip(tower, tmp_path, monkeypatch):
    params = init(OPENAI)
    clip.export(OPENAI, params, tmp_path)
    read = []
    monkeypatch.setattr(
        hub.Stored, "read", lambda self, read_it=hub.Stored.read: read.append(self.key) or read_it(self)
    )
    found_config, found = LOAD[tower](tmp_path)
    assert found_config == alone(OPENAI, tower, OPENAI.width)
    equal(found, {tower: params[tower]})
    assert len(read) == len(jax.tree.leaves(found))
    whole, one = (
        nets.CLIP(config).apply({"params": params}, jnp.asarray(inputs(OPENAI, tower)), method=f"embed_{tower}")
        for config in (OPENAI, found_config)
    )
    equal(whole, one)


def test_a_whole_clip_opens_in_pytorch_as_one_tower(tmp_path):
    pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    clip.export(OPENAI, init(OPENAI), tmp_path)
    for tower, load in LOAD.items():
        config, params = load(tmp_path)
        compare(config, params, transformers_class(tower, OPENAI.width).from_pretrained(tmp_path), tower)


@TOWERS
def test_names_of_transformers_5(tower, tmp_path):
    """It leaves out the tower's name where a tower has no projection."""
    config = alone(OPENAI, tower)
    params = init(config)
    clip.export(config, params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key.split(".", 1)[1]: tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    equal(LOAD[tower](tmp_path)[1], params)


class Held(NamedTuple):
    """An array as a tensor that is read when asked."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64"}[str(self.array.dtype)]

    def read(self, types=()):
        return self.array


def in_memory(arrays):
    return {key: Held(array) for key, array in arrays.items()}


@TOWERS
@WIDTHS
@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
def test_towers_from_memory(tower, width, prefixed, tmp_path):
    """Tensors out of a file with several networks: arrays, or not read yet. Under the names of both generations, with
    the numbers of the positions that older versions wrote."""
    config = alone(OPENAI, tower, width)
    params = init(config)
    clip.export(config, params, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    prefix = {"text": "text_model.", "image": "vision_model."}[tower]
    arrays = load_file(tmp_path / "model.safetensors") | {f"{prefix}embeddings.position_ids": np.arange(12)[None]}
    stored = hub.open_tensors(tmp_path)
    given = [
        tensors if prefixed else {k.removeprefix(prefix): t for k, t in tensors.items()}
        for tensors in (in_memory(arrays), stored)
    ]
    for tensors in given:
        names = set(tensors)
        found_config, found = clip.from_tensors(values, tensors, tower=tower)
        assert found_config == config and set(tensors) == names
        equal(found, params)
    half = {key: array.astype("f2") if array.dtype == "f4" else array for key, array in arrays.items()}
    _, found = clip.from_tensors(values, in_memory(half), "bfloat16", tower=tower, place=np.asarray)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype("f2").astype("bfloat16"), params)
    equal(found, expected)


def test_both_towers_from_memory(tmp_path):
    params = init(OPENAI)
    clip.export(OPENAI, params, tmp_path)
    values, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    config, found = clip.from_tensors(values, in_memory(tensors), tower=None)
    assert config == OPENAI
    equal(found, params)
    for tower in LOAD:
        config, found = clip.from_tensors(values, in_memory(tensors), tower=tower)
        assert config == alone(OPENAI, tower, OPENAI.width)
        equal(found, {tower: params[tower]})


def test_what_is_wrong_in_memory_is_named(tmp_path):
    config = alone(OPENAI, "text", 24)
    clip.export(config, init(config), tmp_path)
    values, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^v1\.safetensors: hidden_size = '48' is not supported"):
        clip.from_tensors(values | {"hidden_size": "48"}, in_memory(tensors), where="v1.safetensors")
    wrong = tensors | {"text_projection.weight": np.ones((24, 48), "i4")}
    with pytest.raises(ValueError, match=r"^v1\.safetensors has 1 of another type .text_projection.weight holds I32"):
        clip.from_tensors(values, in_memory(wrong), where="v1.safetensors")
    with pytest.raises(
        ValueError, match=r"^v1\.safetensors does not fit the settings: 1 missing .text_projection.weight"
    ):
        del tensors["text_projection.weight"]
        clip.from_tensors(values, in_memory(tensors), where="v1.safetensors")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, not float16"):
        clip.from_tensors(values, in_memory(tensors), "float16")


@TOWERS
def test_a_projection_that_the_class_does_not_have(tower, tmp_path):
    """Some tools write one beside Stable Diffusion's text tower, of whatever size; transformers leaves it out too."""
    config = alone(OPENAI, tower)
    params = init(config)
    clip.export(config, params, tmp_path)
    values, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    extra = {clip.PROJECTION[tower]: np.ones((7, 7), "f4")}
    found_config, found = clip.from_tensors(values | {"projection_dim": 512}, in_memory(tensors | extra), tower=tower)
    assert found_config == config
    equal(found, params)


@TOWERS
def test_every_tensor_is_accounted_for(tower, tmp_path):
    config = alone(OPENAI, tower, 24)
    clip.export(config, init(config), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    projection = clip.PROJECTION[tower]
    save_file({key: tensor for key, tensor in tensors.items() if key != projection}, path)
    with pytest.raises(ValueError, match=rf"does not fit the settings: 1 missing \({projection}\)"):
        LOAD[tower](tmp_path)
    # As Stable Diffusion 2 gives a width that nothing has: there it is of no account.
    rewrite(tmp_path / "config.json", lambda values: values.update(architectures=["CLIPModelOfOneTower"]))
    assert LOAD[tower](tmp_path)[0].width is None
    save_file(tensors | {"extra.weight": np.ones(2, "f4")}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(extra.weight\)"):
        LOAD[tower](tmp_path)


def test_configurations_that_make_no_sense():
    with pytest.raises(ValueError, match="neither a text tower nor an image tower"):
        replace(OPENAI, text=None, image=None)
    with pytest.raises(ValueError, match="two towers need the width of the space"):
        replace(OPENAI, width=None)
    with pytest.raises(ValueError, match="the CLIP to export does not fit the settings"):
        clip.export(alone(OPENAI, "text"), init(OPENAI), "nowhere")


@TOWERS
def test_half_precision_under_a_name_of_its_own(tower, tmp_path):
    params = init(OPENAI)
    clip.export(OPENAI, params, tmp_path, "float16")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    expected = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), {tower: params[tower]})
    equal(LOAD[tower](tmp_path, variant="fp16")[1], expected)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        LOAD[tower](tmp_path, variant="bf16")

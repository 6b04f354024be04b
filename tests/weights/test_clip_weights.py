"""CLIP checkpoints: equal to transformers' PyTorch CLIP on random weights, both ways, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_clip import CONFIGS, OPENAI, close, init

from jaxdiff.core import trees
from jaxdiff.nets import clip as nets
from jaxdiff.weights import clip

SIZES = {
    "ViT-B/32": (nets.VIT_B_32, 151.28),
    "ViT-L/14": (nets.VIT_L_14, 427.62),
    "OpenCLIP ViT-H/14": (nets.OPEN_VIT_H_14, 986.11),
    "OpenCLIP ViT-bigG/14": (nets.OPEN_VIT_BIG_G_14, 2539.57),
}


@CONFIGS
def test_the_same_as_in_pytorch(config, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    from transformers import CLIPModel

    params = init(config)
    clip.export(config, params, tmp_path)
    model, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 110, (4, 12))
    # Ends in different places, with other tokens and a second end behind them: it is the first that counts.
    end = 119 if config.text.eos_id is None else 117
    for row, at in enumerate((11, 4, 1, 7)):
        ids[row, at:] = rng.integers(3, 110, 12 - at)
        ids[row, at] = ids[row, -1] = end
    image = rng.normal(size=(3, 28, 28, 3)).astype("f4")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)))
        states = model.text_model(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
    network, variables = nets.CLIP(config), {"params": params}
    ids = jnp.asarray(ids, jnp.int32)
    text = network.apply(variables, ids, method="embed_text")
    picture = network.apply(variables, jnp.asarray(image), method="embed_image")
    logits = network.apply(variables, ids, jnp.asarray(image))
    close(text.states, states)
    close(text.embedding / jnp.linalg.norm(text.embedding, axis=-1, keepdims=True), expected.text_embeds.numpy())
    close(picture.embedding / jnp.linalg.norm(picture.embedding, axis=-1, keepdims=True), expected.image_embeds.numpy())
    close(logits, expected.logits_per_text.numpy())


@CONFIGS
def test_export_and_load_are_inverse(config, tmp_path):
    params = init(config)
    clip.export(config, params, tmp_path)
    found_config, found = clip.load(tmp_path)
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, params)
    half = clip.load(tmp_path, "bfloat16")
    assert half[0] == replace(config, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half[1])} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """As many parameters as the published models have, and transformers' names and shapes for all of them."""
    config, millions = SIZES[name]
    shapes = clip._shapes(config)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**clip._hub_config(config, "float32")))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in clip.UNUSED}
    names = clip.key_map(shapes)
    found = {names[path]: clip.hub.theirs_shape(path, leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    assert found == expected


def test_files_of_older_versions(tmp_path):
    """They hold the numbers of the positions, and leave out what is as in ViT-B/32."""
    params = init(OPENAI)
    clip.export(OPENAI, params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(12)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["hidden_act"], config["vision_config"]["layer_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found_config, found = clip.load(tmp_path)
    assert found_config == OPENAI
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_inputs_that_do_not_fit():
    network, variables = nets.CLIP(OPENAI), {"params": init(OPENAI)}
    with pytest.raises(ValueError, match="captions of 13 tokens, but this tower reads 12"):
        network.apply(variables, jnp.zeros((1, 13), jnp.int32), method="embed_text")
    with pytest.raises(ValueError, match="images of 28x32, but this tower reads 28x28"):
        network.apply(variables, jnp.zeros((1, 28, 32, 3)), method="embed_image")

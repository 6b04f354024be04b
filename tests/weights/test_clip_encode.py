"""Captions to CLIP's embeddings: the tokenizer and the text tower of transformers, and ours on the same files."""

import json

import jax
import numpy as np
import pytest
from small_clip import CONFIGS, MERGES, OPENAI, close, fitted, init, tokenizer

from jaxdiff.text.clip_tokenizer import clip_tokenizer
from jaxdiff.text.encoder import BLOCK
from jaxdiff.text.precomputed import embed_captions
from jaxdiff.weights import captions, clip, tree

CAPTIONS = ["a red star", "", "A blue   STAR, on  red!", "red star's 7 on blue", "ci co"]
LONG = "red " * 9 + "star on blue"
LENGTH = OPENAI.text.length


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config, words = fitted(OPENAI, 24)
    directory = tmp_path_factory.mktemp("clip")
    clip.export(config, init(config), directory)
    words.save_pretrained(directory)
    return directory


@CONFIGS
@pytest.mark.parametrize("width", [None, 24], ids=["states", "projected"])
def test_the_same_as_in_pytorch(config, width, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    config, words = fitted(config, width)
    clip.export(config, init(config), tmp_path)
    words.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokens = theirs([*CAPTIONS, LONG], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    model = (CLIPTextModel if width is None else CLIPTextModelWithProjection).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens.input_ids)  # no mask, as Stable Diffusion has none
    with pytest.warns(UserWarning, match=f"longer than {LENGTH} tokens cut short; lost: 'on blue'"):
        found = clip.load_text_encoder(tmp_path).encode([*CAPTIONS, LONG])
    close(found.tokens, expected.last_hidden_state.numpy())
    close(found.pooled, (expected.pooler_output if width is None else expected.text_embeds).numpy())


def test_a_vocabulary_in_two_files(directory, tmp_path):
    """The published layout: vocab.json and merges.txt, in a directory of their own as in Stable Diffusion."""
    words = tokenizer("quick_gelu")
    (tmp_path / "vocab.json").write_text(json.dumps(words.get_vocab()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    expected = clip.load_text_encoder(directory).encode(CAPTIONS)
    found = clip.load_text_encoder(directory, tokenizer=tmp_path).encode(CAPTIONS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_tokenizer_as_an_object(directory):
    words = tokenizer("quick_gelu")
    encoder = clip.load_text_encoder(directory, tokenizer=words)
    assert encoder.tokenizer is words
    expected = clip.load_text_encoder(directory)
    assert encoder.fingerprint == expected.fingerprint
    jax.tree.map(np.testing.assert_array_equal, encoder.encode(CAPTIONS), expected.encode(CAPTIONS))
    with pytest.raises(ValueError, match="the tokenizer has 49408 ids, the embedding only"):
        clip.load_text_encoder(directory, tokenizer=clip_tokenizer())


def test_batches_change_nothing(directory):
    encoder = clip.load_text_encoder(directory)
    captions = [f"star {i}" for i in range(BLOCK + 6)]
    together = encoder.encode(captions)
    assert together.tokens.shape == (len(captions), LENGTH, 48) and together.pooled.shape == (len(captions), 24)
    for i in (0, BLOCK - 1, BLOCK + 5):
        for one, all_of_them in zip(encoder.encode(captions[i : i + 1]), together):
            np.testing.assert_allclose(one[0], all_of_them[i], atol=1e-4)


def test_no_captions_and_bare_string(directory):
    encoder = clip.load_text_encoder(directory)
    none = encoder.encode([])
    assert none.tokens.shape == (0, LENGTH, 48) and none.pooled.shape == (0, 24)
    with pytest.raises(ValueError, match="list of strings"):
        encoder.encode("a star")


def test_embedded_captions_in_a_file(directory, tmp_path):
    """With the pooled vectors and the ids."""
    embedded = embed_captions(clip.load_text_encoder(directory), CAPTIONS)
    captions.save(tmp_path / "captions.safetensors", embedded)
    found = captions.load(tmp_path / "captions.safetensors")
    assert (found.captions, found.fingerprint) == (embedded.captions, embedded.fingerprint) and found.padding_is_read
    jax.tree.map(np.testing.assert_array_equal, found.embedding, embedded.embedding)
    params, told = tree.load_tree(tmp_path / "captions.safetensors")
    for name, wrong in (("pooled", params["pooled"][1:]), ("ids", params["ids"].astype("f4")), ("ids", params["mask"])):
        tree.save_tree(tmp_path / "wrong.safetensors", params | {name: wrong}, told)
        with pytest.raises(ValueError, match="not a file of embedded captions"):
            captions.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(("count", "lost"), [(LENGTH - 2, None), (LENGTH - 1, "star"), (LENGTH + 1, "on on star")])
def test_only_what_is_too_long_is_cut(directory, count, lost, recwarn):
    encoder = clip.load_text_encoder(directory)
    encoder.encode(["on " * (count - 1) + "star"])
    assert [str(warning.message).split("lost: ")[-1] for warning in recwarn] == ([repr(lost)] if lost else [])


def test_a_tokenizer_of_another_model(tmp_path):
    words = tokenizer("quick_gelu")
    clip.export(OPENAI, init(OPENAI), tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(words)} ids, the embedding only 120"):
        clip.load_text_encoder(tmp_path)

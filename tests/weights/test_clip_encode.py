"""Captions to CLIP's embeddings: the tokenizer and the text tower of transformers, and ours on the same files."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_clip import CONFIGS, OPENAI, alone, close, init
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from jaxdiff.text import clip as text
from jaxdiff.text import t5
from jaxdiff.weights import clip

MERGES = ["r e", "re d</w>", "s t", "a r</w>", "st ar</w>", "o n</w>", "b l", "u e</w>", "bl ue</w>", "c i"]
CAPTIONS = ["a red star", "", "A blue   STAR, on  red!", "red star's 7 on blue", "ci co"]
LONG = "red " * 9 + "star on blue"
LENGTH = OPENAI.text.length


def tokenizer(convention):
    """Bytes, bytes that end a word, what the merges make of them, start and end; OpenCLIP's fills up with "!"."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*characters, *(character + "</w>" for character in characters), *(m.replace(" ", "") for m in MERGES)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge.split()) for merge in MERGES]
    return CLIPTokenizer(vocab, merges, pad_token="!" if convention == "gelu" else "<|endoftext|>")


def fitted(config, width):
    """`config` of a text tower with as many ids as the tokenizer has, whose last is the end."""
    words = tokenizer(config.text.activation)
    eos_id = None if config.text.eos_id is None else words.eos_token_id
    return replace(alone(config, "text", width), text=replace(config.text, vocab=len(words), eos_id=eos_id)), words


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
        found = text.encode(clip.load_text_encoder(tmp_path), [*CAPTIONS, LONG])
    close(found.states, expected.last_hidden_state.numpy())
    if width is None:
        assert found.embedding is None
        close(found.pooled, expected.pooler_output.numpy())
    else:
        close(found.embedding, expected.text_embeds.numpy())


def test_a_vocabulary_in_two_files(directory, tmp_path):
    """The published layout: vocab.json and merges.txt, in a directory of their own as in Stable Diffusion."""
    words = tokenizer("quick_gelu")
    (tmp_path / "vocab.json").write_text(json.dumps(words.get_vocab()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    expected = text.encode(clip.load_text_encoder(directory), CAPTIONS)
    found = text.encode(clip.load_text_encoder(directory, tokenizer=tmp_path), CAPTIONS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_batches_change_nothing(directory):
    encoder = clip.load_text_encoder(directory)
    captions = [f"star {i}" for i in range(t5.BLOCK + 6)]
    together = text.encode(encoder, captions)
    assert together.states.shape == (len(captions), LENGTH, 48) and together.embedding.shape == (len(captions), 24)
    for i in (0, t5.BLOCK - 1, t5.BLOCK + 5):
        for one, all_of_them in zip(text.encode(encoder, captions[i : i + 1]), together):
            np.testing.assert_allclose(one[0], all_of_them[i], atol=1e-4)


def test_no_captions_and_bare_string(directory):
    encoder = clip.load_text_encoder(directory)
    none = text.encode(encoder, [])
    assert none.states.shape == (0, LENGTH, 48) and none.embedding.shape == (0, 24)
    with pytest.raises(ValueError, match="list of strings"):
        text.encode(encoder, "a star")


@pytest.mark.parametrize(("count", "lost"), [(LENGTH - 2, None), (LENGTH - 1, "star"), (LENGTH + 1, "on on star")])
def test_only_what_is_too_long_is_cut(directory, count, lost, recwarn):
    encoder = clip.load_text_encoder(directory)
    text.encode(encoder, ["on " * (count - 1) + "star"])
    assert [str(warning.message).split("lost: ")[-1] for warning in recwarn] == ([repr(lost)] if lost else [])


def test_a_tokenizer_of_another_model(tmp_path):
    words = tokenizer("quick_gelu")
    clip.export(OPENAI, init(OPENAI), tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(words)} ids, the embedding only 120"):
        clip.load_text_encoder(tmp_path)

"""A CLIP of few parameters, in both conventions, and how near to PyTorch's its results must be."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from jaxdiff.core import trees
from jaxdiff.nets import clip as nets
from jaxdiff.weights import clip

OPENAI = nets.CLIPConfig(
    nets.TextTowerConfig(width=48, layers=2, heads=3, feed_forward=96, vocab=120, length=12, eos_id=None),
    nets.ImageTowerConfig(width=64, layers=3, heads=4, feed_forward=80, resolution=28, patch=7),
    width=40,
)
OPEN = replace(
    OPENAI,
    text=replace(OPENAI.text, activation="gelu", eos_id=117),
    image=replace(OPENAI.image, activation="gelu"),
)
MERGES = ["r e", "re d</w>", "s t", "a r</w>", "st ar</w>", "o n</w>", "b l", "u e</w>", "bl ue</w>", "c i"]
CONFIGS = pytest.mark.parametrize("config", [OPENAI, OPEN], ids=["OpenAI", "OpenCLIP"])


def init(config):
    """Random parameters by numpy: nothing to compile."""
    rng = np.random.default_rng(0)
    shapes = trees.flatten(clip._shapes(config)).items()
    spread = {"scale": lambda x: 1 + 0.1 * x, "bias": lambda x: 0.1 * x, "logit_scale": lambda x: 1 + 0 * x}
    return trees.unflatten(
        {
            path: jnp.asarray(spread.get(path.split("/")[-1], lambda x: 0.3 * x)(rng.normal(size=leaf.shape)), "f4")
            for path, leaf in shapes
        }
    )


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


def close(found, expected):
    assert np.abs(np.asarray(found) - expected).max() < 1e-4 * np.abs(expected).max()


def alone(config, tower, width=None):
    """The configuration of one tower, without a projection or with one to `width`."""
    return replace(config, **{"image" if tower == "text" else "text": None}, width=width)


def rewrite(path, change):
    """Passes the settings in a config.json through `change`, which may alter them in place."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))

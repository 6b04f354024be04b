"""A CLIP of few parameters, in both conventions, and how near to PyTorch's its results must be."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

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

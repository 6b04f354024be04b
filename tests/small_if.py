"""A DeepFloyd IF of the published topology and very small: random weights, a small vocabulary."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import trees
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.conditioning import WholeText
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.nets.unet import ConditioningConfig, UNetConfig
from jaxdiff.systems import deepfloyd
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.cleaning import clean_caption
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import train_tokenizer
from jaxdiff.weights.deepfloyd import Network

TEXT = 77, 24
"""Length and width of what the text encoder gives."""


def _small(unet: UNetConfig, self_attention: tuple[bool, bool], cross_attention: tuple[bool, bool]) -> UNetConfig:
    attends = {"self_attention": self_attention, "cross_attention": cross_attention, "head_channels": 16}
    return replace(
        unet,
        channels=32,
        multipliers=(1, 2),
        blocks=(1, 1),
        attention=replace(unet.attention, **attends),
        conditioning=ConditioningConfig(64, WholeText(32, pool_heads=4), frequencies=32),
    )


BASE = _small(deepfloyd.IF_I_M.unet, (False, True), (False, False))
SR = _small(deepfloyd.IF_II_M.unet, (False, False), (False, True))
STAGES = deepfloyd.if_model(BASE, 16).reading(*TEXT), deepfloyd.if_model(SR, 64, low_res=True).reading(*TEXT)
NETWORKS = Network(BASE, TEXT[1], False), Network(SR, TEXT[1], True)
"""As their files are."""
CAPTIONS = ["a large red circle on a white background", "two blue stars left of a green heart", "A pink Cross!"]


def random_params(shapes: dict, seed: int = 0) -> dict:
    """Parameters none of which is 0; drawn by numpy, since compiling `init` takes long. The last layer is a small one:
    a network that says more than there is noise makes an image's every rounding error grow with each step."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, leaf in trees.flatten(shapes).items():
        x = rng.normal(size=leaf.shape)
        if path.endswith("kernel"):
            x *= (0.2 if path.startswith("head/") else 1.0) * np.prod(leaf.shape[:-1]) ** -0.5
        drawn[path] = jnp.asarray(1 + 0.1 * x if path.endswith("scale") else x if x.ndim > 1 else 0.1 * x, "f4")
    return trees.unflatten(drawn)


def stage_params(stage: DiffusionModel, seed: int = 0) -> dict:
    return random_params(jax.eval_shape(stage.init, jax.random.key(0))[0], seed)


def text_encoder(captions=CAPTIONS) -> T5TextEncoder:
    words = train_tokenizer([*captions, "a small yellow square"] * 20, 450)
    config = T5Config(vocab=len(words), d_model=24, d_kv=8, d_ff=40, layers=2, decoder_layers=0, heads=2)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, jax.ShapeDtypeStruct((1, 2), bool))
    return T5TextEncoder(
        config, random_params(shapes["params"], 7), words, 77, padding_is_read=True, prepare=clean_caption
    )


def cascade() -> Pipeline:
    samplings = deepfloyd.SAMPLING_I, deepfloyd.SAMPLING_II
    base, large = (TrainedModel(s, stage_params(s, i), samplings[i]) for i, s in enumerate(STAGES))
    return deepfloyd.deepfloyd(text_encoder(), base, large)

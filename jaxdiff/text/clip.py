"""Captions to frozen CLIP embeddings: the text box of Stable Diffusion, which takes the states, and of DALL·E 2."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerBase

from jaxdiff.nets.clip import CLIP, CLIPConfig, Embedded, TextTowerConfig
from jaxdiff.text.t5 import in_blocks
from jaxdiff.text.tokenizer import tokenize


@dataclass(frozen=True, eq=False)
class CLIPTextEncoder:
    """A frozen text tower: settings and parameters (of both towers or of this one alone), tokenizer."""

    config: CLIPConfig
    params: dict
    tokenizer: PreTrainedTokenizerBase


def encode(encoder: CLIPTextEncoder, captions: Sequence[str]) -> Embedded:
    """Float32 states (b, 77, d) of `captions`, `pooled` and `embedding`; the latter None where nothing is projected.

    Every token counts: what fills a caption up is read too, and the empty string is a caption like others, which
    serves as the null text. One that is too long is cut with a warning.
    """
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, not one string")
    text = _tower(encoder)
    return embed(encoder, tokenize(encoder.tokenizer, captions, text.length, text.vocab).ids)


def embed(encoder: CLIPTextEncoder, ids: Int[np.ndarray, "b n"]) -> Embedded:
    """Embeddings of token ids, in blocks of one size so that the compiled program is reused."""
    if not len(ids):
        row = jax.ShapeDtypeStruct((1, _tower(encoder).length), jnp.int32)
        shapes = jax.eval_shape(partial(_embed, encoder.config), encoder.params, row)
        return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape[1:]), leaf.dtype), shapes)
    return in_blocks(partial(_embed, encoder.config, encoder.params), ids)


def _tower(encoder: CLIPTextEncoder) -> TextTowerConfig:
    assert encoder.config.text is not None  # a text encoder has that tower
    return encoder.config.text


@partial(jax.jit, static_argnums=0)
def _embed(config: CLIPConfig, params: dict, ids: Int[Array, "b n"]) -> Embedded:
    return cast(Embedded, CLIP(config).apply({"params": params}, ids, method="embed_text"))

"""The frozen T5 text encoder of Imagen and DeepFloyd IF."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.core.messages import quoted
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.encoder import TextEmbedding, caption_list, fingerprint_of, in_blocks
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, tokenize


@dataclass(frozen=True, eq=False)
class T5TextEncoder:
    """A frozen encoder: settings, parameters (the `shared` and `encoder` subtrees), tokenizer, tokens per caption.

    A blank caption becomes the null text: zeros, all masked.

    padding_is_read: keep the states of padding for attention, and encode a blank caption as the empty string (DeepFloyd
    IF). The encoder's own attention always masks padding. prepare: applied to each caption before tokenization.
    """

    config: T5Config
    params: dict
    tokenizer: PreTrainedTokenizerBase
    length: int
    padding_is_read: bool = False
    prepare: Callable[[str], str] = str

    @property
    def width(self) -> int:
        return self.config.d_model

    @cached_property
    def fingerprint(self) -> str:
        # Independent of the decoder and of `remat`, so that an exported encoder has the same fingerprint.
        config = replace(self.config, decoder_layers=0, tied=False, scale_logits=False, remat=False)
        settings = (config, self.length, self.padding_is_read, self.prepare.__qualname__)
        return fingerprint_of(settings, self.tokenizer, self.params)

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        return self.embed(self.tokenize(captions))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids and mask (b, length); blank captions are fully masked unless padding is read."""
        captions = caption_list(captions)
        prepared = [self.prepare(caption) for caption in captions]
        emptied = [before for before, after in zip(captions, prepared) if before.strip() and not after.strip()]
        if emptied:
            warnings.warn(
                f"nothing is left of {quoted(emptied[0], 200)} after cleaning: it is treated as an empty caption",
                stacklevel=3,
            )
        tokens = tokenize(self.tokenizer, prepared, self.length, self.config.vocab)
        visible = np.array([self.padding_is_read or bool(caption.strip()) for caption in captions], bool)
        return Tokens(tokens.ids, tokens.mask & visible[:, None])

    def embed(self, tokens: Tokens) -> TextEmbedding:
        states = in_blocks(partial(_states, self.config, self.params), tokens.ids, tokens.mask)
        ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
        if self.padding_is_read:
            return TextEmbedding(states, jnp.ones_like(mask), ids=ids)
        return TextEmbedding(jnp.where(mask[..., None], states, 0.0), mask, ids=ids)

    def states(self, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        return cast(Array, T5Encoder(self.config).apply({"params": params}, ids, mask))


@partial(jax.jit, static_argnums=0)
def _states(config: T5Config, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    return cast(Array, T5Encoder(config).apply({"params": params}, ids, mask))

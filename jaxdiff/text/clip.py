"""The frozen CLIP text encoder: Stable Diffusion, DALL·E 2, CLIP score."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.clip import CLIP, CLIPConfig, TextTowerConfig, TowerOutput
from jaxdiff.text.encoder import TextEmbedding, caption_list, fingerprint_of, in_blocks
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, tokenize


class Pooling(enum.Enum):
    """The content of `TextEmbedding.pooled`."""

    EMBEDDING = enum.auto()
    """CLIP's projected embedding, not L2-normalized; without a projection, as STATE."""
    STATE = enum.auto()
    """The state of the end token, after the last norm."""
    NONE = enum.auto()
    """None. SDXL reads no pooled vector of its first encoder."""


@dataclass(frozen=True, eq=False)
class CLIPTextEncoder:
    """A frozen text tower: settings, parameters (of both towers or only this one), tokenizer.

    The empty caption is encoded like any other. The defaults are Stable Diffusion 1's. SDXL uses `skip_last=1` and
    `final_norm=False` for both encoders; Stable Diffusion 2 uses `skip_last=1` if its files include the last block.

    skip_last: take `tokens` before this number of last blocks. final_norm: apply the tower's last norm to `tokens`.
    padding_is_read: keep the states of padding; otherwise they are masked.
    max_length: tokens per caption, start and end included; None: the tower's maximum.
    """

    config: CLIPConfig
    params: dict
    tokenizer: PreTrainedTokenizerBase
    skip_last: int = 0
    final_norm: bool = True
    padding_is_read: bool = True
    pooling: Pooling = Pooling.EMBEDDING
    max_length: int | None = None

    def __post_init__(self):
        if self.config.text is None:
            raise ValueError("this CLIP has no text tower")
        if not 0 <= self.skip_last <= self.config.text.layers:
            raise ValueError(f"skip_last {self.skip_last}: the tower has {self.config.text.layers} blocks")
        if not 1 <= self.length <= self.config.text.length:
            raise ValueError(f"max_length {self.length}: the tower reads 1 to {self.config.text.length} tokens")

    @property
    def width(self) -> int:
        return self._tower.width

    @property
    def length(self) -> int:
        return self._tower.length if self.max_length is None else self.max_length

    @cached_property
    def fingerprint(self) -> str:
        # Independent of the image tower and of `remat`.
        config, params = replace(self.config, image=None, remat=False), {"text": self.params["text"]}
        settings = (config, self.skip_last, self.final_norm, self.padding_is_read, self.pooling, self.length)
        return fingerprint_of((*settings, self.tokenizer.pad_token_id), self.tokenizer, params)

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        return self.embed(self.tokenize(captions))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        return tokenize(self.tokenizer, caption_list(captions), self.length, self._tower.vocab)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        settings = self.config, self.skip_last, self.final_norm, self.pooling
        states, pooled = in_blocks(partial(_embed, *settings, self.params), tokens.ids)
        ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
        if self.padding_is_read:
            return TextEmbedding(states, jnp.ones_like(mask), pooled, ids)
        return TextEmbedding(jnp.where(mask[..., None], states, 0.0), mask, pooled, ids)

    def states(self, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        return _embed(self.config, self.skip_last, self.final_norm, Pooling.NONE, params, ids)[0]

    @property
    def _tower(self) -> TextTowerConfig:
        assert self.config.text is not None  # see __post_init__
        return self.config.text


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _embed(
    config: CLIPConfig, skip_last: int, final_norm: bool, pooling: Pooling, params: dict, ids: Int[Array, "b n"]
) -> tuple[Float[Array, "b n d"], Float[Array, "b e"] | None]:
    arguments = {"params": params}, ids, skip_last, final_norm
    embedded = cast(TowerOutput, CLIP(config).apply(*arguments, method="embed_text"))
    if pooling is Pooling.NONE:
        return embedded.states, None
    if pooling is Pooling.STATE or embedded.embedding is None:
        return embedded.states, embedded.pooled
    return embedded.states, embedded.embedding

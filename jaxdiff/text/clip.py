"""The frozen CLIP text encoder: Stable Diffusion, DALL·E 2, CLIP score."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.clip import CLIP, CLIPConfig, TextTowerConfig, TowerOutput
from jaxdiff.text.encoder import TextEmbedding, caption_list, fingerprint_of, in_blocks
from jaxdiff.text.prompt_weights import Fragment, parse, weighted
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, tokenize
from jaxdiff.text.windows import tokenize_windows


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
    blank_is_null: `encode` turns a blank caption into the null text of models that drop captions: zeros, all masked.
    max_length: tokens per caption (with `chunks`, per window), start and end included; None: the tower's maximum.
    chunks: windows of that length per caption, for captions beyond the tower's maximum. Each window is encoded on its
        own, with a start and an end token; `tokens` are those of all windows, `pooled` is that of the first. Short
        captions get empty windows, so that prompts and negative prompts have the same length (`text/windows.py`).
    weights: read the notation of `text/prompt_weights.py`, `(word:1.3)`. It affects `tokens`, not `pooled`.
    """

    config: CLIPConfig
    params: dict
    tokenizer: PreTrainedTokenizerBase
    skip_last: int = 0
    final_norm: bool = True
    padding_is_read: bool = True
    pooling: Pooling = Pooling.EMBEDDING
    max_length: int | None = None
    chunks: int = 1
    weights: bool = False
    blank_is_null: bool = False

    def __post_init__(self):
        if self.config.text is None:
            raise ValueError("this CLIP has no text tower")
        if not 0 <= self.skip_last <= self.config.text.layers:
            raise ValueError(f"skip_last {self.skip_last}: the tower has {self.config.text.layers} blocks")
        if not 1 <= self._window <= self.config.text.length:
            raise ValueError(f"max_length {self._window}: the tower reads 1 to {self.config.text.length} tokens")
        if self.chunks < 1:
            raise ValueError(f"chunks {self.chunks}: a caption has at least one window")
        if self.blank_is_null and self.padding_is_read:
            raise ValueError("blank_is_null masks tokens: it needs padding_is_read=False")

    @property
    def width(self) -> int:
        return self._tower.width

    @property
    def length(self) -> int:
        return self.chunks * self._window

    @cached_property
    def fingerprint(self) -> str:
        # Independent of the image tower and of `remat`.
        config, params = replace(self.config, image=None, remat=False), {"text": self.params["text"]}
        settings = (config, self.skip_last, self.final_norm, self.padding_is_read, self.pooling, self.length)
        # Later settings count only where they are in use, so that older fingerprints remain valid.
        later = {
            f"{self.chunks} chunks": self.chunks > 1,
            "weights": self.weights,
            "pads with a word": self.pads_with_a_word,
            "null blank": self.blank_is_null,
        }
        used = [name for name, is_used in later.items() if is_used]
        return fingerprint_of((*settings, self.tokenizer.pad_token_id, *used), self.tokenizer, params)

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        embedded = self.embed(self.tokenize(captions))
        if not self.blank_is_null:
            return embedded
        written = jnp.asarray([bool(caption.strip()) for caption in captions], bool)[:, None]
        pooled = None if embedded.pooled is None else jnp.where(written, embedded.pooled, 0.0)
        tokens = jnp.where(written[..., None], embedded.tokens, 0.0)
        return embedded._replace(tokens=tokens, mask=embedded.mask & written, pooled=pooled)

    def pooled_of(self, tokens: Float[np.ndarray, "b n d"], mask: Bool[np.ndarray, "b n"]) -> Float[np.ndarray, "b e"]:
        """The pooled vectors of stored `tokens`, whose padding is masked: the projection of each caption's last one,
        the state of the end token. Zero for a caption without tokens.

        ValueError for an encoder whose `tokens` are not what it pools.
        """
        if self.padding_is_read or self.skip_last or not self.final_norm or self.chunks > 1 or self.weights:
            raise ValueError("pooled vectors follow from the last block's states with masked padding alone")
        count = mask.sum(1)
        last = tokens[np.arange(len(tokens)), np.maximum(count, 1) - 1].astype(np.float32)
        if self.pooling is Pooling.EMBEDDING and self.config.width is not None:
            last = last @ np.asarray(self.params["text"]["projection"]["kernel"], np.float32)
        return np.where(count[:, None] > 0, last, np.float32(0.0))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        captions = caption_list(captions)
        if self.chunks == 1 and not self.weights:
            return tokenize(self.tokenizer, captions, self.length, self._tower.vocab)
        prompts = [parse(caption) if self.weights else [Fragment(caption, 1.0)] for caption in captions]
        tokens = tokenize_windows(self.tokenizer, prompts, self._window, self.chunks, self._tower.vocab)
        return tokens if self.weights else tokens._replace(weights=None)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        settings = self.config, self.skip_last, self.final_norm, self.pooling, self._window
        states, pooled = in_blocks(partial(_embed, *settings, self.params), tokens.ids)
        ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
        read = jnp.ones_like(mask) if self.padding_is_read else mask
        if tokens.weights is not None:
            states = weighted(states, jnp.asarray(tokens.weights), read)
        if not self.padding_is_read:
            states = jnp.where(mask[..., None], states, 0.0)
        return TextEmbedding(states, read, pooled, ids)

    def states(self, params: dict, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        return _embed(self.config, self.skip_last, self.final_norm, Pooling.NONE, self._window, params, ids)[0]

    @property
    def _window(self) -> int:
        return self._tower.length if self.max_length is None else self.max_length

    @property
    def pads_with_a_word(self) -> bool:
        """Whether the padding token is not special, so that captions do not contain it (`Padding.ZERO`)."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad is not None and pad != end and pad not in self.tokenizer.added_tokens_decoder

    @property
    def _tower(self) -> TextTowerConfig:
        assert self.config.text is not None  # see __post_init__
        return self.config.text


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _embed(
    config: CLIPConfig,
    skip_last: int,
    final_norm: bool,
    pooling: Pooling,
    window: int,
    params: dict,
    ids: Int[Array, "b n"],
) -> tuple[Float[Array, "b n d"], Float[Array, "b e"] | None]:
    """States of all windows, and the pooled vectors of the first ones. The last window may be shorter."""
    count, length = ids.shape
    if length > window:
        # The tower is causal: what the last window is filled up with has no effect on the states that are kept.
        ids = jnp.pad(ids, ((0, 0), (0, -length % window))).reshape(-1, window)
    arguments = {"params": params}, ids, skip_last, final_norm
    embedded = cast(TowerOutput, CLIP(config).apply(*arguments, method="embed_text"))
    states = embedded.states.reshape(count, -1, embedded.states.shape[-1])[:, :length]
    if pooling is Pooling.NONE:
        return states, None
    pooled = embedded.pooled if pooling is Pooling.STATE or embedded.embedding is None else embedded.embedding
    return states, pooled.reshape(count, -1, pooled.shape[-1])[:, 0]

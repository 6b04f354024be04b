"""The encoder–decoder of dalle-mini and dalle-mega: text tokens in, a grid of image tokens out.

A transformer like BART's (arXiv 1910.13461) with the norms of NormFormer (arXiv 2110.09456) and gated feed-forward
layers (arXiv 2002.05202); its dense layers have no biases. The encoder reads the caption in both directions; the
decoder predicts one code after another. Sampling runs the encoder once, and keeps the keys and values of the text and
of all earlier codes in a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.attention import attention
from jaxdiff.nets.autoregressive import Logits
from jaxdiff.nets.execution import ExecutionConfig, in_loop

SPREAD = 0.02
"""Standard deviation of the initial embeddings and kernels."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Settings of the transformer. The defaults are those of dalle-mega: 2.6 B parameters.

    vocab: text tokens. text_length: of captions, padding included. codes: image tokens that are predicted. entries:
    rows of the code embedding and outputs of the last layer: the codes, the start token, and others that are never
    used. start: the token before the first code. rows, columns: of the grid of codes. encoder_layers, decoder_layers:
    their numbers. feed_forward: width between the gated layers.
    """

    vocab: int = 50272
    text_length: int = 64
    codes: int = 16384
    entries: int = 16416
    start: int = 16384
    rows: int = 16
    columns: int = 16
    width: int = 2048
    heads: int = 32
    encoder_layers: int = 24
    decoder_layers: int = 24
    feed_forward: int = 4096
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self):
        if min(self.encoder_layers, self.decoder_layers) < 1:
            raise ValueError("encoder and decoder need at least one layer each")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if not 1 <= self.codes <= self.entries or not 0 <= self.start < self.entries:
            raise ValueError(f"{self.codes} codes and start token {self.start} do not fit {self.entries} entries")
        if min(self.vocab, self.text_length, self.rows, self.columns, self.feed_forward) < 1:
            raise ValueError(f"sizes must be at least 1: {self}")

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return self.rows * self.columns

    @property
    def predicts_text(self) -> bool:
        return False

    def module(self) -> "EncoderDecoder":
        return EncoderDecoder(self)

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (regular expression for the end of a parameter's path, axis to shard)."""
        return (("(q|k|v|gate|up|head)/kernel", 1), ("(out|down)/kernel", 0))


MEGA = EncoderDecoderConfig()
"""dalle-mega."""
MINI = EncoderDecoderConfig(
    vocab=50264, entries=16385, width=1024, heads=16, encoder_layers=12, decoder_layers=12, feed_forward=2730
)
"""dalle-mini: 0.4 B parameters."""


class TextCache(NamedTuple):
    """Keys and values of each decoder layer: of the start token and the codes (b m n h), zero where there is none yet,
    and of the text (b t n h). Arrays of their own, so that a loop writes into them in place. mask: True for the text's
    tokens."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    text_keys: tuple[Array, ...]
    text_values: tuple[Array, ...]
    mask: Bool[Array, "b t"]


class EncoderDecoder(nn.Module):
    """Embeddings, layers and the output layer. Code i is predicted from the text and the codes before it."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        config, spread = self.config, nn.initializers.normal(SPREAD)
        table = lambda rows: nn.Embed(rows, config.width, embedding_init=spread)  # noqa: E731
        self.text_embedding, self.code_embedding = table(config.vocab), table(config.entries)
        self.text_position, self.code_position = table(config.text_length), table(config.tokens)
        self.text_embedding_norm, self.code_embedding_norm = _norm(config, True), _norm(config, True)
        self.encoder_norm, self.decoder_norm = _norm(config), _norm(config)
        remat = config.execution.rematerialized
        encoder, decoder = remat(nn.remat, EncoderLayer), remat(nn.remat, DecoderLayer)
        self.encoder = [encoder(config, name=f"encoder_{i}") for i in range(config.encoder_layers)]
        self.decoder = [decoder(config, name=f"decoder_{i}") for i in range(config.decoder_layers)]
        self.head = _dense(config, config.entries)

    def __call__(self, text: Int[Array, "b t"], mask: Bool[Array, "b t"], codes: Int[Array, "b r c"]) -> Logits:
        """Logits of all codes of complete grids (teacher forcing), float32; none of the text. mask: False for
        padding."""
        states = self.encode(text, mask)
        codes = codes.reshape(len(codes), -1)
        start = jnp.full((len(codes), 1), self.config.start, codes.dtype)
        x = self._codes(jnp.concatenate([start, codes[:, :-1]], axis=1), jnp.arange(self.config.tokens))
        x = self._layers(self.decoder, DecoderLayer(self.config, parent=None), x, states, mask)
        return Logits(None, self._logits(x))

    def encode(self, text: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """The states of the text; those of padding are attended to by nothing."""
        x = self.text_embedding(text) + self.text_position(jnp.arange(text.shape[1]))
        x = self.text_embedding_norm(x.astype(self.config.execution.dtype))
        return self.encoder_norm(self._layers(self.encoder, EncoderLayer(self.config, parent=None), x, mask))

    def prefill(self, text: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> tuple[Float[Array, "b k"], TextCache]:
        """The logits of the first code, and the cache with the text and the start token."""
        config, states = self.config, self.encode(text, mask)
        text_keys, text_values = zip(*(layer.read(states) for layer in self.decoder))
        shape = len(text), config.tokens, *text_keys[0].shape[-2:]
        empty = (jnp.zeros(shape, text_keys[0].dtype),) * config.decoder_layers
        start = jnp.full((len(text),), config.start)
        return self._next(start, jnp.zeros((), int), TextCache(empty, empty, text_keys, text_values, mask))

    def step(
        self, code: Int[Array, " b"], number: Int[Array, ""], cache: TextCache
    ) -> tuple[Float[Array, "b k"], TextCache]:
        """The logits of code `number` + 1, after code `number` with its value, and the cache with it. No code follows
        the last one: its logits mean nothing."""
        return self._next(code, jnp.minimum(number + 1, self.config.tokens - 1), cache)

    def _next(self, token: Array, position: Array, cache: TextCache) -> tuple[Array, TextCache]:
        """The logits after the token at `position`."""
        before = (jnp.arange(self.config.tokens) <= position)[None, None, None]
        x, stored = self._codes(token[:, None], position[None]), []
        for layer, keys, values, *text in zip(self.decoder, *cache[:4]):

            def seen(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values) -> Array:
                added = [jax.lax.dynamic_update_slice_in_dim(a, b, position, 1) for a, b in ((keys, k), (values, v))]
                stored.append(added)
                return attention(q, *added, mask=before)

            x = layer.follow(x, seen, *text, cache.mask)
        all_keys, all_values = zip(*stored)
        return self._logits(x)[:, 0], cache._replace(keys=all_keys, values=all_values)

    def _codes(self, tokens: Int[Array, "b m"], positions: Int[Array, " m"]) -> Float[Array, "b m d"]:
        x = self.code_embedding(tokens) + self.code_position(positions)
        return self.code_embedding_norm(x.astype(self.config.execution.dtype))

    def _logits(self, x: Float[Array, "b m d"]) -> Float[Array, "b m k"]:
        return self.head(self.decoder_norm(x))[..., : self.config.codes].astype(jnp.float32)

    def _layers(self, layers: Sequence[nn.Module], layer: nn.Module, x: Array, *given: Array) -> Array:
        """One layer after another. layer: one without a parent, for a loop."""
        execution = self.config.execution
        if not execution.scan or self.is_initializing():
            for each in layers:
                x = cast(Any, each)(x, *given)
            return x
        params = [self.variables["params"][str(each.name)] for each in layers]
        return in_loop(execution, params, lambda x, params: cast(Array, layer.apply({"params": params}, x, *given)), x)


class Heads(nn.Module):
    """The dense layers of an attention layer."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        self.q, self.k, self.v, self.out = (_dense(self.config, self.config.width) for _ in range(4))

    def queries(self, x: Float[Array, "b l w"]) -> Float[Array, "b l n h"]:
        return self._split(self.q(x))

    def read(self, x: Float[Array, "b l w"]) -> tuple[Float[Array, "b l n h"], Float[Array, "b l n h"]]:
        """Keys and values."""
        return self._split(self.k(x)), self._split(self.v(x))

    def join(self, x: Float[Array, "b l n h"]) -> Float[Array, "b l w"]:
        return self.out(x.reshape(*x.shape[:2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.heads, -1)


class GatedFeedForward(nn.Module):
    """Norm, a gate times a linear layer, norm, linear layer."""

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        config, width = self.config, self.config.feed_forward
        x = _norm(config, name="pre_norm")(x)
        x = nn.gelu(_dense(config, width, "gate")(x), approximate=False) * _dense(config, width, "up")(x)
        return _dense(config, config.width, "down")(_norm(config, name="middle_norm")(x))


class EncoderLayer(nn.Module):
    """Attention of the text to itself, between two norms, and a feed-forward layer."""

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        config = self.config
        y, heads = _norm(config, name="pre_norm")(x), Heads(config, name="attention")
        y = heads.join(attention(heads.queries(y), *heads.read(y), mask=mask[:, None, None]))
        x += _norm(config, True, "post_norm")(y)
        return x + GatedFeedForward(config, name="feed_forward")(x)


class DecoderLayer(nn.Module):
    """Causal attention of the codes, attention to the text, each between two norms, and a feed-forward layer."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        config = self.config
        self.pre_norm, self.post_norm, self.attention = _norm(config), _norm(config, True), Heads(config)
        self.text_pre_norm, self.text_post_norm = _norm(config), _norm(config, True)
        self.text_attention, self.feed_forward = Heads(config), GatedFeedForward(config)

    def __call__(
        self, x: Float[Array, "b m d"], states: Float[Array, "b t d"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b m d"]:
        """All codes at once. states, mask: of the text."""
        causal = jnp.asarray(np.tri(x.shape[1], dtype=bool))[None, None]
        return self.follow(x, lambda q, k, v: attention(q, k, v, mask=causal), *self.read(states), mask)

    def read(self, states: Float[Array, "b t d"]) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n h"]]:
        """Keys and values of the text."""
        return self.text_attention.read(states)

    def follow(
        self,
        x: Float[Array, "b m d"],
        attend: Callable[[Array, Array, Array], Array],
        text_keys: Float[Array, "b t n h"],
        text_values: Float[Array, "b t n h"],
        mask: Bool[Array, "b t"],
    ) -> Float[Array, "b m d"]:
        """Some of the codes. attend: maps queries, keys and values of these codes (b m n h) to outputs."""
        y = self.pre_norm(x)
        x += self.post_norm(self.attention.join(attend(self.attention.queries(y), *self.attention.read(y))))
        q = self.text_attention.queries(self.text_pre_norm(x))
        y = attention(q, text_keys, text_values, mask=mask[:, None, None])
        x += self.text_post_norm(self.text_attention.join(y))
        return x + self.feed_forward(x)


def _dense(config: EncoderDecoderConfig, features: int, name: str | None = None) -> nn.Dense:
    spread = nn.initializers.normal(SPREAD)
    return nn.Dense(features, use_bias=False, dtype=config.execution.dtype, kernel_init=spread, name=name)


def _norm(config: EncoderDecoderConfig, scale: bool = False, name: str | None = None) -> nn.LayerNorm:
    """With statistics in float32. scale: whether it multiplies; norms before a dense layer only add a bias."""
    return nn.LayerNorm(1e-5, use_scale=scale, dtype=config.execution.dtype, name=name)

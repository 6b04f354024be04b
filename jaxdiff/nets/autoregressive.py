"""The autoregressive transformer of DALL·E 1 (arXiv 2102.12092, B.1): text tokens, then a grid of image tokens.

One decoder models both: text attends causally to text, image tokens attend to the text and to some of the image tokens
before them (`nets/sparse_attention.py`). Sampling runs the text once and then one image token at a time, with the keys
and values of all earlier tokens in a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.attention import attention
from jaxdiff.nets.blocks import Dtype
from jaxdiff.nets.execution import ExecutionConfig, in_loop
from jaxdiff.nets.sparse_attention import Pattern, TokenGrid, attend, dense_mask

SPREAD = 0.02
"""Standard deviation of the initial embeddings and kernels."""


def published_patterns(layers: int) -> tuple[Pattern, ...]:
    """Row, column, row, row, and again; the last layer is convolutional (B.1)."""
    period = Pattern.ROW, Pattern.COLUMN, Pattern.ROW, Pattern.ROW
    return (*(period[i % 4] for i in range(layers - 1)), Pattern.CONV)


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Settings of the transformer. The defaults are the paper's: 12 B parameters.

    vocab: text tokens. text_length: of captions; shorter ones are padded with a learned token for each position. codes:
    image tokens. rows, columns: of the grid of codes. patterns: the attention of each layer. kernel: of
    `Pattern.CONV`. feed_forward: its width relative to `width`.
    """

    vocab: int = 16384
    text_length: int = 256
    codes: int = 8192
    rows: int = 32
    columns: int = 32
    width: int = 3968
    heads: int = 62
    patterns: tuple[Pattern, ...] = published_patterns(64)
    kernel: int = 11
    feed_forward: int = 4
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self):
        if not self.patterns:
            raise ValueError("a transformer needs at least one layer: patterns is empty")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        _ = self.grid  # checks the sizes

    @property
    def grid(self) -> TokenGrid:
        """The sequence: a start token, the text, and the codes."""
        return TokenGrid(1 + self.text_length, self.rows, self.columns, self.kernel)

    @property
    def predicts_text(self) -> bool:
        return True

    def module(self) -> "Autoregressive":
        return Autoregressive(self)

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (regular expression for the end of a parameter's path, axis to shard)."""
        return (("(q|k|v)/kernel", 1), ("up/kernel", 1), ("(out|down)/kernel", 0), ("_head/kernel", 1))


class Cache(NamedTuple):
    """The keys and values of each layer (b l n d), at all positions; zero where no token was yet. Arrays of their own,
    so that a loop writes into them in place."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


class Logits(NamedTuple):
    """text: of each text token; None if the network predicts no text. codes: of each code."""

    text: Float[Array, "b t v"] | None
    codes: Float[Array, "b m k"]


class Autoregressive(nn.Module):
    """Embeddings, layers and output layers. Token i is predicted from the tokens before it."""

    config: AutoregressiveConfig

    def setup(self) -> None:
        config, spread = self.config, nn.initializers.normal(SPREAD)
        table = lambda rows: nn.Embed(rows, config.width, embedding_init=spread)  # noqa: E731
        self.text_embedding, self.code_embedding = table(config.vocab), table(config.codes)
        self.start = self.param("start", spread, (config.width,))
        self.pad = self.param("pad", spread, (config.text_length, config.width))
        self.text_position = self.param("text_position", spread, (config.text_length, config.width))
        self.row = self.param("row", spread, (config.rows, config.width))
        self.column = self.param("column", spread, (config.columns, config.width))
        layer = config.execution.rematerialized(partial(nn.remat, static_argnums=(2,)), Layer)
        self.layers = [layer(config, name=f"layer_{i}") for i in range(len(config.patterns))]
        self.norm = norm(config.execution.dtype)
        self.text_head, self.code_head = (
            nn.Dense(width, dtype=config.execution.dtype, kernel_init=spread) for width in (config.vocab, config.codes)
        )

    def __call__(self, text: Int[Array, "b t"], mask: Bool[Array, "b t"], codes: Int[Array, "b r c"]) -> Logits:
        """Logits of all tokens of complete sequences (teacher forcing), float32. mask: False for padding."""
        config = self.config
        x = jnp.concatenate([self._text(text, mask), self._codes(codes)], axis=1)
        x = self.norm(self._layers(x.astype(config.execution.dtype)))
        last = config.text_length
        return Logits(_float(self.text_head(x[:, :last])), _float(self.code_head(x[:, last:-1])))

    def prefill(self, text: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> tuple[Float[Array, "b k"], Cache]:
        """The logits of the first code, and the cache with the text."""
        config = self.config
        x = self._text(text, mask).astype(config.execution.dtype)
        causal = jnp.asarray(np.tri(x.shape[1], dtype=bool))[None, None]
        stored = []

        def seen(q: Array, k: Array, v: Array) -> Array:
            stored.append((k, v))
            return attention(q, k, v, mask=causal)

        for layer in self.layers:
            x = layer(x, seen)
        room = (0, 0), (0, config.grid.tokens), (0, 0), (0, 0)
        keys, values = (tuple(jnp.pad(each, room) for each in which) for which in zip(*stored))
        return _float(self.code_head(self.norm(x[:, -1]))), Cache(keys, values)

    def step(self, code: Int[Array, " b"], number: Int[Array, ""], cache: Cache) -> tuple[Float[Array, "b k"], Cache]:
        """The logits of code `number` + 1, after code `number` with its value, and the cache with it."""
        config, position = self.config, self.config.grid.prefix + number
        x = self.code_embedding(code) + self.row[number // config.columns] + self.column[number % config.columns]
        x, stored = x[:, None].astype(config.execution.dtype), []
        for layer, pattern, keys, values in zip(self.layers, config.patterns, *cache):
            mask = jnp.asarray(dense_mask(config.grid, pattern))[position][None, None, None]

            def seen(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values, mask: Array = mask):
                added = [jax.lax.dynamic_update_slice_in_dim(a, b, position, 1) for a, b in ((keys, k), (values, v))]
                stored.append(added)
                return attention(q, *added, mask=mask)

            x = layer(x, seen)
        return _float(self.code_head(self.norm(x[:, 0]))), Cache(*zip(*stored))

    def _text(self, text: Array, mask: Array) -> Float[Array, "b p d"]:
        """The start token and the text, with positions."""
        tokens = jnp.where(mask[..., None], self.text_embedding(text), self.pad) + self.text_position
        start = jnp.broadcast_to(self.start, (len(text), 1, self.config.width))
        return jnp.concatenate([start, tokens], axis=1)

    def _codes(self, codes: Array) -> Float[Array, "b m d"]:
        x = self.code_embedding(codes) + self.row[:, None] + self.column
        return x.reshape(len(codes), self.config.grid.tokens, self.config.width)

    def _layers(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        config = self.config
        execution, grid = config.execution, config.grid
        if not execution.scan or self.is_initializing():
            for layer, pattern in zip(self.layers, config.patterns):
                x = layer(x, partial(attend, grid, pattern))
            return x
        layer = Layer(config, parent=None)
        for patterns, names in periods(config.patterns):
            params = [{name: self.variables["params"][name] for name in group} for group in names]
            renamed = [dict(enumerate(group.values())) for group in params]

            def apply(x: Array, group: Any, patterns: tuple[Pattern, ...] = patterns) -> Array:
                for number, pattern in enumerate(patterns):
                    x = cast(Array, layer.apply({"params": group[number]}, x, partial(attend, grid, pattern)))
                return x

            x = in_loop(execution, renamed, apply, x)
        return x


def periods(patterns: tuple[Pattern, ...]) -> list[tuple[tuple[Pattern, ...], list[list[str]]]]:
    """The layers in loops: groups of layers with the same patterns, as few different ones as possible from the first
    layer on. Returns (patterns of a group, names of the layers of each group)."""
    loops, first = [], 0
    while first < len(patterns):
        rest = patterns[first:]
        counts = {size: _repeats(rest, size) for size in range(1, len(rest) + 1)}
        size = max(counts, key=lambda size: (size * counts[size] if counts[size] > 1 else 0, -size))
        count = counts[size]
        names = [[f"layer_{first + group * size + i}" for i in range(size)] for group in range(count)]
        loops.append((rest[:size], names))
        first += size * count
    return loops


def _repeats(patterns: tuple[Pattern, ...], size: int) -> int:
    """How often the first `size` patterns follow one another."""
    count = 1
    while patterns[count * size : (count + 1) * size] == patterns[:size]:
        count += 1
    return count


class Layer(nn.Module):
    """Pre-norm attention and feed-forward. attend: maps queries, keys and values (b l n d) to outputs."""

    config: AutoregressiveConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], attend: Callable[[Array, Array, Array], Array]
    ) -> Float[Array, "b l d"]:
        config, dtype = self.config, self.config.execution.dtype
        last = SPREAD * (2 * len(config.patterns)) ** -0.5  # of each residual branch (GPT-2)

        def dense(features: int, name: str, spread: float = SPREAD) -> nn.Dense:
            return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(spread), name=name)

        y = norm(dtype, "attention_norm")(x)
        heads = (*y.shape[:2], config.heads, config.width // config.heads)
        q, k, v = (dense(config.width, name)(y).reshape(heads) for name in ("q", "k", "v"))
        x += dense(config.width, "out", last)(attend(q, k, v).reshape(x.shape))
        y = norm(dtype, "feed_forward_norm")(x)
        y = nn.gelu(dense(config.feed_forward * config.width, "up")(y), approximate=False)
        return x + dense(config.width, "down", last)(y)


def norm(dtype: Dtype, name: str | None = None) -> nn.LayerNorm:
    """With statistics in float32."""
    return nn.LayerNorm(1e-5, dtype=dtype, name=name)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)

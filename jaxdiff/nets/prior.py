"""The diffusion prior of DALL·E 2 (arXiv 2204.06125, 2.2): a causal transformer over a caption and an embedding.

The sequence is the text tower's states, the text embedding, the time, the noised image embedding, and a learned query
at whose place CLIP's clean image embedding is read. An embedding is a grid of one position (`EmbeddingSpec`), so that a
prior is trained and sampled like any diffusion model. With the default settings it is the network of Karlo's prior.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.attention import attention
from jaxdiff.nets.blocks import TimestepEmbedding
from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning
from jaxdiff.nets.execution import ExecutionConfig

ADDED = 4
"""Tokens after the text's states."""


@dataclass(frozen=True)
class PriorConfig:
    """Settings of a prior.

    embedding: width of CLIP's embeddings of captions and images. text_width, text_length: of the text tower's states.
    width, layers, heads: of the transformer. feed_forward: its width relative to `width`.
    """

    embedding: int = 768
    text_width: int = 768
    text_length: int = 77
    width: int = 2048
    layers: int = 20
    heads: int = 32
    feed_forward: int = 4
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if self.layers < 1:
            raise ValueError(f"a prior needs at least one layer, not {self.layers}")

    def module(self) -> "Prior":
        return Prior(self)

    @property
    def stride(self) -> int:
        return 1

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def reads_padding(self) -> bool:
        return False

    @property
    def learned_variance(self) -> bool:
        return False

    @property
    def coordinates(self) -> bool:
        return False

    def tensor_rules(self) -> tuple[tuple[str, int], ...]:
        """For tensor parallelism: (regular expression for the end of a parameter's path, axis to shard)."""
        return (("(q|k|v)/kernel", 1), ("up/kernel", 1), ("(out|down)/kernel", 0))


class Prior(nn.Module):
    config: PriorConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b 1 1 e"], time: Float[Array, " b"], conditioning: Conditioning = UNCONDITIONED
    ) -> Float[Array, "b 1 1 e"]:
        """The prediction for the image embedding, float32. time: in 0…1000. conditioning: `tokens` (b n d) and
        `token_mask`, the text tower's states, and `vector` (b e), the text embedding. Masked states are not attended
        to. ValueError if one of them is missing."""
        config, dtype = self.config, self.config.execution.dtype
        states, mask, caption = conditioning.tokens, conditioning.token_mask, conditioning.vector
        if states is None or mask is None or caption is None:
            raise ValueError("a prior reads the text tower's states and the text embedding")
        query = self.param("query", nn.initializers.normal(0.02), (config.width,))
        dense = partial(nn.Dense, config.width, dtype=dtype)
        tokens = [
            dense(name="states")(states),
            dense(name="caption")(caption)[:, None],
            TimestepEmbedding(config.width, config.width, dtype, name="time")(time)[:, None],
            dense(name="image")(x[:, 0]),
            jnp.broadcast_to(query, (len(x), 1, config.width)),
        ]
        length = config.text_length + ADDED
        position = self.param("position", nn.initializers.normal(0.01), (length, config.width))
        y = jnp.concatenate([each.astype(dtype) for each in tokens], axis=1) + position.astype(dtype)
        read = jnp.pad(mask, ((0, 0), (0, ADDED)), constant_values=True)[:, None, None]
        seen = read & jnp.asarray(np.tri(length, dtype=bool))
        block = config.execution.rematerialized(nn.remat, PriorBlock)
        for number in range(config.layers):
            y = block(config.heads, config.feed_forward, dtype, name=f"layer_{number}")(y, seen)
        y = nn.LayerNorm(1e-5, dtype=dtype, name="norm")(y[:, -1])
        return nn.Dense(config.embedding, dtype=dtype, name="head")(y).astype(jnp.float32)[:, None, None]


class PriorBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    heads: int
    feed_forward: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b 1 n n"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        dense = partial(nn.Dense, dtype=self.dtype)
        y = nn.LayerNorm(1e-5, dtype=self.dtype, name="attention_norm")(x)
        heads = (*y.shape[:2], self.heads, width // self.heads)
        q, k, v = (dense(width, name=name)(y).reshape(heads) for name in ("q", "k", "v"))
        x += dense(width, name="out")(attention(q, k, v, mask=mask).reshape(x.shape))
        y = nn.LayerNorm(1e-5, dtype=self.dtype, name="feed_forward_norm")(x)
        return x + dense(width, name="down")(nn.gelu(dense(self.feed_forward * width, name="up")(y), approximate=False))

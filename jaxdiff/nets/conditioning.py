"""Conditioning inputs of diffusion networks, and how networks read text.

`Conditioning` is one pytree for every network. A field that is None is absent: the layers of a network are determined
by the fields at initialization. A *text reader* is a setting of a network; its `read` maps the text encoder's tokens to
the tokens for attention and a vector that is added to the time embedding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.attention import attention
from jaxdiff.nets.blocks import Dtype


class Hint(NamedTuple):
    """The input of one ControlNet (arXiv 2302.05543); every field has a batch axis.

    image: in [0, 1], with the ControlNet's `hint_stride` times the sides of the network's input. weight: factor of the
    residuals. fade: residual i = 0 … n of the n skips and the middle is also scaled by 10^(−fade (1 − i/n)). times: the
    lowest and highest time t at which it acts; None: always.
    """

    image: Float[Array, "b h w c"]
    weight: Float[Array, " b"]
    fade: Float[Array, " b"]
    times: Float[Array, "b 2"] | None = None


class Conditioning(NamedTuple):
    """Conditioning inputs of a diffusion network; None if absent.

    tokens, token_mask: attended to; a mask of None means all tokens. vector: projected and added to the time embedding.
    concat: concatenated to the input's channels, with the same height and width. aug_level: its noise level in [0, 1].
    residuals: feature maps to add, one per skip connection in the order of the down path, and one for the middle
    (ControlNet, arXiv 2302.05543). interval: the time step of a distilled network, in [0, 1]. hints: of a model's
    ControlNets, which compute the residuals from them (`models/control.py`).
    """

    tokens: Float[Array, "b n d"] | None = None
    token_mask: Bool[Array, "b n"] | None = None
    vector: Float[Array, "b v"] | None = None
    concat: Float[Array, "b h w c"] | None = None
    aug_level: Float[Array, " b"] | None = None
    residuals: tuple[Any, ...] | None = None
    interval: Float[Array, " b"] | None = None
    hints: tuple[Hint, ...] | None = None


UNCONDITIONED = Conditioning()


def add_residuals(skips: list[Array], middle: Array, conditioning: Conditioning) -> tuple[list[Array], Array]:
    """Add the residuals of the conditioning, if any, to the skip connections and the middle. ValueError unless there is
    one for each."""
    if conditioning.residuals is None:
        return skips, middle
    *each, last = conditioning.residuals
    if len(each) != len(skips):
        raise ValueError(f"{len(each) + 1} residuals for {len(skips)} skip connections and the middle")
    added = [skip + residual.astype(skip.dtype) for skip, residual in zip(skips, each)]
    return added, middle + last.astype(middle.dtype)


class TextRead(NamedTuple):
    """Tokens and mask for attention, and the pooled vector (None without pooling)."""

    tokens: Float[Array, "b m e"]
    mask: Bool[Array, "b m"] | None
    vector: Float[Array, "b t"] | None


@runtime_checkable
class TextReader(Protocol):
    """How a network reads text. `read` is called inside the network's module and creates its layers there."""

    def read(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, features: int, dtype: Dtype
    ) -> TextRead: ...


@dataclass(frozen=True)
class MaskedText:
    """Imagen: padding is masked. Each token is normalized and projected to `width`; a learned token is prepended, so
    that attention on an empty caption is defined. pool: pool the projected tokens into a vector by attention.
    pool_heads: 0 means one head per 64 channels."""

    width: int = 2048
    pool: bool = True
    pool_heads: int = 0

    def read(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, features: int, dtype: Dtype
    ) -> TextRead:
        mask = jnp.ones(tokens.shape[:2], bool) if mask is None else mask
        tokens, mask = TextContext(self.width, dtype, name="text")(tokens, mask)
        if not self.pool:
            return TextRead(tokens, mask, None)
        pool = AttentionPool(self.heads(self.width), features, dtype, name="pool")
        return TextRead(tokens, mask, pool(tokens, mask))

    def heads(self, width: int) -> int:
        """Of the attention that pools tokens of this width."""
        return self.pool_heads or max(1, width // 64)


@dataclass(frozen=True)
class WholeText:
    """DeepFloyd IF: all tokens are attended to, padding included. They are pooled before the projection to `width`.
    pool_heads: 0 means one head per 64 channels of the text encoder."""

    width: int = 2048
    pool: bool = True
    pool_heads: int = 0

    def read(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, features: int, dtype: Dtype
    ) -> TextRead:
        vector = None
        if self.pool:
            vector = WholeTextPool(self.heads(tokens.shape[-1]), features, dtype, name="pool")(tokens)
        return TextRead(nn.Dense(self.width, dtype=dtype, name="text")(tokens), None, vector)

    def heads(self, width: int) -> int:
        """Of the attention that pools tokens of this width."""
        return self.pool_heads or max(1, width // 64)


class TextContext(nn.Module):
    """Text for attention: LayerNorm (Imagen 2.5), projection, and one learned token that is never masked.

    The extra token keeps the softmax defined if all text is masked, and serves as an attention sink in place of the
    padding.
    """

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, text: Float[Array, "b n d"], mask: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        text = nn.LayerNorm(dtype=self.dtype)(jnp.where(mask[..., None], text, 0))
        tokens = nn.Dense(self.width, dtype=self.dtype)(text)
        null = self.param("null", nn.initializers.normal(0.02), (self.width,)).astype(self.dtype)
        null = jnp.broadcast_to(null, (text.shape[0], 1, self.width))
        always = jnp.ones((mask.shape[0], 1), bool)
        return jnp.concatenate([null, tokens], axis=1), jnp.concatenate([always, mask], axis=1)


class AttentionPool(nn.Module):
    """Attention pooling of text tokens with their mean as query (`feature_pooling_type: attention`, F.1)."""

    heads: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n e"], mask: Bool[Array, "b n"]) -> Float[Array, "b t"]:
        b, n, width = tokens.shape
        tokens = nn.LayerNorm(dtype=self.dtype)(tokens)
        weight = mask[..., None].astype(self.dtype)
        mean = (tokens * weight).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
        q = nn.Dense(width, dtype=self.dtype, name="q")(mean).reshape(b, 1, self.heads, -1)
        k = nn.Dense(width, dtype=self.dtype, name="k")(tokens).reshape(b, n, self.heads, -1)
        v = nn.Dense(width, dtype=self.dtype, name="v")(tokens).reshape(b, n, self.heads, -1)
        pooled = attention(q, k, v, mask=mask[:, None, None, :]).reshape(b, width)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(pooled)


class WholeTextPool(nn.Module):
    """DeepFloyd IF's attention pooling of text tokens: padding included, LayerNorm before and after. The query, the
    tokens' mean plus a learned offset, is also the first key and value."""

    heads: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Float[Array, "b n d"]) -> Float[Array, "b t"]:
        b, _, width = text.shape
        text = nn.LayerNorm(1e-5, dtype=self.dtype, name="text_norm")(text)
        offset = self.param("offset", nn.initializers.normal(width**-0.5), (1, width)).astype(self.dtype)
        mean = text.mean(1, keepdims=True) + offset
        text = jnp.concatenate([mean, text], axis=1)
        q = nn.Dense(width, dtype=self.dtype, name="q")(mean).reshape(b, 1, self.heads, -1)
        k = nn.Dense(width, dtype=self.dtype, name="k")(text).reshape(b, -1, self.heads, width // self.heads)
        v = nn.Dense(width, dtype=self.dtype, name="v")(text).reshape(b, -1, self.heads, width // self.heads)
        pooled = attention(q, k, v).reshape(b, width)
        pooled = nn.Dense(self.features, dtype=self.dtype, name="out")(pooled)
        return nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(pooled)

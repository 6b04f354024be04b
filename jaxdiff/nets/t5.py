"""T5 (arXiv 1910.10683), encoder and decoder: Imagen's text encoder and the model for pre-training one.

Both published generations: v1.0 has a ReLU feed-forward and an output layer tied to the embedding; v1.1, Flan-T5 and
ByT5 have a gated GELU and an untied output layer. There is no dropout: v1.1 was pre-trained without it, and a frozen
encoder has none.
"""

from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.attention import attention


@dataclass(frozen=True)
class T5Config:
    """Settings of a T5. The defaults are those of v1.1 small."""

    vocab: int = 32128
    d_model: int = 512
    d_kv: int = 64
    """Width of one attention head; heads · d_kv need not equal d_model."""
    d_ff: int = 1024
    layers: int = 8
    decoder_layers: int = 8
    """0: encoder only."""
    heads: int = 6
    buckets: int = 32
    """Number of buckets of relative positions; distant ones are logarithmic."""
    max_distance: int = 128
    """Positions at least this far apart share the last bucket."""
    gated: bool = True
    """Gated GELU feed-forward (v1.1) or plain ReLU (v1.0)."""
    tied: bool = False
    """The output layer is the embedding, transposed (v1.0)."""
    scale_logits: bool = False
    """The decoder's last states are multiplied by d_model^-0.5 before the output layer (v1.0)."""
    eps: float = 1e-6
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the matrix products. The residual stream, norms and softmax stay float32, and so do initialized
    and trained parameters; those of a checkpoint are loaded in the requested type."""
    remat: bool = False
    """Recompute each block in the backward pass to save memory."""
    # Not in the repr, from which encoder fingerprints are computed: stored fingerprints older than this field stay
    # valid, and the names of the parameters imply it.
    bias_per_layer: bool = field(default=False, repr=False)
    """Each layer has its own relative position bias (UMT5); otherwise all share the first layer's."""


SMALL = T5Config()
BASE = T5Config(d_model=768, d_ff=2048, layers=12, decoder_layers=12, heads=12)
LARGE = T5Config(d_model=1024, d_ff=2816, layers=24, decoder_layers=24, heads=16)
XL = T5Config(d_model=2048, d_ff=5120, layers=24, decoder_layers=24, heads=32)
XXL = T5Config(d_model=4096, d_ff=10240, layers=24, decoder_layers=24, heads=64)
"""Imagen's encoder: 4.76 B parameters without the decoder."""
SMALL_V1_0 = T5Config(d_ff=2048, layers=6, decoder_layers=6, heads=8, gated=False, tied=True, scale_logits=True)
BYT5_SMALL = T5Config(vocab=384, d_model=1472, d_ff=3584, layers=12, decoder_layers=4, heads=6)
TINY = T5Config(vocab=1024, d_model=128, d_kv=32, d_ff=256, layers=4, decoder_layers=2, heads=4)
"""The size shipped with the package; set the vocabulary to the tokenizer's length."""
MICRO = T5Config(vocab=2048, d_model=64, d_kv=16, d_ff=128, layers=2, decoder_layers=1, heads=4)
MINI = T5Config(vocab=2048, d_model=256, d_kv=32, d_ff=512, layers=4, decoder_layers=1, heads=8)
MIDI = T5Config(vocab=2048, d_model=512, d_kv=64, d_ff=1024, layers=4, decoder_layers=1, heads=8)
"""Encoders of 0.2, 3.1 and 11.5 M parameters (TINY lies between the first two), to study the encoder's size."""


class T5Encoder(nn.Module):
    """Maps token ids to embeddings. Its parameters are the `shared` and `encoder` subtrees of a T5."""

    config: T5Config

    def setup(self):
        self.shared = _embedding(self.config)
        self.encoder = Stack(self.config, self.config.layers)

    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        """Float32 embeddings; those of padding (mask False) are arbitrary, and no other position depends on them."""
        return self.encoder(self.shared(ids), mask)


class T5(nn.Module):
    """Encoder, decoder and output layer."""

    config: T5Config

    def setup(self):
        config = self.config
        self.shared = _embedding(config)
        self.encoder = Stack(config, config.layers)
        self.decoder = Stack(config, config.decoder_layers, causal=True)
        if not config.tied:
            self.head = _dense(config, config.vocab, config.d_model**-0.5)

    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"], decoder_ids: Int[Array, "b m"]
    ) -> Float[Array, "b m v"]:
        """Logits of the token that follows each of `decoder_ids` (teacher forcing; see `shift_right`)."""
        return self.decode(decoder_ids, self.encode(ids, mask), mask)

    def encode(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.encoder(self.shared(ids), mask)

    def decode(
        self,
        ids: Int[Array, "b m"],
        encoded: Float[Array, "b n d"],
        encoded_mask: Bool[Array, "b n"],
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b m v"]:
        """Float32 logits. mask: hides decoder positions from later ones; trailing padding needs none."""
        if mask is None:
            mask = jnp.ones(ids.shape, bool)
        x = self.decoder(self.shared(ids), mask, encoded, encoded_mask)
        if self.config.scale_logits:
            x = x * self.config.d_model**-0.5
        x = x.astype(self.config.dtype)
        logits = self.shared.attend(x) if self.config.tied else self.head(x)
        return logits.astype(jnp.float32)


def shift_right(targets: Int[Array, "b m"], start_id: int) -> Int[Array, "b m"]:
    """Decoder inputs for `targets`: the start token, then all targets but the last."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)


def encoder_params(params: dict) -> dict:
    """The subset of a T5's parameters for `T5Encoder`."""
    return {"shared": params["shared"], "encoder": params["encoder"]}


class Stack(nn.Module):
    """Blocks with a relative position bias, then a norm. causal: a decoder; each block also attends to the encoder."""

    config: T5Config
    layers: int
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"],
        encoded: Float[Array, "b m d"] | None = None,
        encoded_mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        length = x.shape[1]
        own = self.config.bias_per_layer
        names = [f"relative_bias_{i}" for i in range(self.layers)] if own else ["relative_bias"] if self.layers else []
        biases = [RelativeBias(self.config, not self.causal, name=name)(length) for name in names]
        visible = mask[:, None, None, :]
        if self.causal:
            visible = visible & jnp.tri(length, dtype=bool)
        cross = None if encoded_mask is None else encoded_mask[:, None, None, :]
        block = nn.remat(Block) if self.config.remat else Block
        x = x.astype(jnp.float32)
        for i in range(self.layers):
            x = block(self.config, name=f"block_{i}")(x, visible, biases[i if own else 0], encoded, cross)
        return RMSNorm(self.config.eps, name="norm")(x)


class Block(nn.Module):
    """Pre-norm residual block: self-attention, cross-attention if `encoded` is given, feed-forward."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        visible: Bool[Array, "b 1 #n n"],
        bias: Float[Array, "1 h n n"],
        encoded: Float[Array, "b m d"] | None = None,
        encoded_visible: Bool[Array, "b 1 1 m"] | None = None,
    ) -> Float[Array, "b n d"]:
        config = self.config
        y = RMSNorm(config.eps, name="attention_norm")(x)
        x = x + MultiHead(config, name="attention")(y, y, visible, bias)
        if encoded is not None:
            assert encoded_visible is not None  # they come together
            y = RMSNorm(config.eps, name="cross_attention_norm")(x)
            x = x + MultiHead(config, name="cross_attention")(y, encoded, encoded_visible, None)
        y = RMSNorm(config.eps, name="feed_forward_norm")(x)
        return x + FeedForward(config, name="feed_forward")(y)


class MultiHead(nn.Module):
    """Multi-head attention without biases and without 1/√d_kv, which T5 folds into the initialization of q."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"],
        visible: Bool[Array, "b 1 #n m"],
        bias: Float[Array, "1 h n m"] | None,
    ) -> Float[Array, "b n d"]:
        config = self.config
        inner = config.heads * config.d_kv
        x, context = x.astype(config.dtype), context.astype(config.dtype)
        d = config.d_model
        q = _dense(config, inner, (d * config.d_kv) ** -0.5, "q")(x)
        k = _dense(config, inner, d**-0.5, "k")(context)
        v = _dense(config, inner, d**-0.5, "v")(context)
        q, k, v = (a.reshape(*a.shape[:2], config.heads, config.d_kv) for a in (q, k, v))
        bias = None if bias is None else bias.astype(config.dtype)
        y = attention(q, k, v, mask=visible, bias=bias, scale=1.0)
        return _dense(config, d, inner**-0.5, "o")(y.reshape(*y.shape[:2], inner)).astype(jnp.float32)


class FeedForward(nn.Module):
    """v1.0: relu(x wi) wo. v1.1: (gelu(x wi_0) · x wi_1) wo, with the tanh form of GELU."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        config = self.config
        x = x.astype(config.dtype)
        std = config.d_model**-0.5
        if config.gated:
            gate = nn.gelu(_dense(config, config.d_ff, std, "wi_0")(x), approximate=True)
            hidden = gate * _dense(config, config.d_ff, std, "wi_1")(x)
        else:
            hidden = nn.relu(_dense(config, config.d_ff, std, "wi")(x))
        return _dense(config, config.d_model, config.d_ff**-0.5, "wo")(hidden).astype(jnp.float32)


class RelativeBias(nn.Module):
    """One learned scalar per head and bucket of relative positions, added to the attention logits."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 h n n"]:
        config = self.config
        table = self.param(
            "embedding", nn.initializers.normal(config.d_model**-0.5), (config.buckets, config.heads), jnp.float32
        )
        position = np.arange(length)
        relative = position[None, :] - position[:, None]
        bucket = relative_buckets(relative, self.bidirectional, config.buckets, config.max_distance)
        return table[bucket].transpose(2, 0, 1)[None]


def relative_buckets(relative: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each relative position (key minus query), computed on the host, as lengths are static.

    Half of the buckets hold one distance each; the other half grow logarithmically up to `max_distance`, beyond which
    all distances share the last. bidirectional: each direction has half of the buckets (encoder); otherwise positions
    ahead count as distance 0 (decoder, where they are masked).
    """
    if bidirectional:
        buckets //= 2
        offset = np.where(relative > 0, buckets, 0)
        distance = np.abs(relative)
    else:
        offset = np.zeros_like(relative)
        distance = np.maximum(-relative, 0)
    exact = buckets // 2
    # float32 as in every public implementation: at powers of two, rounding decides the bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    return (offset + np.where(distance < exact, distance, np.minimum(far, buckets - 1))).astype(np.int32)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · scale in float32, without mean subtraction or bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps) * scale


class Linear(nn.Module):
    """x · kernel, without a bias."""

    width: int
    std: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        shape = (x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape, jnp.float32)
        # One flat matrix product: XLA's CPU gradient of a product with two leading axes takes 1.6 times as long.
        flat = x.reshape(-1, x.shape[-1])
        if kernel.dtype == jnp.bfloat16:
            kernel = jax.lax.platform_dependent(kernel, flat, cpu=_after, default=lambda kernel, _: kernel)
        return (flat @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.width)


def _after(kernel: Float[Array, "d e"], x: Float[Array, "n d"]) -> Float[Array, "d e"]:
    """`kernel` with a data dependency on `x`; no value exceeds infinity, but the compiler does not simplify that.

    On a CPU XLA multiplies bfloat16 as float32. Without the dependency it creates the float32 copies of all layers
    before the first is used: for XXL 19 GB beside the model's 9.5 GB, compared with 0.8 GB for one layer.
    """
    return jnp.where(x[0, 0] > jnp.inf, jnp.zeros((), kernel.dtype), kernel)


def _embedding(config: T5Config) -> nn.Embed:
    return nn.Embed(config.vocab, config.d_model, dtype=config.dtype, embedding_init=nn.initializers.normal(1.0))


def _dense(config: T5Config, width: int, std: float, name: str | None = None) -> "Linear":
    return Linear(width, std, config.dtype, name=name)

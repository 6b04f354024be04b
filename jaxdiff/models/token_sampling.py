"""Drawing tokens from logits: temperature, top-k, top-p. The settings are traced: new values do not recompile."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.numbers import Number, is_plain, pytree_of_numbers


@pytree_of_numbers
@dataclass(frozen=True)
class TokenSampling:
    """Settings of sampling.

    temperature: divides the logits; 0 takes the likeliest token. top_k: draw from this many of the likeliest tokens; 0:
    from all. top_p: draw from the likeliest tokens whose probabilities, after `top_k`, reach this sum (arXiv
    1904.09751); 1: from all. guidance: weight w of the text: w · conditional + (1 − w) · unconditional logits; 1 is
    off.
    """

    temperature: Number = 1.0
    top_k: Int[Array, ""] | int = 0
    top_p: Number = 1.0
    guidance: Number = 1.0

    def __post_init__(self):
        if is_plain(self.temperature) and not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: must be at least 0")
        if is_plain(self.top_k) and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: a number of tokens, or 0 for all")
        if is_plain(self.top_p) and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie in (0, 1]")


def truncated(
    logits: Float[Array, "b k"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "b k"]:
    """The logits, −∞ for tokens outside of `top_k` and `top_p`. Of equal logits the earlier token is the likelier; the
    likeliest token always remains."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((rank < top_k) | (jnp.asarray(top_k) == 0), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < top_p) | (rank == 0) | (jnp.asarray(top_p) >= 1.0)
    ranked = jnp.where(kept, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def drawn(logits: Float[Array, "b k"], keys: Key[Array, " b"], sampling: TokenSampling) -> Int[Array, " b"]:
    """A token for each row, from its own key."""
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    cold = temperature == 0
    scaled = truncated(logits / jnp.where(cold, 1.0, temperature), sampling.top_k, sampling.top_p)
    noisy = scaled + noise.gumbel(keys, logits.shape[1:])
    return jnp.argmax(jnp.where(cold, logits, noisy), axis=-1).astype(jnp.int32)

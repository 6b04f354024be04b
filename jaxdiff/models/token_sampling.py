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
    number = _ordered(logits)
    ranked = jnp.flip(jnp.sort(number, axis=-1), axis=-1)
    rank = jnp.arange(logits.shape[-1])
    among = (rank < top_k) | (jnp.asarray(top_k) == 0)
    probability = jax.nn.softmax(jnp.where(among, _logits(ranked), -jnp.inf))
    before = jnp.cumsum(probability, axis=-1) - probability
    within = (before < top_p) | (jnp.asarray(top_p) >= 1.0)
    kept = ((among & within) | (rank == 0)).sum(-1, keepdims=True)
    last = jnp.take_along_axis(ranked, kept - 1, axis=-1)
    above, equal = number > last, number == last
    remaining = kept - above.sum(-1, keepdims=True)
    return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= remaining)), logits, -jnp.inf)


def _ordered(logits: Float[Array, "b k"]) -> Int[Array, "b k"]:
    """Integers in the order of the logits: on CPUs XLA sorts them four times as fast. `_logits` is the inverse."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0.0, 0.0, logits).astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _logits(ordered: Int[Array, "b k"]) -> Float[Array, "b k"]:
    return jax.lax.bitcast_convert_type(jnp.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered), jnp.float32)


def drawn(logits: Float[Array, "b k"], keys: Key[Array, " b"], sampling: TokenSampling) -> Int[Array, " b"]:
    """A token for each row, from its own key."""
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    cold = temperature == 0
    scaled = logits / jnp.where(cold, 1.0, temperature)
    everything = (jnp.asarray(sampling.top_k) == 0) & (jnp.asarray(sampling.top_p) >= 1.0)
    scaled = jax.lax.cond(  # sorting takes most of the time of a small transformer
        everything, lambda: scaled, lambda: truncated(scaled, sampling.top_k, sampling.top_p)
    )
    noisy = scaled + noise.gumbel(keys, logits.shape[1:])
    return jnp.argmax(jnp.where(cold, logits, noisy), axis=-1).astype(jnp.int32)

"""How a codebook is trained (VQ-VAE, arXiv 1711.00937): by gradients, or by averages of the codes assigned to it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

SMALLEST = 1e-10
"""Entries with a smaller average usage keep their place, instead of a division by zero."""


@dataclass(frozen=True)
class GradientCodebook:
    """The codebook is a parameter; its loss is the squared distance to the codes. commitment: weight of the same
    distance as a loss of the encoder (β in equation 3)."""

    commitment: float = 0.25


@dataclass(frozen=True)
class EMACodebook:
    """Each entry is the mean of the codes assigned to it, averaged exponentially over the steps (appendix A.1).

    decay: of the averages. restart: an entry with less than this multiple of the mean usage, 1/k, becomes a random code
    of the batch (arXiv 2005.00341, 3.1); 0 never restarts.
    """

    commitment: float = 0.25
    decay: float = 0.99
    restart: float = 0.03

    def __post_init__(self):
        if not 0 <= self.decay < 1 or not 0 <= self.restart < 1:
            raise ValueError(f"decay and restart lie in [0, 1), not {self.decay} and {self.restart}")


class Averages(NamedTuple):
    """The codebook, and averages of each entry's usage (fraction of the codes) and of the sum of its codes, divided by
    the number of all codes."""

    codebook: Float[Array, "k c"]
    usage: Float[Array, " k"]
    sums: Float[Array, "k c"]


def initial(codebook: Float[Array, "k c"]) -> Averages:
    """All entries are used equally."""
    usage = jnp.full(len(codebook), 1.0 / len(codebook))
    return Averages(codebook, usage, codebook * usage[:, None])


def usage_of(indices: Int[Array, "b h w"], codes: int) -> Float[Array, " k"]:
    """The fraction of the codes assigned to each entry."""
    return jnp.zeros(codes).at[indices.reshape(-1)].add(1.0 / indices.size)


def updated(
    config: EMACodebook,
    averages: Averages,
    code: Float[Array, "b h w c"],
    indices: Int[Array, "b h w"],
    key: Key[Array, ""],
) -> Averages:
    """The averages after a step in which the codes were assigned to `indices`. No gradient."""
    flat = jax.lax.stop_gradient(code.astype(jnp.float32)).reshape(-1, code.shape[-1])
    count, entries = len(flat), len(averages.usage)
    sums = jnp.zeros_like(averages.sums).at[indices.reshape(-1)].add(flat / count)
    usage = config.decay * averages.usage + (1 - config.decay) * usage_of(indices, entries)
    sums = config.decay * averages.sums + (1 - config.decay) * sums
    means = sums / jnp.maximum(usage, SMALLEST)[:, None]
    codebook = jnp.where((usage > SMALLEST)[:, None], means, averages.codebook)
    restarted = initial(flat[jax.random.randint(key, (entries,), 0, count)])
    dead = usage < config.restart / entries
    return Averages(
        jnp.where(dead[:, None], restarted.codebook, codebook),
        jnp.where(dead, restarted.usage, usage),
        jnp.where(dead[:, None], restarted.sums, sums),
    )

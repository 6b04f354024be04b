"""Per-sample randomness: the noise of image i of a seed does not depend on the rest of the batch.

Each sample has its own key, folded from the seed's key and the sample's index; each use folds in its purpose (a step
number, a stage). Noise is drawn key by key, so it is bit-equal for every batch size and mesh.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample_keys(key: Key[Array, ""], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key per sample. key: a typed key (`jax.random.key(seed)`). indices: the samples' numbers within the seed."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def fold(keys: Key[Array, " b"], data: Int[Array, ""] | int) -> Key[Array, " b"]:
    """New keys for one use; `data` (such as the step) is the same for every sample and may be traced."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal_like(keys: Key[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "b ..."]:
    """Standard normal noise (b, *shape), where `shape` is that of one sample. Drawn in at least float32, then cast."""
    precision = jnp.promote_types(dtype, jnp.float32)
    return jax.vmap(lambda key: jax.random.normal(key, shape, precision))(keys).astype(dtype)


def uniform(keys: Key[Array, " b"], shape: tuple[int, ...] = ()) -> Float[Array, "b ..."]:
    """Uniform draws in [0, 1), float32, (b, *shape)."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)


def gumbel(keys: Key[Array, " b"], shape: tuple[int, ...] = ()) -> Float[Array, "b ..."]:
    """Standard Gumbel noise, float32, (b, *shape): the argmax of logits plus this is a draw from their distribution."""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)

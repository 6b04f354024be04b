"""Per-sample randomness: the noise of image i of a seed does not depend on what else is in the batch.

Each sample has its own key, folded from the seed's key and the sample's index; each use folds in what it is for (a step
number, a stage). Draws are then made key by key, so that they are bit-equal whatever the batch size or the mesh.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample_keys(key: Key[Array, ""], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key for each sample. `key` is typed (`jax.random.key(seed)`); `indices` number the samples of that seed."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def fold(keys: Key[Array, " b"], data: Int[Array, ""] | int) -> Key[Array, " b"]:
    """New keys for one use, from the same number for every sample (such as the step; it may be traced)."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal_like(keys: Key[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "b ..."]:
    """Standard normal noise (b, *shape); `shape` is that of one sample. Drawn in float32 at least, then cast."""
    precision = jnp.promote_types(dtype, jnp.float32)
    return jax.vmap(lambda key: jax.random.normal(key, shape, precision))(keys).astype(dtype)


def uniform(keys: Key[Array, " b"], shape: tuple[int, ...] = ()) -> Float[Array, "b ..."]:
    """Uniform draws in [0, 1), float32, (b, *shape)."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)

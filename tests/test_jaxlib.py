"""The installed jaxlib computes what it should: canaries of releases that are excluded in pyproject.toml."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

N = 16385  # rows from which on the excluded release is wrong


@pytest.mark.parametrize("size", (3, 4, 8))
def test_vmapped_matrix_vector_products_are_exact(size):
    """jax-ml/jax#39103: jaxlib 0.10.2 gives 266342400 for 16384² on CPUs, without a word."""
    x = jnp.zeros((N, size)).at[:, 0].set(jnp.arange(N))
    squared_norm = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(size) @ row) ** 2)))
    assert float(squared_norm(x)[-1]) == float(N - 1) ** 2


def test_products_of_many_axes_are_reduced():
    """jax-ml/jax#39257: a broadcast product of seven axes ends the process with 0.10.2 and 0.11.0."""
    a = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2, 1, 1, 1)
    b = np.arange(2 * 2 * 3, dtype=np.float32).reshape(1, 1, 1, 2, 2, 1, 3)
    product = jax.jit(lambda a, b: jnp.sum(a * b, axis=(1, 3, 5)))(a, b)
    np.testing.assert_array_equal(product, np.sum(a * b, axis=(1, 3, 5)))

"""The installed jaxlib computes what it should: canaries of the releases that pyproject.toml excludes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

RANK_8 = """
import jax, jax.numpy as jnp
x, y = jnp.ones((10, 4, 6)), jnp.ones((10, 4, 6, 9, 9, 9, 9, 9))
total = jax.jit(lambda x, y: jnp.log(jnp.sum(x[..., None, None, None, None, None] * y, axis=2)))(x, y)
assert abs(float(total.max()) - 1.7917595) < 1e-6, float(total.max())
"""


@pytest.mark.parametrize("rows", (16_385, 32_769, 40_000, 65_537))
@pytest.mark.parametrize("width", (3, 5))
def test_vmapped_matrix_vector_products(rows, width):
    """jax-ml/jax#39103: in 0.10.2 some rows of a fused product are 0.6 % off; at which sizes, the CPU decides."""
    x = np.zeros((rows, width), np.float32)
    x[:, 0] = np.arange(rows)
    squared_norms = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(width) @ row) ** 2)))(x)
    np.testing.assert_allclose(squared_norms, x[:, 0] ** 2, rtol=1e-6)


def test_reduced_products_of_eight_axes():
    """jax-ml/jax#39257: jaxlib 0.10.2 and 0.11.0 crash or hang, so it runs in a process of its own."""
    subprocess.run([sys.executable, "-c", RANK_8], check=True, timeout=120)

"""The installed jaxlib computes what it should: canaries of the releases that pyproject.toml excludes.

Each in a process of its own, with the compiler's own settings in place of the tests'; one of them crashes, too.
"""

import os
import subprocess
import sys

import pytest

PRODUCTS = """
import jax, jax.numpy as jnp, numpy as np
for rows in (16_385, 32_769, 40_000, 65_537):
    x = np.zeros((rows, WIDTH), np.float32)
    x[:, 0] = np.arange(rows)
    squared_norms = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(WIDTH) @ row) ** 2)))(x)
    np.testing.assert_allclose(squared_norms, x[:, 0] ** 2, rtol=1e-6, err_msg=f"{rows} rows")
"""

RANK_8 = """
import jax, jax.numpy as jnp
x, y = jnp.ones((10, 4, 6)), jnp.ones((10, 4, 6, 9, 9, 9, 9, 9))
total = jax.jit(lambda x, y: jnp.log(jnp.sum(x[..., None, None, None, None, None] * y, axis=2)))(x, y)
assert abs(float(total.max()) - 1.7917595) < 1e-6, float(total.max())
"""


def runs(script):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("width", (3, 5))
def test_vmapped_matrix_vector_products(width):
    """jax-ml/jax#39103: in 0.10.2 some rows of a fused product are 0.6 % off; at which sizes, the CPU decides."""
    runs(PRODUCTS.replace("WIDTH", str(width)))


def test_reduced_products_of_eight_axes():
    """jax-ml/jax#39257: jaxlib 0.10.2 and 0.11.0 crash or hang."""
    runs(RANK_8)

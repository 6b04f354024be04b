"""Patterns of sparse attention: their masks by hand, and blocks against the dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets.sparse_attention import Pattern, TokenGrid, attend, dense_mask, in_blocks

SMALL = TokenGrid(prefix=6, rows=4, columns=4, kernel=3)
"""The layout of the paper's Figure 11."""


@pytest.mark.parametrize("pattern", Pattern)
def test_masks(pattern):
    """Cell by cell, from the words of the paper."""
    mask = dense_mask(SMALL, pattern)
    for i in range(SMALL.length):
        for j in range(SMALL.length):
            if i < 6 or j < 6:
                wanted = j <= i
            else:
                back = i - j
                # The previous five image tokens, itself included: the last is in the same column of the previous row.
                row = back in range(5)
                column = back in (0, 4, 8, 12)
                # Three columns around the same column of the previous row, and one to the left; sides wrap around.
                conv = back in (0, 1, 3, 4, 5)
                wanted = {"full": back >= 0, "row": row, "column": column, "conv": conv}[pattern.value]
            assert mask[i, j] == wanted, (i, j)


@pytest.mark.parametrize("pattern", [Pattern.ROW, Pattern.COLUMN, Pattern.CONV])
@pytest.mark.parametrize(
    "grid", [SMALL, TokenGrid(3, 5, 2, 5), TokenGrid(1, 1, 6, 3), TokenGrid(2, 6, 3, 1), TokenGrid(2, 7, 3, 9)]
)
def test_blocks(pattern, grid):
    """Outputs and gradients are those of the dense mask; grids narrower than the kernel, and of one row."""
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(2, grid.length, 2, 4)), jnp.float32) for _ in range(4))

    def run(blocks):
        return jax.jit(
            jax.value_and_grad(
                lambda q, k, v: (attend(grid, pattern, q, k, v, blocks) * weights).sum(), argnums=(0, 1, 2)
            )
        )(q, k, v)

    (dense, slopes), (blocked, others) = run(False), run(True)
    np.testing.assert_allclose(blocked, dense, rtol=1e-5, atol=1e-5)
    for a, b in zip(slopes, others):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_choice():
    """The published layout runs in blocks; a grid that is small beside the text does not. Blocks need less work."""
    published = TokenGrid()
    assert all(in_blocks(published, pattern) for pattern in (Pattern.ROW, Pattern.COLUMN, Pattern.CONV))
    assert not in_blocks(published, Pattern.FULL) and not in_blocks(TokenGrid(40, 4, 4), Pattern.ROW)
    shape = jax.ShapeDtypeStruct((1, published.length, 1, 64), jnp.float32)

    def flops(pattern, blocks):
        lowered = jax.jit(lambda q, k, v: attend(published, pattern, q, k, v, blocks)).lower(shape, shape, shape)
        return lowered.cost_analysis()["flops"]

    for pattern in (Pattern.ROW, Pattern.COLUMN, Pattern.CONV):
        assert flops(pattern, True) < 0.5 * flops(pattern, False)


@pytest.mark.parametrize(("settings", "message"), [((0, 2, 2), "a prefix and a grid"), ((1, 2, 2, 4), "must be odd")])
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid(*settings)

"""Sparse causal attention over a sequence of text tokens and a grid of image tokens (DALL·E 1, arXiv 2102.12092, B.1).

Text tokens attend to the earlier text. An image token attends to the entire text, to itself, and to some of the image
tokens before it in raster order: its pattern. A pattern is defined by its dense mask; `attend` computes the same in
blocks where that needs less work.
"""

import enum
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdiff.nets.attention import attention


class Pattern(enum.Enum):
    """Which of the earlier image tokens a token attends to.

    FULL: all. ROW: those since the same column of the previous row (Figure 11a: as many as a row has, and itself).
    COLUMN: those of its column (11b). CONV: those of a square kernel around it, which wraps around at the sides (11d).
    """

    FULL = "full"
    ROW = "row"
    COLUMN = "column"
    CONV = "conv"


@dataclass(frozen=True)
class TokenGrid:
    """The layout of a sequence. prefix: tokens before the grid. rows, columns: of the grid, in raster order. kernel:
    side of the kernel of `Pattern.CONV`, odd."""

    prefix: int = 257
    rows: int = 32
    columns: int = 32
    kernel: int = 11

    def __post_init__(self):
        if min(self.prefix, self.rows, self.columns) < 1:
            raise ValueError(f"a sequence needs a prefix and a grid, not {self}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: must be odd")

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return self.rows * self.columns

    @property
    def length(self) -> int:
        return self.prefix + self.tokens


@lru_cache
def dense_mask(grid: TokenGrid, pattern: Pattern) -> Bool[np.ndarray, "l l"]:
    """True where a token (row) attends to another (column)."""
    mask = np.tri(grid.length, dtype=bool)
    if pattern is not Pattern.FULL:
        number = np.arange(grid.tokens)
        mask[grid.prefix :, grid.prefix :] &= _near(grid, pattern, number[:, None] - number)
    mask.flags.writeable = False
    return mask


def _near(grid: TokenGrid, pattern: Pattern, back: np.ndarray) -> np.ndarray:
    """Whether tokens that lie `back` tokens before another are attended to by it."""
    if pattern is Pattern.ROW:
        return back <= grid.columns
    if pattern is Pattern.COLUMN:
        return back % grid.columns == 0
    half = grid.kernel // 2
    rows, columns = np.mgrid[: half + 1, -half : half + 1]
    return np.isin(back, rows * grid.columns + columns)


def rows_back(grid: TokenGrid, pattern: Pattern) -> int:
    """How many rows above its own a token of `ROW` or `CONV` attends to."""
    half = grid.kernel // 2
    furthest = grid.columns if pattern is Pattern.ROW else half * grid.columns + half
    return min(grid.rows - 1, -(-furthest // grid.columns))


def in_blocks(grid: TokenGrid, pattern: Pattern) -> bool:
    """Whether blocks need at most half of the dense product: as many keys for each query."""
    if pattern is Pattern.FULL:
        return False
    keys = grid.rows if pattern is Pattern.COLUMN else (rows_back(grid, pattern) + 1) * grid.columns
    return 2 * (grid.prefix + keys) <= grid.length


def attend(
    grid: TokenGrid,
    pattern: Pattern,
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    blocks: bool | None = None,
) -> Float[Array, "b l n d"]:
    """Attention of a complete sequence. blocks: compute in blocks, or by the dense mask; None: whichever is less
    work."""
    if blocks is None:
        blocks = in_blocks(grid, pattern)
    if not blocks or pattern is Pattern.FULL:
        return attention(q, k, v, mask=jnp.asarray(dense_mask(grid, pattern))[None, None])
    cut = grid.prefix
    text = attention(q[:, :cut], k[:, :cut], v[:, :cut], mask=jnp.asarray(np.tri(cut, dtype=bool))[None, None])
    run = _columns if pattern is Pattern.COLUMN else partial(_rows, pattern)
    q2, k2, v2 = (each[:, cut:].reshape(len(each), grid.rows, grid.columns, *each.shape[2:]) for each in (q, k, v))
    image = run(grid, q2, k2, v2, (k[:, :cut], v[:, :cut]))
    return jnp.concatenate([text, image.reshape(len(q), grid.tokens, *q.shape[2:])], axis=1)


def _columns(grid: TokenGrid, q: Array, k: Array, v: Array, text: tuple[Array, Array]) -> Array:
    """Every column attends to the text and to itself. q, k, v: (b rows columns n d)."""
    mask = np.concatenate([np.ones((grid.rows, grid.prefix), bool), np.tri(grid.rows, dtype=bool)], axis=1)
    return jax.vmap(partial(_after_text, text), in_axes=(2, 2, 2, None), out_axes=2)(q, k, v, jnp.asarray(mask))


def _rows(pattern: Pattern, grid: TokenGrid, q: Array, k: Array, v: Array, text: tuple[Array, Array]) -> Array:
    """Every row attends to the text and to a window of rows that ends with it."""
    back = rows_back(grid, pattern)

    def windows(x: Array) -> Array:
        """(b rows (back + 1)·columns n d); rows above the first are zeros, and masked."""
        padded = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([padded[:, start : start + grid.rows] for start in range(back + 1)], axis=2)

    mask = jnp.asarray(_window_mask(grid, pattern))
    return jax.vmap(partial(_after_text, text), in_axes=(1, 1, 1, 0), out_axes=1)(q, windows(k), windows(v), mask)


@lru_cache
def _window_mask(grid: TokenGrid, pattern: Pattern) -> Bool[np.ndarray, "r c s"]:
    """Of each row: its columns' tokens against the text and its window of rows."""
    back, image = rows_back(grid, pattern), dense_mask(grid, pattern)[grid.prefix :, grid.prefix :]
    padded = np.pad(image, ((0, 0), (back * grid.columns, 0)))  # no token attends to a row above the first
    rows = []
    for row in range(grid.rows):
        first = row * grid.columns
        near = padded[first : first + grid.columns, first : first + (back + 1) * grid.columns]
        rows.append(np.concatenate([np.ones((grid.columns, grid.prefix), bool), near], axis=1))
    return np.stack(rows)


def _after_text(text: tuple[Array, Array], q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention to the keys and values of the text, followed by others. mask: (queries, all keys)."""
    keys, values = (jnp.concatenate([a, b], axis=1) for a, b in zip(text, (k, v)))
    return attention(q, keys, values, mask=mask[None, None])

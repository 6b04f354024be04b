"""Weights of words in a prompt: `(word:1.3)`, `(word)`, `[word]`.

The notation and its effect are those of AUTOMATIC1111's web interface for Stable Diffusion, which most tools follow: a
token's state is multiplied by its weight, then all states are scaled so that their mean is as before.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STEP = 1.1
"""(word) multiplies by this, [word] divides by it."""
LARGEST = 100.0
"""Weights are limited to ±LARGEST."""
DEEPEST = 64
"""Brackets within this many of their kind have no effect, so that no prompt takes long: 1.1⁶⁴ is beyond LARGEST."""
_SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*+(?P<weight>[+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^()\[\]\\:]++|.)",
    re.DOTALL,
)


class Fragment(NamedTuple):
    """A stretch of the prompt, without the notation, and its weight."""

    text: str
    weight: float


def parse(prompt: str) -> list[Fragment]:
    """The fragments of a prompt; neighbours have different weights.

    `(a)` weighs 1.1 and `((a))` 1.1², `[a]` weighs 1/1.1, `(a:1.3)` weighs 1.3 instead of 1.1. Weights of nested
    brackets are multiplied. A bracket without its counterpart is literal, and so is one (or a backslash) after a
    backslash.
    """
    texts, weights = [""], [1.0]
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _SYNTAX.finditer(prompt):
        bracket, weight = match["bracket"], match["weight"]
        closed = "[" if bracket == "]" else "(" if bracket == ")" or weight is not None else ""
        if closed and opened[closed]:
            start = opened[closed].pop()
            texts[start] = ""  # the bracket, literal until now
            factor = STEP if weight is None else _limited(float(weight))
            factor = 1 / factor if closed == "[" else factor
            if len(opened[closed]) < DEEPEST:
                weights[start:] = [each * factor for each in weights[start:]]  # finite: 100⁶⁴ at most
            continue
        if bracket in opened:
            opened[bracket].append(len(texts))
        texts.append(match["escaped"] or match[0])
        weights.append(1.0)
    return _merged(texts, list(map(_limited, weights)))


def _limited(weight: float) -> float:
    return max(-LARGEST, min(weight, LARGEST))


def _merged(texts: list[str], weights: list[float]) -> list[Fragment]:
    """Joins neighbours of equal weight, so that words are not divided at literal brackets."""
    fragments: list[Fragment] = []
    for text, weight in zip(texts, weights):
        if text and fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(fragments[-1].text + text, weight)
        elif text:
            fragments.append(Fragment(text, weight))
    return fragments


def weighted(
    states: Float[Array, "b n d"], weights: Float[Array, "b n"], mask: Bool[Array, "b n"]
) -> Float[Array, "b n d"]:
    """States multiplied by their weights, then scaled per prompt to the mean that they had before.

    The mean is over the tokens of `mask` and over the features. It is not restored if it became zero.
    """
    multiplied = states * weights[..., None]
    before, after = (jnp.sum(array * mask[..., None], (1, 2), keepdims=True) for array in (states, multiplied))
    return multiplied * jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))

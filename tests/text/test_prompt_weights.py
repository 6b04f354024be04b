"""Weights in prompts: the notation by hand-computed examples, their effect by its closed form."""

import itertools
import random
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.text.prompt_weights import parse, weighted

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", UP)]),
        ("a ((red)) cat", [("a ", 1), ("red", UP**2), (" cat", 1)]),
        ("a [cat]", [("a ", 1), ("cat", DOWN)]),
        ("[[a]]", [("a", DOWN**2)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 0.5 ) b", [("a", 0.5), (" b", 1)]),
        ("(a:-2), (b:+.5), (c:3.)", [("a", -2), (", ", 1), ("b", 0.5), (", ", 1), ("c", 3)]),
        ("(a:0)", [("a", 0)]),
        ("(a (b:1.3) c:0.5)", [("a ", 0.5), ("b", 0.65), (" c", 0.5)]),
        ("(a (b) [c]:2)", [("a ", 2), ("b", 2 * UP), (" ", 2), ("c", 2 * DOWN)]),
        ("(one)(two)", [("onetwo", UP)]),
        # From the interface's documentation.
        ("(unbalanced", [("(unbalanced", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun", None),
    ],
)
def test_the_notation(prompt, expected):
    found = parse(prompt)
    if expected is None:  # the first bracket has no counterpart
        expected = [("a (", 1), ("house", 1.3 * UP), (" ", 1), ("on", DOWN), (" a ", 1), ("hill", 0.5), (", sun", 1)]
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a) b]", "a) b]"),
        ("(a [b", "(a [b"),
        (")(", ")("),
        ("a:1.3) b", "a:1.3) b"),
        (r"a \(b\) \[c\] \\ \d", r"a (b) [c] \ \d"),
        ("\\", "\\"),
        (":", ":"),
        ("12:30, :-| :( ;)", None),
        ("{a} <b:1.2>", "{a} <b:1.2>"),
        ("a\n\x00\ud800", "a\n\x00\ud800"),
    ],
)
def test_what_is_literal(prompt, text):
    found = parse(prompt)
    if text is None:  # a smiley's bracket is closed by the next one's
        assert [fragment.text for fragment in found] == ["12:30, :-| :", " ;"]
    else:
        assert found == [(text, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:)", [("a:", UP)]),
        ("(a:b)", [("a:b", UP)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
        ("(a:1e3)", [("a:1e3", UP)]),
        ("(a:nan)", [("a:nan", UP)]),
        ("(a:1.3 b)", [("a:1.3 b", UP)]),
        ("[a:1.3]", [("a:1.3", DOWN)]),
        ("(a [b) c]", [("a ", UP), ("b", 1.0), (" c", DOWN)]),
        ("(:2)", []),
        ("()[]", []),
        (f"(a:{'9' * 999})", [("a", 100.0)]),
        (f"(((a:-{'9' * 999}):0):5)", [("a", 0.0)]),
        (99 * "(" + "a" + 99 * ")", [("a", 100.0)]),
        (99 * "[" + "a" + 99 * "]" + "(b)", [("a", DOWN**64), ("b", UP)]),
    ],
)
def test_what_looks_malformed(prompt, expected):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


def test_no_prompt_is_refused_and_nothing_is_lost():
    rng = random.Random(0)
    for _ in range(3000):
        prompt = "".join(rng.choices("()[]:\\ab1.-+ ,é", k=rng.randrange(30)))
        found = parse(prompt)
        kept = "".join(text for text, _ in found)
        assert all(text and np.isfinite(weight) for text, weight in found)
        assert [c for c in kept if c in "abé,"] == [c for c in prompt if c in "abé,"]
        assert all(a.weight != b.weight for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("unit", ["(", "(a:", ":1", "1", "[", "a)", ": ", "\\", "(:"])
def test_long_prompts_take_no_time(unit):
    start = time.perf_counter()
    parse(unit * (20_000 // len(unit)))
    parse(":" + unit * 20_000)
    parse(unit * 20_000 + 20_000 * "a)" + 20_000 * "]")
    assert time.perf_counter() - start < 5


def test_the_effect():
    """The mean over tokens and features is as before; the states are otherwise multiplied."""
    rng = np.random.default_rng(0)
    states = rng.normal(0.5, 1, (3, 5, 4)).astype("f4")
    weights = rng.uniform(0.3, 2, (3, 5)).astype("f4")
    mask = np.arange(5) < np.array([[5], [3], [0]])
    weights[1, 3:] = 1
    found = np.asarray(weighted(*map(jnp.asarray, (states, weights, mask))))
    for row in range(2):
        read = slice(0, mask[row].sum())
        expected = states[row, read] * weights[row, read, None]
        expected = expected * (states[row, read].mean() / expected.mean())
        np.testing.assert_allclose(found[row, read], expected, rtol=1e-5)
        np.testing.assert_allclose(found[row, read].mean(), states[row, read].mean(), rtol=1e-5)
    np.testing.assert_allclose(found[2], states[2] * weights[2, :, None], rtol=1e-6)  # nothing to restore
    states, mask, ones = jnp.asarray(states), jnp.asarray(mask), jnp.ones_like(weights)
    np.testing.assert_array_equal(weighted(states, ones, mask), states)
    assert not weighted(states, 0 * ones, mask).any()

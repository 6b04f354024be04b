"""Foreign text in messages: nothing in it reaches a terminal as it is, and no message grows with it."""

import pytest

from jaxdiff.core.messages import plain, quoted, reason

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "two\nlines\r\x85\u2028\u2029",
    "\u202egnp.exe",
    "half an emoji \ud83d",
    "\x00\x08\x7f\x9b31m",
    "x" * 10**7,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_hostile_is_printed(text):
    for shown in (quoted(text), plain(text), quoted([text]), quoted({text: {text: [text] * 9}}), reason(OSError(text))):
        assert shown.isprintable() and len(shown) < 600, shown
        shown.encode()


def test_short_values_are_shown_as_they_are():
    for value in ("", "a name", 3, 2.5, None, True, [32, 48], {"bits": 4}, 10**30, float("nan"), "über ☃ 日本"):
        assert quoted(value) == repr(value)
    assert plain("encoder/block_0/kernel") == "encoder/block_0/kernel"
    assert plain("  two \t words\n") == "two words"


def test_long_ones_say_how_long_they_are():
    assert quoted("ab" * 50) == repr("ab" * 40) + "… (100 characters)"
    assert plain("ab" * 50, most=4) == "abab… (100 characters)"
    assert quoted(list(range(10**6))) == "[0, 1, 2, 3, 4, 5, 6, 7, ...]"
    assert len(quoted([["x" * 70] * 5] * 5)) == 81


def test_deep_values():
    value = []
    for _ in range(10**5):
        value = [value]
    assert quoted(value) == "[[[[...]]]]"


def test_errors_that_say_nothing():
    assert reason(ValueError()) == "ValueError" and reason(KeyError("a")) == "'a'"
    assert reason(RuntimeError("first\n  second")) == "first second"

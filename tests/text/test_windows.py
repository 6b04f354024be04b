"""Prompts in several windows, and with weights: windows by hand, and encoders against their plain selves."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_clip import OPEN, OPENAI, fitted, init

from jaxdiff.text.bulk import BulkEncoder
from jaxdiff.text.clip import CLIPTextEncoder, Pooling
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.text.encoder import NetworkTextEncoder
from jaxdiff.text.prompt_weights import Fragment, parse
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.text.windows import tokenize_windows

START, END, RED, STAR, ON, BLUE = 49406, 49407, 736, 1565, 525, 1746
LONG = "red star on blue " * 5  # 20 tokens, where a window of 12 has room for 10
CAPTIONS = ["a red star", "", LONG, "red star on blue " * 4]


@pytest.fixture(scope="module")
def tokenizers():
    return {padding: clip_tokenizer(padding) for padding in Padding}


@pytest.fixture(scope="module")
def encoder():
    config, words = fitted(OPENAI, 24)
    return CLIPTextEncoder(config, init(config), words)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(np.asarray(expected)).max())


def test_windows_by_hand(tokenizers):
    words = tokenizers[Padding.END]
    assert words("red star on blue")["input_ids"] == [START, RED, STAR, ON, BLUE, END]
    prompts = [[Fragment("red star on blue", 1.0)], [Fragment("red", 1.0), Fragment("star", 2.0)], []]
    tokens = tokenize_windows(words, prompts, 5, 2)
    expected = [
        [START, RED, STAR, ON, END, START, BLUE, END, END, END],
        [START, RED, STAR, END, END, START, END, END, END, END],
        [START, END, END, END, END, START, END, END, END, END],
    ]
    np.testing.assert_array_equal(tokens.ids, expected)
    np.testing.assert_array_equal(tokens.mask.sum(1), [8, 4, 2])
    np.testing.assert_array_equal(tokens.weights, [[1] * 10, [1, 1, 2, *[1] * 7], [1] * 10])
    assert (tokens.ids.dtype, tokens.mask.dtype, tokens.weights.dtype) == (np.int32, bool, np.float32)
    zero = tokenize_windows(tokenizers[Padding.ZERO], prompts, 5, 2)
    np.testing.assert_array_equal(
        zero.ids[1:], [[START, RED, STAR, END, 0, START, END, 0, 0, 0], [START, END, 0, 0, 0] * 2]
    )
    assert tokenize_windows(words, [], 5, 2).ids.shape == (0, 10)


def test_the_public_length(tokenizers):
    """75 words a window; the words that do not fit are named."""
    words = tokenizers[Padding.EXCLAMATION]
    prompt = parse("red " * 74 + "(star blue:1.5) " + "on " * 74 + "(red (blue star)")
    with pytest.warns(UserWarning, match=r"^prompt longer than 154 tokens cut short; lost: '.red blue star'$"):
        tokens = tokenize_windows(words, [prompt], 77, 2)
    ids = [START, *[RED] * 74, STAR, END, START, BLUE, *[ON] * 74, END]
    assert tokens.ids[0, : len(ids)].tolist() == ids and tokens.mask.all()
    assert np.flatnonzero(tokens.weights[0] != 1).tolist() == [75, 78]


def test_what_is_lost_is_named_across_fragments(tokenizers):
    prompts = [[Fragment("red star on", 1.0), Fragment(" blue", 2.0), Fragment(", cat", 1.0)], [Fragment("on", 1.0)]]
    with pytest.warns(UserWarning, match="longer than 4 tokens cut short; lost: 'on blue, cat'") as warned:
        tokenize_windows(tokenizers[Padding.END], prompts, 4, 1)
    assert len(warned) == 1


def test_windows_that_cannot_be(tokenizers, encoder):
    with pytest.raises(ValueError, match="windows of 2 tokens have no room beside 2 special tokens"):
        tokenize_windows(tokenizers[Padding.END], [], 2, 2)
    with pytest.raises(ValueError, match="chunks 0: a caption has at least one window"):
        replace(encoder, chunks=0)
    with pytest.raises(ValueError, match="max_length 13: the tower reads 1 to 12 tokens"):
        replace(encoder, max_length=13, chunks=2)
    with pytest.raises(ValueError, match="the tokenizer gives the id 49407, the embedding has only 524"):
        replace(encoder, tokenizer=tokenizers[Padding.END], chunks=2).encode(["red"])
    # A tokenizer with an end but no start.
    tokens = tokenize_windows(byte_tokenizer(), [[Fragment("abc", 3.0)]], 3, 2)
    assert tokens.ids.tolist() == [[100, 101, 1, 102, 1, 0]]
    assert tokens.weights.tolist() == [[3, 3, 1, 3, 1, 1]] and tokens.mask.tolist() == [[*[True] * 5, False]]


@pytest.mark.parametrize("settings", [{}, {"skip_last": 1, "final_norm": False}], ids=["last", "penultimate"])
def test_each_window_is_encoded_alone(encoder, settings):
    plain = replace(encoder, **settings)
    double = replace(plain, chunks=2)
    assert (double.length, double.width) == (24, 48) and isinstance(double, NetworkTextEncoder)
    found = double.encode(CAPTIONS)
    first = plain.encode(["a red star", "", "red star on blue " * 2 + "red star", "red star on blue " * 2 + "red star"])
    second = plain.encode(["", "", "on blue " + "red star on blue " * 2, "on blue red star on blue"])
    close(found.tokens, np.concatenate([first.tokens, second.tokens], 1))
    close(found.pooled, first.pooled)
    assert found.mask.all() and found.ids.shape == (4, 24)
    jax.tree.map(lambda none, some: none.shape == (0, *some.shape[1:]) or pytest.fail(), double.encode([]), found)
    with pytest.warns(UserWarning, match="longer than 24 tokens cut short; lost: 'star on'"):
        cut = double.encode([LONG + "star on"])
    close(cut.tokens[0], found.tokens[2])


def test_masked_windows_and_bulk(encoder):
    """Only the last window in use has padding, so that the tokens in use are the first ones."""
    double = replace(encoder, chunks=2, padding_is_read=False)
    found = double.encode(CAPTIONS)
    counts = np.asarray(found.mask).sum(1)
    np.testing.assert_array_equal(counts, [5, 2, 24, 20])
    np.testing.assert_array_equal(found.mask, np.arange(24) < counts[:, None])
    assert not np.asarray(found.tokens)[~np.asarray(found.mask)].any()
    rows, length = BulkEncoder(double, 2, (4, 8, 20))(CAPTIONS)
    assert length == 24
    for row, tokens, count in zip(rows, found.tokens, counts, strict=True):
        np.testing.assert_allclose(row, np.asarray(tokens)[:count], atol=2e-3, rtol=1e-3)


def test_weights_multiply_the_states(encoder):
    """Against the states of the prompt without its notation."""
    reading = replace(encoder, weights=True)
    marked, bare = ["a (red:1.5) [star]", "red star", "((on)) blue", ""], ["a red star", "red star", "on blue", ""]
    found, plain = reading.encode(marked), encoder.encode(bare)
    np.testing.assert_array_equal(found.ids, plain.ids)
    np.testing.assert_array_equal(found.pooled, plain.pooled)
    weights = np.ones((4, 12, 1))
    counts = [len(encoder.tokenizer(text)["input_ids"]) for text in ("a", "a red", "a red star")]
    weights[0, counts[0] - 1 : counts[1] - 1], weights[0, counts[1] - 1 : counts[2] - 1] = 1.5, 1 / 1.1
    weights[2, 1 : len(encoder.tokenizer("on")["input_ids"]) - 1] = 1.1**2
    expected = np.asarray(plain.tokens) * weights
    before, after = (array.mean((1, 2), keepdims=True) for array in (np.asarray(plain.tokens), expected))
    close(found.tokens, expected * before / after, 1e-4)
    np.testing.assert_array_equal(found.tokens[1], plain.tokens[1])
    # Where they are not read, the notation is text.
    assert not np.array_equal(encoder.tokenize(["(on)"]).ids, encoder.tokenize(["on"]).ids)


def test_weights_of_masked_prompts_and_bulk(encoder):
    """The mean is that of the tokens in use, so that it does not depend on the padding; also in several windows."""
    reading = replace(encoder, weights=True, padding_is_read=False, chunks=2)
    captions = ["(red:1.5) star", "", "(red) star [on] blue " * 4, "on (blue:0.3)"]
    found = reading.encode(captions)
    plain = replace(reading, weights=False).encode([c.translate(str.maketrans("", "", "()[]:.0135")) for c in captions])
    np.testing.assert_array_equal(found.ids, plain.ids)
    sums = [np.asarray(embedding.tokens).sum((1, 2)) for embedding in (found, plain)]
    np.testing.assert_allclose(*sums, rtol=1e-4)
    assert np.abs(np.asarray(found.tokens - plain.tokens)).max(2)[0, 1] > 0.1
    rows, _ = BulkEncoder(reading, 2, (4, 8))(captions)
    for row, tokens, mask in zip(rows, found.tokens, np.asarray(found.mask), strict=True):
        assert len(row) == mask.sum()
        np.testing.assert_allclose(row, np.asarray(tokens)[mask], atol=5e-3, rtol=2e-3)


def test_both_settings_of_a_pair(encoder):
    """As SDXL uses them: both encoders read the same windows and weights, each with its own tokenizer."""
    config, words = fitted(replace(OPEN, text=replace(OPEN.text, width=32, heads=2)), 24)
    settings = {"skip_last": 1, "final_norm": False, "chunks": 2, "weights": True}
    first = replace(encoder, pooling=Pooling.NONE, **settings)
    second = CLIPTextEncoder(config, init(config), words, **settings)
    pair = CombinedTextEncoder((first, second), Axis.FEATURES)
    found = pair.encode(["(red:1.4) star", LONG])
    assert found.tokens.shape == (2, 24, 48 + 32) == (2, pair.length, pair.width) and pair.padding_is_read
    plain = replace(second, weights=False, chunks=1).encode(["red star", "red star on blue " * 2 + "red star"])
    close(found.pooled, plain.pooled)
    with pytest.raises(ValueError, match="text encoders of 12 and 24 tokens cannot be combined"):
        CombinedTextEncoder((replace(first, chunks=1), second), Axis.FEATURES)


def test_fingerprints(encoder, tokenizers):
    """Both settings count, and where they are off the fingerprint is the one from before they existed."""
    other, words = fitted(OPEN, 24)
    assert encoder.fingerprint == "4be2c3f0b0d3e123"
    assert CLIPTextEncoder(other, init(other), words).fingerprint == "69be47a893e36c92"
    changed = {"max_length": 8, "skip_last": 1, "final_norm": False, "padding_is_read": False}
    assert replace(encoder, **changed, pooling=Pooling.STATE).fingerprint == "02473cde6f6f887d"
    variants = [{"chunks": 2}, {"chunks": 3}, {"weights": True}, {"chunks": 2, "weights": True}]
    variants += [{"chunks": 2, "max_length": 6}, {"tokenizer": tokenizers[Padding.EXCLAMATION]}]
    variants += [{"tokenizer": tokenizers[Padding.END]}, {"tokenizer": tokenizers[Padding.ZERO]}]
    assert len({encoder.fingerprint, *(replace(encoder, **variant).fingerprint for variant in variants)}) == 9

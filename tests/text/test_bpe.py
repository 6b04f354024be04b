"""Byte-pair tokens of captions."""

import numpy as np
import pytest

from jaxdiff.text.bpe import SMALLEST, TokenTextEncoder, train_bpe
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.tokenizer import load_tokenizer

CAPTIONS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(CAPTIONS, 300)


def test_words_become_tokens(tokenizer):
    """Frequent words are one token each; case and outer spaces do not matter; every text has tokens."""
    encoder = TokenTextEncoder(tokenizer, 8)
    assert isinstance(encoder, TextEncoder) and (encoder.width, encoder.length) == (0, 8)
    ids = np.asarray(encoder.encode(["a small red circle", "  A SMALL Red circle "]).ids)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert (ids[0] != tokenizer.pad_token_id).sum() == 4
    strange = encoder.encode(["žluť 红 🎈"])
    assert tokenizer.decode(np.asarray(strange.ids)[0][np.asarray(strange.mask)[0]]).strip() in "žluť 红 🎈"


def test_mask_and_padding(tokenizer):
    found = TokenTextEncoder(tokenizer, 6).encode(["a red circle", ""])
    assert found.mask.sum(1).tolist() == [3, 0] and found.tokens.shape == (2, 6, 0)
    assert (np.asarray(found.ids)[~np.asarray(found.mask)] == tokenizer.pad_token_id).all()


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    first, second = (TokenTextEncoder(each, 5) for each in (tokenizer, load_tokenizer(tmp_path)))
    np.testing.assert_array_equal(first.encode(CAPTIONS).ids, second.encode(CAPTIONS).ids)
    assert first.fingerprint == second.fingerprint != TokenTextEncoder(tokenizer, 6).fingerprint


def test_long_captions_are_cut_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="longer than 2 tokens cut short; lost: 'red circle'"):
        TokenTextEncoder(tokenizer, 2).encode(["a small red circle"])


def test_training_is_reproducible(tokenizer):
    assert train_bpe(CAPTIONS, 300).get_vocab() == tokenizer.get_vocab()
    assert len(train_bpe(CAPTIONS, 5000)) < 400  # there are no more pairs


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: train_bpe(CAPTIONS, SMALLEST - 1), "at least 258"),
        (lambda: train_bpe(["", "  "], 300), "no caption has a word"),
        (lambda: TokenTextEncoder(train_bpe(CAPTIONS, 300), 4).encode("a red circle"), "not one string"),
    ],
)
def test_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()

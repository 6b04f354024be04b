"""CLIP's tokenizer in the package: equal to transformers' tokenizer of a public folder, to byte pairs merged by hand,
and to known ids."""

import gzip
import hashlib
import itertools
import json
import logging
import unicodedata
import warnings

import numpy as np
import pytest
import regex

from jaxdiff.text.clip_tokenizer import MERGES, Padding, clip_tokenizer
from jaxdiff.text.tokenizer import tokenize

TEXTS = [
    "a photo of a cat",
    "",
    " ",
    "  two  spaces\tand\na line\r\nbreak ",
    "A PAINTING of Ünïcödé, İstanbul, STRASSE straße ǅ",
    "it's we're I'll they've I'm she'd don't IT'S O'Neill's '''s",
    "3.14159 1920x1080 №5 ½ ² Ⅷ ٣ 1,000,000",
    "hi! you!! a!!! !important wow?! ¡hola!",
    "!",
    "!!!!!!!!",
    "😀🎉 a 👨‍👩‍👧 family ❤️ 🇩🇪",
    "日本語のテキスト 中文 한국어 العربية עברית ไทย हिन्दी",
    "cafe\u0301 cafe\u0300 ﬁ ﬂ Å A\u030a \u1e9b\u0323",
    "<b>bold &amp; html</b> &lt;p&gt; &quot; &#39; http://www.example.com/?a=b#c",
    "control\x00\x01\x07\x1b[0m\x7f \u200b zero\u200dwidth \ufeff \u00a0 no-break\u2003em\u3000wide",
    "half \ufffd and private \ue000 and last \U0010ffff",
    "(masterpiece:1.2), [[bad]] {curly} \\(escaped\\) a|b _under_score_ --ar 16:9 @me #tag $5 100% ~ ^ `",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism zzzzzzzzzzzzzzzzzzzzzzqqqqqqq",
    "<|startoftext|> in <|endoftext|>the<|endoftext|> middle <|StartOfText|> <|ENDOFTEXT|>",
    "</w> the</w> Ġthe âĢĵ i n",
    "a – b — c … “quoted” ‘single’ «guillemets»",
    "word " * 200 + "end",
]
PADDINGS = {Padding.END: "<|endoftext|>", Padding.EXCLAMATION: "!"}


def shipped_lines():
    return gzip.decompress(MERGES.read_bytes()).decode().split("\n")[:-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The layout of the public folders. The vocabulary is derived here from bytes and merges."""
    lines = shipped_lines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = characters + [c + "</w>" for c in characters] + [line.replace(" ", "") for line in lines]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    found = {}
    for padding, token in PADDINGS.items():
        folder = tmp_path_factory.mktemp(padding.name)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        added = {"49406": added_token("<|startoftext|>", True), "49407": added_token("<|endoftext|>", False)}
        if token == "!":
            added["0"] = added_token("!", False)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "added_tokens_decoder": added}
        config |= names | {"pad_token": token, "do_lower_case": True, "errors": "replace", "add_prefix_space": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found[padding] = folder
    return found


def added_token(content, normalized):
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        "special": content == "!",
    }


@pytest.fixture(scope="module")
def tokenizers():
    return {padding: clip_tokenizer(padding) for padding in Padding}


def test_the_merges_are_openais():
    """The first 48,894 lines after the version in the published file."""
    lines = shipped_lines()
    assert len(lines) == 48894 and (lines[0], lines[-1]) == ("i n", "jeky ll</w>")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
    assert "MIT" in (MERGES.parent / "LICENSE").read_text() and MERGES.stat().st_size < 250_000


@pytest.mark.parametrize("padding", PADDINGS, ids=lambda padding: padding.name)
def test_the_same_as_in_a_public_folder(padding, folders, tokenizers):
    from transformers import CLIPTokenizer

    ours, theirs = tokenizers[padding], CLIPTokenizer.from_pretrained(folders[padding])
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs) == 49408 and ours.is_fast
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.bos_token_id, ours.eos_token_id) == (49406, 49407)
    assert ours.pad_token_id == (49407 if padding is Padding.END else 0)
    fixed = {"padding": "max_length", "truncation": True, "max_length": 77}
    for text in TEXTS:
        assert ours(text, verbose=False)["input_ids"] == theirs(text, verbose=False)["input_ids"], text
    assert ours(TEXTS, **fixed)["input_ids"] == theirs(TEXTS, **fixed)["input_ids"]
    ids = ours(TEXTS[0])["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == TEXTS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the long text is cut
        tokens = tokenize(ours, TEXTS, 77)
    np.testing.assert_array_equal(tokens.ids, ours(TEXTS, **fixed)["input_ids"])


def test_the_same_after_saving(tokenizers, tmp_path):
    from transformers import CLIPTokenizer

    for padding in PADDINGS:
        tokenizers[padding].save_pretrained(tmp_path)
        loaded = CLIPTokenizer.from_pretrained(tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CLIPTokenizer"
        assert loaded.pad_token_id == tokenizers[padding].pad_token_id
        for text in TEXTS:
            assert loaded(text, verbose=False)["input_ids"] == tokenizers[padding](text, verbose=False)["input_ids"]


def test_known_ids(tokenizers):
    """Of OpenAI's own tokenizer."""
    for tokenizer in tokenizers.values():
        assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer("")["input_ids"] == [49406, 49407]


def test_exclamation_marks(tokenizers):
    """In the public files padded with "!", each "!" of the text is the padding token. OpenCLIP has words for them."""
    expected = {
        Padding.END: [256, 748, 995],
        Padding.ZERO: [256, 748, 995],
        Padding.EXCLAMATION: [0, (0, 0), (0, 0, 0)],
    }
    for padding, words in expected.items():
        for text, word in zip(("!", "!!", "!!!"), words, strict=True):
            row = [49406, *(word if isinstance(word, tuple) else (word,)), 49407]
            assert tokenizers[padding](text)["input_ids"] == row
    padded = tokenize(tokenizers[Padding.ZERO], ["hi!"], 6)
    np.testing.assert_array_equal(padded.ids, [[49406, 1883, 256, 49407, 0, 0]])
    np.testing.assert_array_equal(padded.mask, [[True] * 4 + [False] * 2])
    assert len(tokenizers[Padding.ZERO]) == 49408 and tokenizers[Padding.ZERO].pad_token_id == 0


def test_byte_pairs_merged_by_hand(tokenizers):
    """The algorithm of the published code, plainly: words by a pattern, then the best-ranked pair first."""
    ranks = {tuple(line.split()): i for i, line in enumerate(shipped_lines())}
    vocab = tokenizers[Padding.END].get_vocab()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

    def ids(text):
        text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()
        for word in pattern.findall(text):
            pieces = [characters[byte] for byte in word.encode()]
            pieces[-1] += "</w>"
            while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
                best, merged = min(pairs, key=ranks.__getitem__), []
                for piece in pieces:
                    if merged and (merged[-1], piece) == best:
                        merged[-1] += piece
                    else:
                        merged.append(piece)
                pieces = merged
            yield from (vocab[piece] for piece in pieces)

    for text in TEXTS:
        if "<|" not in text:
            expected = [49406, *ids(text), 49407]
            assert tokenizers[Padding.END](text, verbose=False)["input_ids"] == expected, text


def test_a_tokenizer_may_be_changed(tokenizers):
    clip_tokenizer().add_tokens(["<new-word>"])
    assert len(clip_tokenizer()) == len(tokenizers[Padding.END]) == 49408


def test_only_one_warning_of_a_long_caption(caplog):
    """transformers' own, of an error that does not come, is not shown."""
    with pytest.warns(UserWarning, match="longer than 77 tokens cut short"), caplog.at_level(logging.WARNING):
        tokenize(clip_tokenizer(), ["word " * 90], 77)
    assert "longer than the specified maximum" not in caplog.text

"""Captions: decoded by their byte order mark, cleaned in one way, and what is replaced is counted, named or refused."""

import dataclasses
import io
import json
import warnings

import numpy as np
import pytest

from jaxdiff.data import captions, embeddings, example, folder
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches
from jaxdiff.text.encoder import TextEmbedding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["a café 😀", "", "x", "two\nlines"])
def test_decode_finds_the_encoding(text, encoding):
    assert captions.decode(text.encode(encoding)) == text


@pytest.mark.parametrize("encoding, mark", [("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")])
def test_both_orders_of_utf_16(encoding, mark):
    assert captions.decode(mark + "é 😀".encode(encoding)) == "é 😀"


@pytest.mark.parametrize("ends", ["\r\n", "\r", "\n"])
def test_all_line_ends_become_one(ends):
    assert captions.decode(f"a{ends}b".encode()) == "a\nb"


@pytest.mark.parametrize(
    "content, text, reason",
    [
        ("café".encode("latin-1"), "caf\ufffd", "undecodable bytes"),
        (b"\xff\xfe" + "ab".encode("utf-16-le")[:-1], "a\ufffd", "undecodable bytes"),
        (b"\xff\xfe" + "a\ud83d".encode("utf-16-le", "surrogatepass"), "a\ufffd", "half of a surrogate pair"),
        (b"a\xed\xa0\xbd", "a\ufffd\ufffd\ufffd", "undecodable bytes"),  # a surrogate in UTF-8, as Java writes it
        ("ab".encode("utf-16-le"), "a\ufffdb\ufffd", "UTF-16 without a byte order mark?"),
        (b"\xff\xfe\0\0" + b"\xff\xff\xff\xff" + "a".encode("utf-32-le"), "\ufffda", "undecodable bytes"),
    ],
)
def test_what_cannot_be_decoded_is_replaced_and_counted(content, text, reason):
    cleaned = captions.clean(captions.decode(content))
    assert cleaned.text == text
    assert cleaned.fault.startswith(f"{text.count(chr(0xFFFD))} character") and reason in cleaned.fault
    cleaned.text.encode()
    assert captions.clean(cleaned.text) == (text, None)


def test_every_byte_string_becomes_text():
    rng = np.random.default_rng(0)
    for start in (b"", *captions._MARKS):
        for length in range(40):
            cleaned = captions.clean(captions.decode(start + rng.bytes(length)))
            (cleaned.text or "").encode()


@pytest.mark.parametrize("text", [None, "", "  ", "\n\t", "\ufeff", " \ufeff \n"])
def test_blank_captions_are_none(text):
    assert captions.clean(text) == (None, None) and captions.present(text) is None


def test_a_mark_within_quotes_or_a_file_goes():
    assert captions.clean("\ufeffa cat").text == "a cat"
    assert captions.clean("a\ufeffcat").text == "a\ufeffcat"  # within a text it was meant


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"text": "  ", "caption": "a cat"}, "a cat"),
        ({"text": None, "caption": "a cat"}, "a cat"),
        ({"text": "\ufeff", "caption": "a cat"}, "a cat"),
        ({"text": "a dog", "caption": "a cat"}, "a dog"),
        ({"caption": ""}, None),
        ({}, None),
    ],
)
def test_a_blank_text_does_not_hide_the_caption(row, expected):
    assert captions.chosen(row, ("text", "caption")) == expected


@pytest.mark.parametrize("value", [0, False, [], {}, 7, ["a cat"]])
def test_a_caption_that_is_no_string_is_refused(value):
    with pytest.raises(ValueError, match="the caption is not a string"):
        captions.chosen({"text": value, "caption": "a cat"}, ("text", "caption"))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"\xff\xfe", b"nul", b'{"a": ' * 100_000])
def test_bad_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        captions.from_json(content)


HALF = '{"file_name": "1.png", "text": "half \\ud83d"}'


@pytest.fixture
def photos(tmp_path, source):
    """Three images: the captions of two have characters that no text can hold."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(source.examples[number]["image"])
    (tmp_path / "0.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "1.txt").write_bytes("half 😀".encode("utf-16")[:-2])
    (tmp_path / "2.txt").write_bytes("whole 😀".encode("utf-16"))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_replaced_captions_are_used_counted_and_named(photos, workers):
    config = DataConfig(8, 3, captions=True, shuffle=False, repeat=False)
    batches = image_batches(folder.read(photos), config, read_ahead=ReadAhead(workers=workers))
    with pytest.warns(UserWarning) as caught:
        (batch,) = batches
    assert batch["caption"].tolist() == ["caf\ufffd", "half \ufffd", "whole 😀"] and set(batch) >= {"image", "index"}
    assert batches.skipped.replaced == 2 and batches.skipped.count == 0
    assert batches.skipped.summary(3) == "characters replaced in 2 captions"
    assert sorted(str(each.message).split(":")[0] for each in caught) == [str(photos / "0.png"), str(photos / "1.png")]


def test_each_replaced_caption_is_counted_once(photos):
    batches = image_batches(folder.read(photos), DataConfig(8, 3, captions=True, seed=1))
    with pytest.warns(UserWarning):
        for _ in range(4):
            next(batches)
    assert batches.skipped.replaced == 2


def test_strict_refuses_replaced_captions(photos):
    with pytest.raises(ValueError, match=r"0\.png: 1 character of the caption replaced .*\(strict\)"):
        next(image_batches(folder.read(photos), DataConfig(8, 3, captions=True, shuffle=False, strict=True)))


def test_captions_that_nobody_asks_for_are_not_counted(photos):
    batches = image_batches(folder.read(photos), DataConfig(8, 3, shuffle=False, repeat=False, strict=True))
    assert len(list(batches)) == 1 and batches.skipped.summary(3) == ""


def test_half_an_emoji_does_not_stop_the_encoding_of_a_dataset(tmp_path, source):
    (tmp_path / "1.png").write_bytes(source.examples[1]["image"])
    (tmp_path / "metadata.jsonl").write_text(HALF)
    found = folder.read(tmp_path)
    encode = lambda texts: TextEmbedding(np.ones((len(texts), 2, 3)), np.ones((len(texts), 2), bool))  # noqa: E731
    with pytest.warns(UserWarning, match=r"1\.png: 1 character of the caption replaced by U\+FFFD \(half"):
        texts = list(example.captions(found))
    assert texts == ["half \ufffd"]
    stored = embeddings.store_embeddings(texts, encode, tmp_path / "text", encoder="ones")
    with pytest.warns(UserWarning):
        batch = next(image_batches(found, DataConfig(8, 1), stored))
    assert batch["text"].shape == (1, 2, 3)


def test_a_source_that_cleans_nothing_is_cleaned(listed, source):
    """Whatever source captions come from, none that cannot be encoded reaches a tokenizer."""
    raw = dataclasses.replace(source, examples=({**source.examples[0], "caption": "\ud83d\0 \udce9"},))
    batches = image_batches(raw, DataConfig(8, 1, captions=True))
    with pytest.warns(UserWarning, match="set/0.png: 3 characters"):
        assert next(batches)["caption"].tolist() == ["\ufffd\ufffd \ufffd"]
    with pytest.warns(UserWarning, match="set/0.png: 3 characters"):
        assert example.captions(raw)[0] == "\ufffd\ufffd \ufffd"
    clean = dataclasses.replace(source, examples=source.examples[:1])
    with warnings.catch_warnings(action="error"):
        assert list(example.captions(clean)) == ["image number 0"]


def test_metadata_in_utf_16(tmp_path, source):
    (tmp_path / "1.png").write_bytes(source.examples[1]["image"])
    row = json.dumps({"file_name": "1.png", "text": "é\u2028😀"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{row}\r\n\r\n".encode("utf-16"))
    assert folder.read(tmp_path)[0]["caption"] == "é\u2028😀"


@pytest.mark.parametrize(
    "text", ["\ufeff \ufeff", "\ufeff a \ufeff cat \ufeff\n\ufeff", "\u3000\ufeff\u2028a\x1f", "\ufeff\n" * 9]
)
def test_cleaning_twice_changes_nothing_more(text):
    cleaned = captions.clean(text).text
    assert captions.clean(cleaned).text == cleaned
    assert cleaned in (None, "a", "a \ufeff cat")


class Unseekable(io.RawIOBase):
    """What comes over HTTP: read once, in small pieces."""

    def __init__(self, content):
        self._content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._content.readinto(memoryview(buffer)[:5])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["path,caption\r\na.png,é 😀\n", "a", ""])
def test_streams_that_cannot_seek_are_read(encoding, text):
    assert captions.reader(Unseekable(text.encode(encoding))).read() == text


@pytest.mark.parametrize("content", [b"[" * 99 + b"]" * 99, b'{"text": "a", "text": "b"}', "[" * 200_000, "1" * 5000])
def test_json_that_is_not_to_be_trusted_is_a_value_error(content):
    with pytest.raises(ValueError) as caught:
        captions.from_json(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_long_value_instead_of_a_caption_is_cut():
    with pytest.raises(ValueError) as caught:
        captions.chosen({"text": ["x" * 10_000] * 1000}, ("text",))
    assert len(str(caught.value)) < 200

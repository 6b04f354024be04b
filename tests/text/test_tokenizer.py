"""Tokenizers: trained, saved and loaded again, bytes; what is cut is said."""

import json
import re
import warnings

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxdiff.text.tokenizer import (
    SENTINELS,
    byte_tokenizer,
    check_vocabulary,
    load_tokenizer,
    sentinel_ids,
    tokenize,
    train_tokenizer,
    with_special_tokens,
)

COLOURS = ["red", "green", "blue", "orange", "purple", "white"]
KINDS = ["circle", "square", "triangle", "star", "hexagon"]
CAPTIONS = [
    f"a {size} {colour} {kind} on a {ground} background, left of {n} dots"
    for n, size in enumerate(["small", "large"])
    for colour in COLOURS
    for kind in KINDS
    for ground in COLOURS
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CAPTIONS, 600)


def test_trained_follows_t5(trained):
    assert (trained.pad_token_id, trained.eos_token_id, trained.unk_token_id) == (0, 1, 2)
    size = len(trained)
    assert size <= 600
    assert sentinel_ids(trained) == [size - 1 - i for i in range(SENTINELS)]


def test_words_seen_are_one_token_each(trained):
    ids = trained("A small RED circle,  left")["input_ids"]
    assert trained.convert_ids_to_tokens(ids) == ["▁a", "▁small", "▁red", "▁circle", ",", "▁left", "</s>"]
    assert trained("a SMALL red\tcircle, left ")["input_ids"] == ids


@pytest.mark.parametrize("text", ["zebra", "naïve 🐙 über", "日本語", "<0x41> & \\ {}", "x" * 300])
def test_no_text_is_unknown(trained, text):
    ids = trained(text)["input_ids"]
    assert trained.unk_token_id not in ids
    assert trained.decode(ids, skip_special_tokens=True) == text


def test_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    again = load_tokenizer(tmp_path)
    texts = [*CAPTIONS[:20], "naïve 🐙", ""]
    assert again(texts)["input_ids"] == trained(texts)["input_ids"]
    assert (len(again), sentinel_ids(again)) == (len(trained), sentinel_ids(trained))


def test_training_twice_gives_the_same(trained):
    assert train_tokenizer(CAPTIONS, 600).get_vocab() == trained.get_vocab()


def test_captions_in_many_scripts_need_no_larger_vocabulary():
    scripts = ["".join(chr(start + i) for i in range(60)) for start in (0x3B1, 0x430, 0x5D0, 0x905, 0x4E00, 0xAC00)]
    tokenizer = train_tokenizer([*scripts, *CAPTIONS], 400)
    assert len(tokenizer) <= 400
    for text in ("a red star", "αβγ 一丁 가각"):
        ids = tokenizer(text)["input_ids"]
        assert 2 not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_too_small_a_vocabulary_and_no_captions_are_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 391, not 300"):
        train_tokenizer(CAPTIONS, 300)
    with pytest.raises(ValueError, match="no caption with words"):
        train_tokenizer(["", " "], 400)


def test_bytes():
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, ["é"], 5)
    np.testing.assert_array_equal(tokens.ids, [[0xC3 + 3, 0xA9 + 3, 1, 0, 0]])
    np.testing.assert_array_equal(tokens.mask, [[True, True, True, False, False]])
    assert sentinel_ids(tokenizer) == list(range(259, 384))


def test_shapes_padding_and_end(trained):
    tokens = tokenize(trained, ["a red star", "", "a large blue square"], 8)
    assert tokens.ids.shape == tokens.mask.shape == (3, 8)
    assert tokens.ids.dtype == np.int32
    np.testing.assert_array_equal(tokens.mask.sum(1), [4, 1, 5])
    assert (tokens.ids[~tokens.mask] == 0).all()
    assert (tokens.ids[[0, 1, 2], [3, 0, 4]] == 1).all()
    assert tokenize(trained, [], 8).ids.shape == (0, 8)
    with pytest.raises(ValueError, match="length must be at least 1"):
        tokenize(trained, ["a"], 0)


def warned(tokenizer, captions, length):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = tokenize(tokenizer, captions, length)
    assert len(caught) <= 1
    return tokens, str(caught[0].message) if caught else None


def test_over_long_prompt_warns_once_with_the_lost_words(trained):
    tokens, message = warned(trained, ["a small red star on a blue background", "a star"], 6)
    assert message == "prompt longer than 6 tokens cut short; lost: 'a blue background'"
    assert tokens.mask.sum(1).tolist() == [6, 3]
    assert tokens.ids[0, -1] == 1
    assert trained.decode(tokens.ids[0], skip_special_tokens=True) == "a small red star on"
    assert warned(trained, ["a small red star on a blue background"], 9)[1] is None  # exactly as long as may be
    _, message = warned(trained, ["a small red star"] * 5, 3)
    assert re.fullmatch(r"5 prompts longer than 3 tokens cut short; lost: ('red star', ){3}…", message)


def test_a_word_cut_in_the_middle_is_lost(trained):
    _, message = warned(trained, ["a Zebra-Crossing and more"], 4)
    assert message.endswith("lost: 'Zebra-Crossing and more'")
    _, message = warned(byte_tokenizer(), ["hello wörld again"], 9)
    assert message.endswith("lost: 'wörld again'")


def write_pieces(directory):
    """A small spiece.model of sentencepiece, and what it holds."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(directory / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_file=str(directory / "spiece.model"))


def test_sentencepiece_files_of_the_hub(tmp_path):
    """A folder with spiece.model and no tokenizer.json, as Google's T5 v1.1 is published."""
    pieces = write_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    tokenizer = load_tokenizer(tmp_path)
    text = "a small red zebra"
    tokens = tokenize(tokenizer, [text], 40)
    assert tokens.ids[0][tokens.mask[0]].tolist() == [*pieces.encode(text), 1]
    assert sentinel_ids(tokenizer) == list(range(len(pieces) + 99, len(pieces) - 1, -1))


@pytest.mark.parametrize(
    ("settings", "sentinels"),
    [
        ({}, 100),
        ({"config": {"model_type": "t5"}}, 100),
        ({"config": {"model_type": "mt5"}}, 0),
        ({"config": {"model_type": "umt5"}}, 0),
        ({"config": {"model_type": "umt5"}, "tokenizer_config": {"extra_ids": 7}}, 7),
        ({"tokenizer_config": {"eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 3}}, 3),
    ],
)
def test_sentencepiece_model_alone(settings, sentinels, tmp_path):
    """No file names the tokenizer's class; the sentinels of mT5 and UMT5 are among their pieces."""
    pieces = write_pieces(tmp_path)
    for name, values in settings.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(pieces) + sentinels and len(sentinel_ids(tokenizer)) == sentinels
    for text in ("a small  red circle", "left of 2 dots, ", ""):
        assert tokenizer(text)["input_ids"] == [*pieces.encode(text), 1]


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "T5Tokenizer"}])
@pytest.mark.parametrize("count", [0, 5, 400, -9])
def test_a_damaged_sentencepiece_model(config, count, tmp_path):
    write_pieces(tmp_path)
    path = tmp_path / "spiece.model"
    path.write_bytes(path.read_bytes()[:count])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from {tmp_path}: spiece.model is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"extra_ids": "x"}', pytest.param("[" * 10**5 + "]" * 10**5, id="nested")]
)
def test_bad_settings_beside_a_sentencepiece_model(text, tmp_path):
    write_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from {tmp_path}: ") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def without(tokenizer, **names):
    """A copy of a tokenizer with other special tokens; None for one that it does not name."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    for name, token in names.items():
        setattr(other, name, token)
    return other


def test_a_tokenizer_without_padding(trained):
    with pytest.raises(ValueError, match=r"no padding token: set pad_token in its tokenizer_config\.json"):
        tokenize(without(trained), ["a red star"], 8)
    found = tokenize(with_special_tokens(without(trained), 0, 1), ["a red star"], 8)
    np.testing.assert_array_equal(found.ids, tokenize(trained, ["a red star"], 8).ids)
    kept = with_special_tokens(without(trained, pad_token="<unk>"), 0, 1)  # what it names itself stays
    assert (kept.pad_token_id, kept.eos_token_id) == (2, 1)
    assert with_special_tokens(without(trained), None, 10**6).pad_token_id is None


def test_a_tokenizer_without_an_end_cuts_at_what_it_ends_with(trained):
    with pytest.warns(UserWarning, match="lost: 'blue square'"):
        found = tokenize(without(trained, pad_token="<pad>"), ["a large blue square"], 3)
    assert found.ids.tolist() == [[*trained("a large")["input_ids"][:2], 1]]


@pytest.mark.parametrize("less", [1, 3, 200])
def test_ids_that_the_embedding_has_not(trained, less):
    largest = max(trained("a red star")["input_ids"])
    vocab = largest + 1 - less
    with pytest.raises(ValueError, match=f"the tokenizer gives the id {largest}, the embedding has only {vocab}"):
        tokenize(trained, ["a red star"], 8, vocab)
    assert tokenize(trained, ["a red star"], 8, largest + 1).mask.sum() == 4
    check_vocabulary(trained, len(trained), "here")
    with pytest.raises(ValueError, match=f"here: the tokenizer has {len(trained)} ids, the embedding only {vocab}"):
        check_vocabulary(trained, vocab, "here")


def of_words(**vocabulary):
    model = Tokenizer(WordLevel({"<pad>": 0, **vocabulary}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")


@pytest.mark.parametrize("number", [400, 70_000, 2**20])
def test_a_vocabulary_with_an_id_far_beyond(number):
    """Of three words."""
    far = of_words(a=1, **{"\x1b[2J": number})
    with pytest.raises(ValueError, match=f"the tokenizer's '.x1b.2J' has the id {number}, the embedding only 400"):
        check_vocabulary(far, 400, "here")
    assert tokenize(far, ["a"], 2, 400).ids.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=f"the tokenizer gives the id {number}, the embedding has only 400"):
        tokenize(far, ["a \x1b[2J"], 3, 400)


@pytest.mark.parametrize("number", [2**31, 2**31 + 7, 2**32 - 1])
def test_ids_that_no_array_of_ours_holds(number):
    words = of_words(a=1)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", number)])
    with pytest.raises(ValueError, match=f"the tokenizer gives the id {number}, the embedding has only 2147483648"):
        tokenize(words, ["a"], 3)


def test_a_caption_that_the_tokenizer_cannot_read():
    words = of_words(a=1)
    words.backend_tokenizer.model = WordLevel({"a": 1}, unk_token="<nothing>")
    with pytest.raises(ValueError, match="the tokenizer cannot read these captions: WordLevel error"):
        tokenize(words, ["a b"], 3)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from nobody/nothing: ") as error:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 10**5, "a\nb"], ids=range(3))
def test_settings_that_the_library_would_print(name, trained, tmp_path, capfd):
    """It says which settings of a token it does not know, as they are."""
    trained.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    told = json.loads(path.read_text())
    token = {"content": "<pad>", "special": True, "__type": "AddedToken"}
    for changed in ({name: 1}, {"added_tokens_decoder": {"0": token | {name: 1}}}, {"a": [{"b": {name: 1}}]}):
        path.write_text(json.dumps(told | changed))
        with pytest.raises(ValueError, match=r"no tokenizer could be .* has a setting '") as error:
            load_tokenizer(tmp_path)
        assert str(error.value).isprintable() and len(str(error.value)) < 400
    assert capfd.readouterr().out == ""


def test_a_damaged_tokenizer(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    for damage in ("{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "Unheard"}}', "{"):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(ValueError, match=f"no tokenizer could be loaded from {tmp_path}: ") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)

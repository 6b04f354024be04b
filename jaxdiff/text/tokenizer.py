"""Loading and training of tokenizers, and tokenization of captions.

All tokenizers are transformers tokenizers, and their directories are compatible. Tokenizers trained here follow T5:
`<pad>` 0, `</s>` 1 at the end of each caption, `<unk>` 2, sentinels `<extra_id_0…>` for span corruption.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import Unigram

from jaxdiff.core import json_files
from jaxdiff.core.messages import LONGEST, plain, quoted, reason

# transformers takes more than a second to import, so it is imported on first use.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

SENTINELS = 32
"""Sentinels of a trained tokenizer: enough for captions; T5's 100 are for documents."""
_SPECIAL = ["<pad>", "</s>", "<unk>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_GENERIC = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # defined by tokenizer.json alone, as in the files written here
_BYTE_SCORE = -1e3  # log probability: bytes are used only if no piece fits


def import_transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which tokenizers do not need."""
    name, advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS", os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if advice is None:
            del os.environ[name]
        else:
            os.environ[name] = advice
    return transformers


class Tokens(NamedTuple):
    """Token ids, padded to one length, and the mask (False for padding). weights: of the states; None: all are 1."""

    ids: Int[np.ndarray, "b n"]
    mask: Bool[np.ndarray, "b n"]
    weights: Float[np.ndarray, "b n"] | None = None


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load a T5 or CLIP tokenizer from a directory or hub id. ValueError if there is none."""
    folder = Path(path_or_id)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer_config.json", "spiece.model")):
        raise ValueError(f"{path_or_id} holds no tokenizer (no tokenizer_config.json, nor spiece.model)")
    try:
        config = _settings(folder / "tokenizer_config.json")
        _check_names(config)
        if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
            _check_pieces(folder / "spiece.model")
            if "tokenizer_class" not in config:
                return _t5_tokenizer(folder, config)
        if config.get("tokenizer_class") in _GENERIC:
            return import_transformers().PreTrainedTokenizerFast.from_pretrained(str(path_or_id))
        # AutoTokenizer imports PyTorch if it is installed, which takes seconds.
        return import_transformers().AutoTokenizer.from_pretrained(str(path_or_id))
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that it cannot parse
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no tokenizer could be loaded from {path_or_id}: {plain(first, 400)}") from error


def _t5_tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerBase:
    """T5's tokenizer from spiece.model, for older repositories without the class name that AutoTokenizer needs.

    A hundred sentinels follow the pieces; in mT5 and UMT5 they are among the pieces.
    """
    multilingual = _settings(folder / "config.json").get("model_type") in ("mt5", "umt5")
    sentinels: dict[str, Any] = {"extra_ids": 0} if multilingual and "extra_ids" not in config else {}
    return import_transformers().T5Tokenizer.from_pretrained(str(folder), **sentinels)


def _check_pieces(path: Path) -> None:
    """ValueError for an empty or damaged file: transformers accepts the former, and asks for another library to read
    the latter."""
    try:
        count = len(SentencePieceProcessor(model_file=str(path)))
    except Exception:  # OSError, RuntimeError, and protobuf's own
        count = 0
    if not count:
        raise ValueError(f"{path.name} is damaged")


def _check_names(config: Any) -> None:
    """ValueError for a setting whose name is too long or unprintable, because transformers prints ignored settings."""
    if not isinstance(config, dict | list):
        return
    for name in config if isinstance(config, dict) else ():
        if len(name) > LONGEST or not name.isprintable():
            raise ValueError(f"tokenizer_config.json has a setting {quoted(name)}")
    for item in config.values() if isinstance(config, dict) else config:
        _check_names(item)


def _settings(path: Path) -> dict:
    return json_files.read_object(path) if path.is_file() else {}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """ByT5's tokenizer: one token per UTF-8 byte, without files. 384 ids, 125 sentinels included."""
    return import_transformers().ByT5Tokenizer()


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a case-insensitive unigram tokenizer of at most `vocab_size` ids, without unknown words.

    Text is normalised (NFKC, lower case, single spaces); characters outside all pieces become UTF-8 bytes.
    `save_pretrained(directory)` writes tokenizer.json and tokenizer_config.json. Few captions give fewer ids.
    ValueError if `vocab_size` is too small for words, or if the captions have no words.
    """
    room = vocab_size - len(_SPECIAL) - len(_BYTES) - SENTINELS
    if room < 100:
        raise ValueError(
            f"vocab_size must be at least {vocab_size - room + 100}, not {vocab_size}: bytes and sentinels"
        )
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    vocabulary = [
        *((token, 0.0) for token in _SPECIAL),
        *((token, _BYTE_SCORE) for token in _BYTES),
        *sorted(_pieces(list(captions), room).items(), key=lambda piece: (-piece[1], piece[0])),
        *((token, 0.0) for token in reversed(sentinels)),
    ]
    tokenizer = _pipeline(Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True)))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, where: str) -> None:
    """ValueError if the tokenizer has ids outside an embedding of `size` rows."""
    vocabulary = tokenizer.get_vocab()
    if len(tokenizer) > size:
        raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} ids, the embedding only {size}")
    beyond = [token for token, number in vocabulary.items() if not 0 <= number < size]
    if beyond:
        number = vocabulary[beyond[0]]
        raise ValueError(f"{where}: the tokenizer's {quoted(beyond[0])} has the id {number}, the embedding only {size}")


def with_special_tokens(
    tokenizer: PreTrainedTokenizerBase, pad_id: int | None, eos_id: int | None
) -> PreTrainedTokenizerBase:
    """Set the padding and end tokens to these ids (those of its model) if the tokenizer defines none."""
    for name, number in (("pad_token", pad_id), ("eos_token", eos_id)):
        if getattr(tokenizer, f"{name}_id") is None and number is not None:
            token = tokenizer.convert_ids_to_tokens(number)
            if isinstance(token, str):
                setattr(tokenizer, name, token)
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int, vocab: int = 2**31) -> Tokens:
    """Ids (b, length) int32 and mask (b, length); each caption ends with `</s>` or the tokenizer's end token.

    Captions of more than `length` tokens are truncated, with one warning that lists the lost words. ValueError if the
    tokenizer has no padding token, or for an id not below `vocab`.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, not {length}")
    rows = token_ids(tokenizer, captions, vocab)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    lost = []
    for i, row in enumerate(rows):
        if len(row) > length:
            kept = max(length - len(special_ids(tokenizer)), 0)
            lost.append(lost_words(tokenizer, captions[i], kept).strip())
            row = _cut(tokenizer, row, length)
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    warn_cut(lost, length, stacklevel=3)
    return Tokens(ids, mask)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], vocab: int, special: bool = True
) -> list[list[int]]:
    """The ids of each caption, of any length. special: with start and end tokens. ValueError as `tokenize`."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token: set pad_token in its tokenizer_config.json")
    try:
        # verbose: transformers would log that long captions are an error; here they are cut.
        options = {"add_special_tokens": special, "verbose": False}
        rows = tokenizer(list(captions), **options)["input_ids"] if len(captions) else []
    except (
        Exception
    ) as error:  # the tokenizers library raises nothing narrower, for example if there is no unknown token
        raise ValueError(f"the tokenizer cannot read these captions: {reason(error)}") from error
    largest = max([tokenizer.pad_token_id, *(max(row, default=0) for row in rows)])
    if largest >= vocab:
        raise ValueError(f"the tokenizer gives the id {largest}, the embedding has only {vocab}")
    return rows


def warn_cut(lost: Sequence[str], length: int, stacklevel: int) -> None:
    """One warning for all captions of more than `length` tokens, with the words that they lost, if any."""
    if lost:
        shown = ", ".join(quoted(words, 200) for words in lost[:3]) + (", …" if len(lost) > 3 else "")
        count = "prompt" if len(lost) == 1 else f"{len(lost)} prompts"
        warnings.warn(f"{count} longer than {length} tokens cut short; lost: {shown}", stacklevel=stacklevel)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokenizer's sentinels `<extra_id_0>`, `<extra_id_1>`, …"""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    return ids


def _pieces(captions: list[str], room: int) -> dict[str, float]:
    """At most `room` pieces with log probabilities: words by frequency, and subwords.

    The library's trainer alone would learn no words from captions with a small vocabulary, because it proposes only
    strings that occur in two different words. Subwords score below every word, so that a known word is one token.
    """
    model = _pipeline(Tokenizer(Unigram()))
    captions = [model.normalizer.normalize_str(caption) for caption in captions]
    counts = Counter(word for caption in captions for word, _ in model.pre_tokenizer.pre_tokenize_str(caption))
    if not counts:
        raise ValueError("no caption with words to train a tokenizer on")
    total = sum(counts.values())
    # The trainer keeps every character; rare ones are encoded as bytes instead.
    characters = [character for character, _ in Counter("".join(captions)).most_common()]
    rare = dict.fromkeys(map(ord, characters[room // 6 :]), " ")
    trainer = trainers.UnigramTrainer(
        vocab_size=room // 4, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    model.train_from_iterator((caption.translate(rare) for caption in captions), trainer)
    learned = json.loads(model.to_str())["model"]["vocab"][1:]
    # The trainer sums in the random order of a hash table; rounding makes the result reproducible.
    pieces = {piece: round(score - math.log(total), 3) for piece, score in learned if piece not in _BYTES}
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: room - len(pieces)]
    return pieces | {word: math.log(count / total) for word, count in frequent}


def _cut(tokenizer: PreTrainedTokenizerBase, row: list[int], length: int) -> list[int]:
    """Truncate a caption but keep its end token: the tokenizer's, or the last one if captions have special tokens."""
    if tokenizer.eos_token_id is not None:
        return [*row[: length - 1], tokenizer.eos_token_id]
    return [*row[: length - 1], row[-1]] if special_ids(tokenizer) else row[:length]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens of each caption: T5's end; CLIP's start and end."""
    return tokenizer("", add_special_tokens=True)["input_ids"]


def lost_words(tokenizer: PreTrainedTokenizerBase, caption: str, kept: int) -> str:
    """The words of `caption` that are not entirely within the first `kept` tokens."""
    if tokenizer.is_fast:
        offsets = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        start = offsets[kept][0]
    else:  # ByT5, the only slow tokenizer; its tokens are bytes
        ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        start = len(tokenizer.decode(ids[:kept]))
    if not caption[start:].startswith(" "):
        start = caption.rfind(" ", 0, start) + 1
    return caption[start:]


def _pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Normalisation and pre-tokenization: split at spaces, with "▁" for the space before a word; punctuation and digits
    are separate tokens."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer

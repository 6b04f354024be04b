"""CLIP's tokenizer, built from the merges in this package: no download, and no file beside the weights."""

import enum
import gzip
from pathlib import Path

from tokenizers import AddedToken, pre_tokenizers

from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, import_transformers

MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
"""The pairs that are merged, the most frequent first: two pieces a line. Its licence is beside it."""
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Tokens that all public text towers read, start and end included."""


class Padding(enum.Enum):
    """The token that fills a caption up. Pooled vectors do not depend on it, states of padding do."""

    END = enum.auto()
    """The end token, 49407: OpenAI's CLIP, so Stable Diffusion 1 and the first encoder of SDXL."""
    EXCLAMATION = enum.auto()
    """"!" (0) as in the files of Stable Diffusion 2 and of SDXL's second encoder. There "!" is a special token, so each
    "!" of a caption is the padding token too, and not the token of the word (diffusers issue 4153)."""
    ZERO = enum.auto()
    """0, while "!" in a caption remains a word, as in OpenCLIP's training. Different only for captions with "!". Files
    written by `save_pretrained` cannot express it: they are read as EXCLAMATION."""


def clip_tokenizer(padding: Padding = Padding.END) -> PreTrainedTokenizerBase:
    """The tokenizer of OpenAI's CLIP and OpenCLIP: byte pairs of lower-case text; 49,408 ids, start 49406, end 49407.

    Equal to the tokenizers in the public folders. `save_pretrained` writes files that transformers and diffusers read.
    A new object each time (0.1 s), because tokenizers can be changed.
    """
    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    tokenizer = import_transformers().CLIPTokenizer(
        vocabulary(merges),
        merges,
        bos_token=AddedToken(START, normalized=True, special=True),
        eos_token=AddedToken(END, normalized=False, special=True),
        unk_token=END,
        pad_token="!" if padding is Padding.EXCLAMATION else END,
        model_max_length=LENGTH,
    )
    if padding is Padding.ZERO:
        tokenizer.pad_token = "!"  # after construction, which would make it special
    return tokenizer


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids by piece: the bytes, the bytes that end a word, the merged pairs, start and end. The first byte is "!"."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges), START, END]
    return {piece: number for number, piece in enumerate(pieces)}

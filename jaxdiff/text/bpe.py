"""Byte-pair tokens of captions, for models that embed them themselves (DALL·E 1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxdiff.text.encoder import TextEmbedding, caption_list, fingerprint_of
from jaxdiff.text.simplified import simplified
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, import_transformers, tokenize

PAD = "<pad>"
SMALLEST = 258
"""Ids of the smallest vocabulary: all bytes, padding, and one pair."""


def train_bpe(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a case-insensitive byte-pair tokenizer of at most `vocab_size` ids; every text has tokens.

    `save_pretrained(directory)` writes tokenizer.json and tokenizer_config.json. Few captions give fewer ids.
    ValueError if `vocab_size` is too small for the 256 bytes and padding, or if the captions have no words.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size must be at least {SMALLEST}, not {vocab_size}: all bytes are tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    listed = [caption for caption in captions if caption.strip()]
    if not listed:
        raise ValueError("a tokenizer cannot be trained: no caption has a word")
    tokenizer.train_from_iterator(listed, trainer)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True, eq=False)
class TokenTextEncoder:
    """The token ids of captions, and no states: the width is 0. length: tokens per caption, padding included. simplify:
    write captions as dalle-mini does (`text/simplified.py`)."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    simplify: bool = False

    @property
    def width(self) -> int:
        return 0

    @property
    def padding_is_read(self) -> bool:
        return False

    @cached_property
    def fingerprint(self) -> str:
        settings = {"length": self.length} | ({"simplify": True} if self.simplify else {})
        return fingerprint_of(settings, self.tokenizer, {})

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids of `length` tokens per caption and their padding mask. Long captions are truncated with a warning."""
        captions = caption_list(captions)
        return tokenize(self.tokenizer, list(map(simplified, captions)) if self.simplify else captions, self.length)

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """`TextEmbedding.ids` and mask; tokens (b length 0)."""
        tokens = self.tokenize(captions)
        return TextEmbedding(jnp.zeros((*tokens.ids.shape, 0)), jnp.asarray(tokens.mask), None, jnp.asarray(tokens.ids))

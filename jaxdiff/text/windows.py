"""Long prompts as several windows, each with its own start and end token, and the weights of their words."""

from collections.abc import Sequence

import numpy as np

from jaxdiff.text.prompt_weights import Fragment
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, lost_words, special_ids, token_ids, warn_cut


def tokenize_windows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Fragment]],
    window: int,
    count: int,
    vocab: int = 2**31,
) -> Tokens:
    """`count` windows of `window` tokens per prompt, one behind the other: n = count · window, with weights.

    Fragments are tokenized one by one. The tokens are divided wherever a window is full, also within a word. Windows
    beyond the prompt's end are encoded as empty prompts and masked. Longer prompts are truncated with a warning.
    ValueError as `tokenizer.tokenize`, or if a window has no room beside the special tokens.
    """
    special = special_ids(tokenizer)
    room, ends = window - len(special), int(special[-1:] == [tokenizer.eos_token_id])
    if room < 1:
        raise ValueError(f"windows of {window} tokens have no room beside {len(special)} special tokens")
    rows = iter(
        token_ids(tokenizer, [fragment.text for prompt in prompts for fragment in prompt], vocab, special=False)
    )
    ids = np.full((len(prompts), count, window), tokenizer.pad_token_id, np.int32)
    mask, weights = np.zeros(ids.shape, bool), np.ones(ids.shape, np.float32)
    lost = []
    for i, prompt in enumerate(prompts):
        pieces = [next(rows) for _ in prompt]
        lost += _lost(tokenizer, prompt, pieces, count * room)
        tokens = [token for piece in pieces for token in piece]
        of_tokens = [fragment.weight for fragment, piece in zip(prompt, pieces) for _ in piece]
        for j in range(count):
            part, start = tokens[j * room : (j + 1) * room], len(special) - ends
            row = [*special[:start], *part, *special[start:]]
            ids[i, j, : len(row)] = row
            mask[i, j, : len(row)] = bool(part) or j == 0
            weights[i, j, start : start + len(part)] = of_tokens[j * room : (j + 1) * room]
    warn_cut(lost, count * window, stacklevel=3)
    shape = len(prompts), count * window
    return Tokens(ids.reshape(shape), mask.reshape(shape), weights.reshape(shape))


def _lost(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Fragment], pieces: Sequence[list[int]], room: int
) -> list[str]:
    """The words beyond the first `room` tokens, as one text in a list; an empty list if all have room."""
    for i, piece in enumerate(pieces):
        if len(piece) > room:
            rest = "".join(fragment.text for fragment in prompt[i + 1 :])
            return [(lost_words(tokenizer, prompt[i].text, room) + rest).strip()]
        room -= len(piece)
    return []

"""T5 pre-training (arXiv 1910.10683, section 3.1.4): span corruption on captions.

Random spans of a caption are replaced by sentinels; the decoder predicts the removed spans:

    in   a small <extra_id_0> on a green <extra_id_1>
    out  <extra_id_0> red circle <extra_id_1> background <extra_id_2>

Corruption runs on the host in numpy with an explicit generator; the loss is a `Trainable`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.t5 import T5, TINY, T5Config, shift_right
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, Tokens, sentinel_ids, tokenize


@dataclass(frozen=True)
class Corruption:
    """Span corruption settings; the defaults are the paper's."""

    density: float = 0.15
    """Fraction of the tokens that are removed."""
    mean_span: float = 3.0
    """Mean span length in tokens."""

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ValueError(f"density {self.density}: must lie between 0 and 1")
        if not self.mean_span >= 1:
            raise ValueError(f"mean_span {self.mean_span}: must be at least 1 token")


@dataclass(frozen=True)
class T5Pretraining(SingleOptimizer):
    """Span-corruption training of T5. length: maximum tokens of a caption, end included."""

    config: T5Config = TINY
    length: int = 64
    corruption: Corruption = Corruption()

    def init(self, key: Array) -> tuple[dict, tuple]:
        ids = jnp.zeros((1, 2), jnp.int32)
        return T5(self.config).init(key, ids, ids > 0, ids)["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Array, step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """Mean cross-entropy (nats) of the target tokens, excluding padding. batch: as from `SpanBatches`.

        Metrics: `accuracy`, the fraction of target tokens with the largest logit. `key` is unused: there is no dropout,
        and the batch is already corrupted.
        """
        targets, mask = batch["targets"], batch["target_mask"]
        start = shift_right(targets, self.config.decoder_start_id)
        logits = cast(Array, T5(self.config).apply({"params": params}, batch["inputs"], batch["input_mask"], start))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        loss = _masked_mean(losses, mask)
        accuracy = _masked_mean((logits.argmax(-1) == targets).astype(jnp.float32), mask)
        return loss, ({"loss": loss, "accuracy": accuracy}, extra)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch; `side` is unused."""
        inputs, targets = (batch_size, self.length), (batch_size, target_length(self.length, self.corruption))
        return {
            "inputs": jax.ShapeDtypeStruct(inputs, jnp.int32),
            "input_mask": jax.ShapeDtypeStruct(inputs, jnp.bool_),
            "targets": jax.ShapeDtypeStruct(targets, jnp.int32),
            "target_mask": jax.ShapeDtypeStruct(targets, jnp.bool_),
        }


def span_counts(length: int, corruption: Corruption) -> tuple[int, int]:
    """Number of removed tokens and of spans, of `length` tokens: at least one, never all."""
    cut = min(max(round(length * corruption.density), 1), length - 1)
    spans = min(max(round(cut / corruption.mean_span), 1), length - cut)
    return cut, spans


def span_mask(length: int, corruption: Corruption, rng: np.random.Generator) -> np.ndarray:
    """Boolean (length,): True for removed tokens. All placements of the spans are equally likely.

    In the paper's code the last token is always removed and the first never, which on short captions would hide only
    the last words.
    """
    if length < 2:
        return np.zeros(length, bool)
    cut, spans = span_counts(length, corruption)
    cut_lengths = _random_lengths(cut, spans, rng)
    # At least one kept token between two spans, so that spans never touch; the kept ends may be empty.
    kept_lengths = _random_lengths(length - cut + 2, spans + 1, rng)
    kept_lengths[0] -= 1
    kept_lengths[-1] -= 1
    lengths = np.empty(2 * spans + 1, int)
    lengths[0::2], lengths[1::2] = kept_lengths, cut_lengths
    return np.repeat(np.arange(2 * spans + 1) % 2 == 1, lengths)


def corrupt(ids: np.ndarray, cut: np.ndarray, sentinels: Sequence[int], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one caption. ids (n,): without `</s>`. cut (n,): True for removed tokens.

    Both results end with `eos_id`; the targets have an additional sentinel after the last span.
    """
    starts = np.flatnonzero(cut & ~np.concatenate([[False], cut[:-1]]))
    if len(starts) + 1 > len(sentinels):
        raise ValueError(f"{len(starts)} spans need {len(starts) + 1} sentinels; the tokenizer has {len(sentinels)}")
    marks = np.asarray(sentinels[: len(starts) + 1])
    marked = np.insert(ids, starts, marks[:-1])  # every token and every sentinel, in order
    is_mark = np.insert(np.zeros(len(ids), bool), starts, True)
    is_cut = np.insert(cut, starts, False)
    inputs = np.append(marked[~is_cut], eos_id)
    targets = np.concatenate([marked[is_cut | is_mark], [marks[-1], eos_id]])
    return inputs.astype(np.int32), targets.astype(np.int32)


def target_length(length: int, corruption: Corruption) -> int:
    """The maximum target length for inputs of up to `length` tokens, `</s>` included."""
    return max(sum(span_counts(n, corruption)) + 2 for n in range(2, length))


def span_batches(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    batch: int,
    length: int,
    seed: int,
    corruption: Corruption | None = None,
) -> "SpanBatches":
    """Endless, resumable, shuffled batches of corrupted captions, without blank captions.

    length: tokens per caption with `</s>`; longer captions are truncated with a warning. ValueError if batch < 1,
    length < 3, all captions are blank or the tokenizer has no sentinels.
    """
    if batch < 1 or length < 3:
        raise ValueError(f"batch must be at least 1 and length at least 3, not {batch} and {length}")
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise ValueError("no caption with words to train on")
    sentinels = sentinel_ids(tokenizer)
    if not sentinels:
        raise ValueError("the tokenizer has no sentinels <extra_id_0>, …, which span corruption needs")
    special = SpecialIds(tuple(sentinels), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return SpanBatches(tokenize(tokenizer, captions, length), special, batch, seed, corruption or Corruption())


@dataclass(frozen=True)
class SpecialIds:
    """The tokenizer's special ids: sentinels in order, padding, end."""

    sentinels: tuple[int, ...]
    pad: int
    eos: int


class SpanBatches:
    """Iterator of dicts of numpy arrays: inputs (b n), input_mask, targets (b m), target_mask.

    tokens: the captions (c n), each with its `</s>`. Batch i is a function of the seed and i only, so the state is one
    number.
    """

    def __init__(self, tokens: Tokens, special: SpecialIds, batch: int, seed: int, corruption: Corruption):
        self._rows, self._lengths = tokens.ids, tokens.mask.sum(1) - 1
        self._batch, self._seed, self._corruption, self._special = batch, seed, corruption, special
        self._widths = (tokens.ids.shape[1], target_length(tokens.ids.shape[1], corruption))
        self._next = 0
        self._epoch, self._order = -1, np.empty(0, int)

    def __iter__(self) -> "SpanBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self._seed, 1, self._next])
        first = self._next * self._batch
        pairs = [self._corrupted(self._caption(first + i), rng) for i in range(self._batch)]
        inputs, input_mask = self._padded([pair[0] for pair in pairs], self._widths[0])
        targets, target_mask = self._padded([pair[1] for pair in pairs], self._widths[1])
        self._next += 1
        return {"inputs": inputs, "input_mask": input_mask, "targets": targets, "target_mask": target_mask}

    def get_state(self) -> dict[str, int]:
        return {"batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._next = state["batch"]

    def _caption(self, position: int) -> int:
        epoch, place = divmod(position, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._rows))
        return int(self._order[place])

    def _corrupted(self, caption: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = self._rows[caption, : self._lengths[caption]]
        return corrupt(ids, span_mask(len(ids), self._corruption, rng), self._special.sentinels, self._special.eos)

    def _padded(self, rows: list[np.ndarray], width: int) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(width) < lengths[:, None]
        padded = np.full(mask.shape, self._special.pad, np.int32)
        padded[mask] = np.concatenate(rows)
        return padded, mask


def _random_lengths(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random composition of `total` into `count` positive numbers, all equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _masked_mean(values: Array, mask: Array) -> Array:
    mask = mask.astype(values.dtype)
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)

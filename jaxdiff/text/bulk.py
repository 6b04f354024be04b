"""Bulk encoding of captions for storage, with little padding, on all devices.

Captions are sorted by token count and padded to one of a few lengths; the program is compiled once per length. Batches
of short captions have more rows, so that all batches hold about the same number of tokens. A caption's embedding does
not depend on the padded length, up to rounding.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int

from jaxdiff.text.encoder import NetworkTextEncoder
from jaxdiff.text.prompt_weights import weighted
from jaxdiff.text.tokenizer import Tokens

LENGTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class BulkEncoder:
    """Maps captions to their token embeddings without padding, and the maximum number of tokens.

    batch: captions per batch at the encoder's full length; at half the length, twice as many. lengths: padded lengths,
    in addition to the encoder's. sharding: of the ids and embeddings of a batch, which it must divide evenly; the
    encoder's parameters keep their sharding.
    """

    encoder: NetworkTextEncoder
    batch: int = 64
    lengths: tuple[int, ...] = LENGTHS
    sharding: jax.sharding.Sharding | None = None

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch {self.batch}: at least one caption at a time")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths {self.lengths}: a caption is padded to at least 1 token")
        if self.encoder.padding_is_read:
            raise ValueError("this encoder reads padding: its embeddings cannot be stored without it")

    def __call__(self, captions: Sequence[str]) -> tuple[list[Float16[np.ndarray, "_ d"]], int]:
        return self.encode(self.prepare(captions))

    def prepare(self, captions: Sequence[str]) -> Tokens:
        """The first step, on the host."""
        return self.encoder.tokenize(captions)

    def encode(
        self, tokens: Tokens, progress: Callable[[int, int], None] = lambda captions, tokens: None
    ) -> tuple[list[Float16[np.ndarray, "_ d"]], int]:
        """progress: called after each batch with the numbers of captions and tokens encoded."""
        counts = tokens.mask.sum(1)
        order = np.argsort(counts, kind="stable")
        blank = int(np.searchsorted(counts[order], 1))
        rows = [np.zeros((0, self.encoder.width), np.float16)] * len(counts)
        progress(blank, 0)
        previous = None
        for batch in batches(counts[order[blank:]], self._all_lengths, self.batch):
            chosen = order[blank:][batch.start : batch.stop]
            # Dispatched before the previous batch is fetched, to keep the devices busy.
            current = chosen, self._embedded(tokens, chosen, batch)
            _fetch(rows, counts, previous, progress)
            previous = current
        _fetch(rows, counts, previous, progress)
        return rows, self.encoder.length

    @property
    def _all_lengths(self) -> tuple[int, ...]:
        longest = self.encoder.length
        return (*sorted({length for length in self.lengths if length < longest}), longest)

    def _embedded(self, tokens: Tokens, chosen: np.ndarray, batch: "Batch") -> Float16[Array, "b n d"]:
        padding = ((0, batch.rows - len(chosen)), (0, 0))
        arrays = [np.pad(array[chosen, : batch.length], padding) for array in tokens if array is not None]
        return self._program(self.encoder.params, *jax.device_put(arrays, self.sharding))

    @functools.cached_property
    def _program(self):
        return jax.jit(functools.partial(_embed, self.encoder), out_shardings=self.sharding)


class Batch(NamedTuple):
    """The sorted captions start … stop, in `rows` rows of `length` tokens."""

    start: int
    stop: int
    length: int
    rows: int


def batches(counts: Int[np.ndarray, " b"], lengths: Sequence[int], batch: int) -> Iterator[Batch]:
    """Batches of captions with these token counts. `counts` and `lengths` are ascending.

    A batch that would be less than half full is merged with longer captions.
    """
    start = 0
    while start < len(counts):
        for length in lengths[np.searchsorted(lengths, counts[start]) :]:
            rows = batch * (lengths[-1] // length)
            fitting = np.searchsorted(counts, length, side="right") - start
            if 2 * fitting >= rows or start + fitting == len(counts):
                break
        stop = start + min(int(fitting), rows)
        yield Batch(start, stop, int(length), rows)
        start = stop


def _fetch(
    rows: list[np.ndarray],
    counts: np.ndarray,
    done: tuple[np.ndarray, Array] | None,
    progress: Callable[[int, int], None],
) -> None:
    if done is None:
        return
    places, embeddings = done
    for place, row in zip(places, np.asarray(embeddings)):
        rows[place] = row[: counts[place]].copy()  # copied, so that the padding is freed
    progress(len(places), int(counts[places].sum()))


def _embed(
    encoder: NetworkTextEncoder,
    params: dict,
    ids: Int[Array, "b n"],
    mask: Bool[Array, "b n"],
    weights: Float[Array, "b n"] | None = None,
) -> Float16[Array, "b n d"]:
    states = encoder.states(params, ids, mask)
    return (states if weights is None else weighted(states, weights, mask)).astype(jnp.float16)

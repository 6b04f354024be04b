"""The endless order of the examples of one source: epoch after epoch, each example once per epoch.

An order is a function of the seed and the position alone, so a stream resumes exactly from a saved position. A source
that reads block by block (`Blocks`) is shuffled such that a cache of a few blocks suffices.
"""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

SMALL = 4096
"""Below this many examples an epoch's order is a table; Grain's shuffle, made for large datasets, takes 0.5 ms an index
on 64 examples."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Examples that are read together, such as the row groups of Parquet files.

    sizes: examples per block, in the order of the source.
    together: blocks that a reader may hold at a time.
    """

    sizes: tuple[int, ...]
    together: int


class Order:
    """Position in the endless stream → place in the source, of `count` examples.

    Without `shuffle` the order is sequential; with it each epoch is a new permutation determined by the seed. With
    `blocks` the blocks are shuffled, then the examples within each run of `blocks.together` blocks, so that examples of
    one block stay close together. Thread-safe and picklable.
    """

    def __init__(self, count: int, seed: int, shuffle: bool, blocks: Blocks | None = None) -> None:
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._blocks = None if blocks is None or blocks.together >= len(blocks.sizes) else blocks
        self._cache = Cache(16)

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple:
        return Order, (self._count, self._seed, self._shuffle, self._blocks)

    def place(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if not self._shuffle:
            return place
        if self._blocks is not None:
            starts = self._runs(epoch)[1]
            run = int(np.searchsorted(starts, place, "right")) - 1
            return int(self._run(epoch, run)[place - starts[run]])
        if self._count < SMALL:
            return int(self._table(epoch)[place])
        return int(self._large[position])

    def epoch(self, number: int) -> np.ndarray:
        """All places of an epoch, in order. For large sources it differs from the order of `place`."""
        if not self._shuffle:
            return np.arange(self._count)
        if self._blocks is not None:
            return np.concatenate([self._run(number, run) for run in range(len(self._runs(number)[1]))])
        return self._permutation(number)

    def _table(self, epoch: int) -> np.ndarray:
        return self._cache(epoch, lambda: self._permutation(epoch))

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)

    @functools.cached_property
    def _large(self) -> Any:
        """A Grain dataset, imported here as it takes a quarter of a second."""
        import grain

        return grain.MapDataset.range(self._count).seed(self._seed).shuffle()

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        assert self._blocks is not None
        return np.cumsum(self._blocks.sizes)

    def _runs(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and the start of each run of blocks."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            assert self._blocks is not None
            blocks = np.random.default_rng((self._seed, epoch)).permutation(len(self._blocks.sizes))
            ends = np.cumsum(np.asarray(self._blocks.sizes)[blocks])
            together = self._blocks.together
            return blocks, np.concatenate([[0], ends[together - 1 : -1 : together]])

        return self._cache(("runs", epoch), make)

    def _run(self, epoch: int, run: int) -> np.ndarray:
        """The places of a run of blocks, in order."""

        def make() -> np.ndarray:
            assert self._blocks is not None
            first = run * self._blocks.together
            blocks = self._runs(epoch)[0][first : first + self._blocks.together]
            places = [np.arange(self._ends[b] - self._blocks.sizes[b], self._ends[b]) for b in blocks]
            return np.random.default_rng((self._seed, epoch, run)).permutation(np.concatenate(places))

        return self._cache((epoch, run), make)


def interleaved(position: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """The stream that gives the element at `position`, and the index within that stream.

    Streams are interleaved as evenly as integers allow: of the first n elements, stream k gives n · weight / sum of the
    weights, to within the number of streams; of the first sum(weights), exactly its weight.
    """
    rest = sum(weights)
    for stream, weight in enumerate(weights):
        before = position * weight // rest
        if (position + 1) * weight // rest > before:
            return stream, before
        position, rest = position - before, rest - weight
    raise ValueError(f"no positive weight among {weights}")


def position_of(stream: int, number: Any, weights: tuple[int, ...]) -> Any:
    """The inverse of `interleaved`, for one number or an array."""
    rest = sum(weights[stream:])
    position = -(-(number + 1) * rest // weights[stream]) - 1
    for weight in reversed(weights[:stream]):
        total = rest + weight
        position = position * total // rest  # that index among the elements that this stream leaves
        rest = total
    return position


class Cache:
    """The last `most` values; each is computed once, by the first thread that needs it."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.RLock()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __reduce__(self) -> tuple:
        return Cache, (self._most,)

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > self._most:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]

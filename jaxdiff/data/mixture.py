"""A weighted mixture of sources.

As a sequence, a mixture holds every example of its sources once, evenly interleaved: index ↔ (source, place). Stored
embeddings and captions follow this sequence, so they remain valid when the weights change.

The weights determine the order in which `pipeline.image_batches` uses the examples. An epoch of a mixture has as many
examples as all sources together; each source contributes its weight divided by the sum of the weights. A source with
fewer examples repeats within the epoch; a larger one is used in part and continues in the next epoch. No example of a
source repeats before all of its examples are used.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from io import BufferedIOBase

import numpy as np

from jaxdiff.data.example import Example, Source, blocks_of, fingerprint_of, open_image
from jaxdiff.data.orders import Order, interleaved, position_of


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """The examples of `sources`, which may be of any kind but a mixture. Picklable if they are.

    weights: positive relative frequencies; None: the sizes of the sources. ValueError for invalid weights.
    """

    sources: tuple[Source, ...]
    weights: tuple[float | int, ...] | None = None

    def __post_init__(self):
        if not self.sources or not all(len(source) for source in self.sources):
            raise ValueError("a mixture needs sources, and each of them an example")
        if any(isinstance(source, MixtureSource) for source in self.sources):
            raise ValueError("a mixture of mixtures: name all the sources in one")
        check_weights(self.weights, len(self.sources))

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Example:
        source, place = self.where(index)
        return self.sources[source][place]

    def open_image(self, index: int) -> BufferedIOBase | bytes | np.ndarray:
        source, place = self.where(index)
        return open_image(self.sources[source], place)

    def fingerprint(self) -> str | None:
        """None if a source has none."""
        fingerprints = [fingerprint_of(source) for source in self.sources]
        known = [each for each in fingerprints if each is not None]
        return f"mixture of {known}" if len(known) == len(fingerprints) else None

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Examples of each source."""
        return tuple(len(source) for source in self.sources)

    def where(self, index: int) -> tuple[int, int]:
        """The source of an example, and its place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return interleaved(int(index), self.counts)

    def index(self, source: int, place: int) -> int:
        """The inverse of `where`."""
        return position_of(source, place, self.counts)

    def indices(self, source: int) -> np.ndarray:
        """`index` of all places of a source."""
        return position_of(source, np.arange(self.counts[source]), self.counts)

    @functools.cached_property
    def within(self) -> int:
        """A number of consecutive positions that contains every example."""
        longest = max(count / fraction for count, fraction in zip(self.counts, self.fractions))
        return math.ceil(longest) + len(self.counts)

    @functools.cached_property
    def fractions(self) -> tuple[Fraction, ...]:
        """The fraction of an epoch from each source; their sum is 1."""
        weights = [Fraction(str(weight)) for weight in self.weights or self.counts]
        return tuple(weight / sum(weights) for weight in weights)


class MixtureOrder:
    """Position in the endless stream → index in the mixture, by the weights and each source's own `Order`."""

    def __init__(self, source: MixtureSource, seed: int, shuffle: bool) -> None:
        self._source = source
        self._weights = integer_weights(source.fractions)
        self.orders = orders_of(source, seed, shuffle)

    def __len__(self) -> int:
        return len(self._source)

    def place(self, position: int) -> int:
        source, number = interleaved(position, self._weights)
        return self._source.index(source, self.orders[source].place(number))


def orders_of(source: Source, seed: int, shuffle: bool) -> tuple[Order, ...]:
    """The order of each source of a mixture, with different seeds; or the order of a single source."""
    if not isinstance(source, MixtureSource):
        return (Order(len(source), seed, shuffle, blocks_of(source)),)
    seeds = np.random.SeedSequence(seed).generate_state(len(source.sources)).tolist()
    return tuple(Order(len(each), s, shuffle, blocks_of(each)) for each, s in zip(source.sources, seeds, strict=True))


def integer_weights(fractions: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in the same proportion."""
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    return tuple(number // divisor for number in integers)


def check_weights(weights: Sequence[float | int] | None, count: int) -> None:
    """ValueError unless there is one positive, finite weight for each of `count` sources."""
    if weights is None:
        return
    shown = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ValueError(f"weights {shown}: {len(weights)} for {count} sources; give one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights {shown}: each must be a positive number")


def spread(source: Source, count: int) -> Source:
    """At most `count` evenly spaced examples of a source; at least one of each source of a mixture, with the same
    weights. Returns the source itself if it has no more."""
    if count < 1:
        raise ValueError(f"{count} examples of a source: at least 1")
    if count >= len(source):
        return source
    if isinstance(source, MixtureSource):
        counts = [max(1, count * each // len(source)) for each in source.counts]
        return MixtureSource(tuple(map(spread, source.sources, counts)), source.weights or source.counts)
    return Spread(source, count)


@dataclasses.dataclass(frozen=True)
class Spread:
    """`count` evenly spaced examples of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return self.source[self.place(index)]

    def place(self, index: int) -> int:
        """The index in the source."""
        return index * len(self.source) // self.count

    def open_image(self, index: int) -> BufferedIOBase | bytes | np.ndarray:
        return open_image(self.source, self.place(index))

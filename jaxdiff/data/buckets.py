"""Aspect-ratio buckets: batches of one size each, all sizes with about the same number of pixels.

Each image is assigned to the bucket with the nearest log aspect ratio, resized until one side fits, and centre-cropped
along the other. A batch holds images of one bucket. The order of buckets is a function of the settings, the image
sizes, the seed and the number of images per step; it does not depend on the number of processes.

    stream   each bucket has an endless stream of its images, each once per epoch (in a mixture: by its weights), in
             the order of `orders`
    batch    the next images of a bucket's stream, one step's worth. Images that do not fill a batch at the end of an
             epoch start the bucket's next batch, so no image is dropped
    epoch    the batches filled by the streams' next len(source) images, in random order
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from jaxdiff.data.example import Source
from jaxdiff.data.image_sizes import ImageSizes
from jaxdiff.data.mixture import MixtureSource, integer_weights, orders_of
from jaxdiff.data.orders import Cache, interleaved

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Constraints on the bucket sizes.

    stride: heights and widths are multiples of it (the network's stride; for super-resolution also a multiple of the
    factor).
    max_aspect: largest ratio of the long side to the short one; longer images are cropped more.
    ValueError for values out of range.
    """

    stride: int = 64
    max_aspect: float = 2.0

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"buckets: a stride of {self.stride} pixels; it must be at least 1")
        if not (math.isfinite(self.max_aspect) and self.max_aspect >= 1):
            raise ValueError(f"buckets: max_aspect {self.max_aspect:g} must be a number of at least 1")

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """(height, width) of about resolution² pixels, from wide to tall, the square included. ValueError if the
        resolution is not a multiple of the stride."""
        if resolution % self.stride:
            raise ValueError(f"buckets: resolution {resolution} is not a multiple of the stride {self.stride}")
        sizes = {(resolution, resolution)}
        for short in range(self.stride, resolution, self.stride):
            long = round(resolution**2 / short / self.stride) * self.stride
            if long <= self.max_aspect * short:
                sizes |= {(short, long), (long, short)}
        return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


@dataclasses.dataclass(frozen=True)
class Slot:
    """One entry of a batch. spare: it only pads the last batch of a single epoch."""

    index: int
    bucket: int
    spare: bool


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """step: images per step over all processes. seed, shuffle, repeat: as in `DataConfig`."""

    step: int
    seed: int
    shuffle: bool = True
    repeat: bool = True


class BucketPlan:
    """Maps each position of the stream to an image, as a pure function of its arguments. Picklable.

    sizes: (height, width) of the buckets in use. A bucket with fewer images than a step would repeat them within a
    batch, so its images are moved to the nearest other bucket, the smallest bucket first.
    counts: images per bucket. merged: images that were moved.
    """

    def __init__(
        self, source: Source, image_sizes: ImageSizes, buckets: Buckets, resolution: int, settings: PlanSettings
    ) -> None:
        if len(image_sizes) != len(source):
            raise ValueError(f"sizes of {len(image_sizes)} images for {len(source)} examples; read them again")
        self.settings = settings
        possible = buckets.sizes(resolution)
        nearest = _nearest(image_sizes.sizes, possible)
        used, of, self.merged = _merged(nearest, possible, settings.step)
        if not used:
            raise ValueError(f"not one of the {len(source)} images has a header that can be read")
        self.sizes: tuple[Size, ...] = tuple(possible[number] for number in used)
        self.counts: tuple[int, ...] = tuple(np.bincount(of[of >= 0], minlength=len(used)).tolist())
        self._of = of
        self._orders = orders_of(source, settings.seed, settings.shuffle)
        self._source_indices = _source_indices(source)
        self._counts = [[len(each) for each in _by_bucket(of[indices], len(used))] for indices in self._source_indices]
        """Images of each source of a mixture in each bucket."""
        self._weights, self._rates = _rates(source, self._counts)
        self._batches, self._epochs, self._all = Cache(64), Cache(4), Cache(4)
        self._passes = Cache(3 * len(self._source_indices))

    def __len__(self) -> int:
        """Batches of a single epoch; the last one of each bucket may be partial."""
        return sum(self._ended_counts())

    def slot(self, position: int) -> Slot:
        """The entry at `position` of the stream, in batch position // step."""
        number, place = divmod(position, self.settings.step)
        bucket, batch = self._batch(number)
        place += batch * self.settings.step
        most = None if self.settings.repeat else math.ceil(self._rates[bucket])
        spare = most is not None and place >= most
        return Slot(self._index(bucket, place % most if most and spare else place), bucket, spare)

    def others(self, slot: Slot, rng: np.random.Generator) -> Iterator[int]:
        """All images of the slot's bucket, from a random start: replacements for a damaged image."""
        members = self._in_bucket(slot.bucket)
        first = int(rng.integers(len(members)))
        return (int(members[(first + step) % len(members)]) for step in range(len(members)))

    def __str__(self) -> str:
        """`3 buckets (height × width: images): 48 × 88: 12, …`"""
        sizes = ", ".join(f"{h} × {w}: {n}" for (h, w), n in zip(self.sizes, self.counts))
        moved = f"; {self.merged} images of smaller buckets went to the next" if self.merged else ""
        full = sum(self._full(1, bucket) for bucket in range(len(self.sizes))) * self.settings.step
        left = int(sum(self._rates)) - full
        kept = self.settings.repeat and left
        over = f"; {left} that fill no batch of the first epoch begin the next" if kept else ""
        kinds = "1 bucket" if len(self.sizes) == 1 else f"{len(self.sizes)} buckets"
        return f"{kinds} (height × width: images): {sizes}{moved}{over}"

    def fingerprint(self) -> str:
        """Changes with anything that changes the sizes of the batches or their order."""
        content = (self.settings, self.sizes, self._weights, self._rates)
        return hashlib.blake2b(repr(content).encode() + self._of.tobytes(), digest_size=12).hexdigest()

    def _batch(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and the batch's index within the bucket."""
        if not self.settings.repeat:
            return self._ended[number % len(self._ended)]
        return self._batches(number, lambda: self._locate(number))

    def _locate(self, number: int) -> tuple[int, int]:
        # The first epoch that ends after batch `number`. Each bucket carries over less than one batch.
        step, images = self.settings.step, int(sum(self._rates))
        span = range(number * step // images, (number + len(self.sizes)) * step // images + 2)
        epoch = span[bisect.bisect_right(span, number, key=lambda epoch: self._before(epoch + 1))]
        first, batches = self._epochs(epoch, lambda: (self._before(epoch), self._epoch(epoch)))
        return batches[number - first]

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before this one."""
        return sum(self._full(epoch, bucket) for bucket in range(len(self.sizes)))

    def _full(self, epochs: int, bucket: int) -> int:
        """Batches filled by a bucket's images in this many epochs."""
        return int(epochs * self._rates[bucket] // self.settings.step)

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        ranges = [(self._full(epoch, bucket), self._full(epoch + 1, bucket)) for bucket in range(len(self.sizes))]
        return _arranged(epoch, ranges, self.settings)

    @functools.cached_property
    def _ended(self) -> list[tuple[int, int]]:
        return _arranged(0, [(0, count) for count in self._ended_counts()], self.settings)

    def _ended_counts(self) -> list[int]:
        return [math.ceil(math.ceil(rate) / self.settings.step) for rate in self._rates]

    def _index(self, bucket: int, place: int) -> int:
        """The source's example at a place of a bucket's stream."""
        source, number = interleaved(place, self._weights[bucket])
        epoch, inside = divmod(number, self._counts[source][bucket])
        places = self._passes((source, epoch), lambda: self._order(source, epoch))
        return int(self._source_indices[source][places[bucket][inside]])

    def _order(self, source: int, epoch: int) -> list[np.ndarray]:
        """For each bucket, its places in a source, in the order of one epoch of that source."""
        order = self._orders[source].epoch(epoch)
        return [order[chosen] for chosen in _by_bucket(self._of[self._source_indices[source]][order], len(self.sizes))]

    def _in_bucket(self, bucket: int) -> np.ndarray:
        return self._all(bucket, lambda: np.flatnonzero(self._of == bucket))


def _rates(source: Source, counts: list[list[int]]) -> tuple[list[tuple[int, ...]], list[Fraction]]:
    """For each bucket: the weights of the sources in it, and the number of its images that an epoch uses."""
    fractions = source.fractions if isinstance(source, MixtureSource) else (Fraction(1),)
    readable = [sum(row) for row in counts]
    # The fraction of used images from a source and a bucket: the source's fraction times the bucket's fraction of it.
    bucket_fractions = [
        [f * Fraction(row[bucket], n) if n else Fraction(0) for f, n, row in zip(fractions, readable, counts)]
        for bucket in range(len(counts[0]))
    ]
    sums = [sum(each, Fraction(0)) for each in bucket_fractions]
    total = sum(sums, Fraction(0))
    return [integer_weights(each) for each in bucket_fractions], [sum(readable) * each / total for each in sums]


def _arranged(epoch: int, ranges: list[tuple[int, int]], settings: PlanSettings) -> list[tuple[int, int]]:
    """The batches of an epoch, given a range of batch numbers per bucket; the order of buckets is random."""
    weights = tuple(last - first for first, last in ranges)
    buckets = [interleaved(place, weights)[0] for place in range(sum(weights))]
    if settings.shuffle:
        buckets = np.random.default_rng((settings.seed, epoch, 1)).permutation(buckets).astype(int).tolist()
    following = [itertools.count(first) for first, _ in ranges]
    return [(bucket, next(following[bucket])) for bucket in buckets]


def _source_indices(source: Source) -> list[np.ndarray]:
    """The indices of the examples of each source of a mixture, in order."""
    if not isinstance(source, MixtureSource):
        return [np.arange(len(source))]
    return [source.indices(number) for number in range(len(source.sources))]


def _by_bucket(of: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of `count` buckets, the places where `of` equals it, in order."""
    order = np.argsort(of, kind="stable")
    ends = np.searchsorted(of[order], np.arange(count + 1))
    return [order[first:last] for first, last in itertools.pairwise(ends)]


def _nearest(sizes: np.ndarray, buckets: tuple[Size, ...]) -> np.ndarray:
    """The bucket of each image by aspect ratio; -1 if the size is unknown."""
    readable = sizes[:, 0] > 0
    aspects = np.log([height / width for height, width in buckets])
    middles = (aspects[1:] + aspects[:-1]) / 2
    known = np.where(readable[:, None], sizes, 1)
    return np.where(readable, np.searchsorted(middles, np.log(known[:, 0] / known[:, 1])), -1)


def _merged(nearest: np.ndarray, buckets: tuple[Size, ...], least: int) -> tuple[list[int], np.ndarray, int]:
    """The buckets in use, the index among them of each image's bucket, and the number of images moved."""
    counts = np.bincount(nearest[nearest >= 0], minlength=len(buckets))
    used = [number for number in range(len(buckets)) if counts[number]]
    aspects = np.log([height / width for height, width in buckets])
    to = np.arange(len(buckets))
    moved = 0
    while len(used) > 1:
        smallest = min(used, key=lambda number: (counts[number], number))
        if counts[smallest] >= least:
            break
        used.remove(smallest)
        other = min(used, key=lambda number: (abs(aspects[number] - aspects[smallest]), number))
        moved += int(counts[smallest])
        counts[other] += counts[smallest]
        to[to == smallest] = other
    places = np.full(len(buckets) + 1, -1)
    places[used] = np.arange(len(used))
    return used, places[np.append(to, len(buckets))[nearest]].astype(np.int16), moved

"""The Grain input pipeline: from any source of captioned images to numpy batches.

    source → shuffle → repeat → decode, resize, crop, join embeddings → shard by process → drop rejects → batch

The order of examples and every random crop are functions of the seed and the position alone, so an iterator resumes
exactly from a saved state, whatever the number of threads. The order of a mixture follows its weights (`mixture.py`).
With aspect-ratio buckets it also depends on the buckets, and each batch has images of one size (`buckets.py`).
"""

import dataclasses
import functools
import re
import signal
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff.core.errors import ProcessLostError
from jaxdiff.data.buckets import BucketPlan, Buckets, PlanSettings
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.image_sizes import ImageSizes
from jaxdiff.data.mixture import MixtureSource
from jaxdiff.data.skipped import Skipped

if TYPE_CHECKING:
    import grain

_ENDED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
"""Grain's message for a worker that was ended by a signal. A worker that exits by itself has a bug."""


@dataclasses.dataclass(frozen=True)
class ReadAhead:
    """Prefetching on the host. It does not affect the order and content of the batches.

    threads: decoding threads (Pillow releases the interpreter lock); 0 reads synchronously.
    ahead: prefetched examples.
    workers: processes, each with `threads` threads, for hosts where one process is too slow; 0 for none.
    """

    threads: int = 2
    ahead: int = 64
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Content and order of the batches. ValueError for incompatible sizes.

    resolution: side of the images in pixels; other aspect ratios are centre-cropped.
    buckets: images of about resolution² pixels instead, in a few sizes (`buckets.Buckets`), each batch of one size.
    batch: images per batch of this process.
    low_resolution: side of the downsampled image for super-resolution; the resolution is a multiple of it.
    crop: side of a random window of the image, a multiple of the factor between both resolutions.
    captions: include the captions in the batches.
    caption_optional: also use examples without a caption if captions or embeddings are requested.
    strict: raise ValueError for an example that would be skipped, or whose caption would be repaired.
    shuffle, seed: a new order every epoch; the seed determines it and the windows.
    repeat: endless; otherwise one epoch, whose last batch may be partial.
    """

    resolution: int
    batch: int
    low_resolution: int | None = None
    crop: int | None = None
    buckets: Buckets | None = None
    captions: bool = False
    caption_optional: bool = False
    strict: bool = False
    shuffle: bool = True
    seed: int = 0
    repeat: bool = True

    def __post_init__(self):
        if self.resolution < 1 or self.batch < 1:
            raise ValueError(f"resolution and batch must be positive, got {self.resolution} and {self.batch}")
        low = self.low_resolution
        if low is not None and (low < 1 or self.resolution % low):
            raise ValueError(f"resolution {self.resolution} is not a multiple of the low resolution {low}")
        if self.buckets is not None:
            self.buckets.sizes(self.resolution)
            if self.crop is not None:
                raise ValueError("crop is a square window: not with buckets of other aspect ratios")
            if self.buckets.stride % self.factor:
                raise ValueError(
                    f"buckets: the stride {self.buckets.stride} is not a multiple of the factor {self.factor} between "
                    "both resolutions"
                )
        if self.crop is not None:
            if low is None:
                raise ValueError("crop is for super-resolution: give low_resolution too")
            factor = self.factor
            if not factor <= self.crop <= self.resolution or self.crop % factor:
                raise ValueError(
                    f"crop {self.crop} must be a multiple of the factor {factor}, at most {self.resolution}"
                )

    @property
    def factor(self) -> int:
        """The factor between both resolutions; 1 without a low one."""
        return 1 if self.low_resolution is None else self.resolution // self.low_resolution


def image_batches(
    source: Source,
    config: DataConfig,
    embeddings: Embeddings | None = None,
    *,
    sizes: ImageSizes | None = None,
    process_index: int = 0,
    process_count: int = 1,
    read_ahead: ReadAhead = ReadAhead(),
) -> "Batches":
    """Batches of images, `config.batch` of them from this process, as dicts of numpy arrays.

    image      float32 (b h w 3) in [-1, 1], h = w = `resolution`, or `crop` where one is given; with `buckets` one of
               their sizes, the same on all processes at the same step
    low_res    with `low_resolution`: float32 (b h/f w/f 3), f = resolution / low_resolution: the image downsampled by
               `images.resize` (Pillow BICUBIC, antialiased) before both are cropped at the same random place
    text, text_mask   with `embeddings`: (b n d) float16 and (b n) bool; masked rows are zero
    caption, index    with `captions`: unicode strings (b,) and indices in the source (b,), for the host

    Unreadable images are skipped, and so are images without a caption if `captions` or `embeddings` need one (unless
    `caption_optional`): each is counted in `.skipped` and warned of in one line. A caption with replaced characters is
    used, but also counted and warned of. Each of `process_count` processes gets a disjoint shard. With `repeat`, the
    concatenation of their batches equals the batch of a single process (until an example is skipped). ValueError for an
    empty source, and for embeddings of another number of examples.

    sizes: required with `buckets`, the sizes of the source's images (`image_sizes.read_sizes`). A skipped image is then
    replaced by another one of its bucket, so that all processes follow one order of sizes. In a single epoch the last
    batch of each bucket may be partial, and with several processes empty.
    """
    from jaxdiff.data.grain_pipeline import stream_of  # imported here, see there

    if not len(source):
        raise ValueError(f"{source}: no examples")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: the index must lie in 0…{process_count - 1}")
    if embeddings is not None and embeddings.count != len(source):
        raise ValueError(
            f"{embeddings.path}: holds {embeddings.count} embeddings for {len(source)} examples; store them again"
        )
    report = Skipped(len(source), config.strict, source.within if isinstance(source, MixtureSource) else None)
    plan = _bucket_plan(source, config, sizes, process_count)
    if plan is not None:
        assert sizes is not None  # otherwise there is no plan
        report.leave_out(sizes.faults)
    process = process_index, process_count
    return Batches(stream_of(source, config, embeddings, plan, report, process, read_ahead), report, plan)


def _bucket_plan(source: Source, config: DataConfig, sizes: ImageSizes | None, process_count: int) -> BucketPlan | None:
    """The plan of the buckets, None without buckets. ValueError for missing or superfluous sizes."""
    if config.buckets is None:
        if sizes is not None:
            raise ValueError("sizes of the images are for buckets: give the config buckets, or leave the sizes out")
        return None
    if sizes is None:
        raise ValueError("buckets need the sizes of the images: give image_batches(…, sizes=read_sizes(source))")
    settings = PlanSettings(config.batch * process_count, config.seed, config.shuffle, config.repeat)
    return BucketPlan(source, sizes, config.buckets, config.resolution, settings)


class Batches:
    """Iterator over batches with `next`, `get_state` and `set_state` (a small JSON-able dict), and `skipped`.

    buckets: the plan of the batch sizes (its `str` is a one-line summary); None: all batches have one size.
    """

    def __init__(self, stream: "grain.IterDataset", skipped: Skipped, buckets: BucketPlan | None = None):
        self._iterator = iter(stream)
        self.skipped, self.buckets = skipped, buckets

    @functools.cached_property
    def varying_shapes(self) -> str | None:
        """A text that identifies the order of the batch shapes, equal on all processes; None if all are the same."""
        return None if self.buckets is None else self.buckets.fingerprint()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. ProcessLostError if a worker process was killed."""
        try:
            return next(self._iterator)
        except RuntimeError as error:
            ended = _ENDED.search(str(error))
            if ended is None:
                raise
            raise ProcessLostError(
                f"a worker process that reads data was ended by signal {ended[1]} ({signal.strsignal(int(ended[1]))}), "
                "perhaps because memory ran out: start again, with fewer workers if it happens again"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch; prefetched examples do not count as used."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume exactly from `state`; the source, settings and number of workers must be the same."""
        try:
            self._iterator.set_state(state)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the saved state belongs to another pipeline (of other workers?): {error!r}") from error

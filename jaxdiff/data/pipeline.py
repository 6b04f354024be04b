"""The Grain input pipeline: from any source of captioned images to numpy batches.

    source → shuffle → repeat → decode, resize, crop, join embeddings → shard by process → drop rejects → batch

The order of examples and every random crop are functions of the seed and the position alone, so an iterator resumes
exactly from a saved state, whatever the number of threads. The order of a mixture follows its weights (`mixture.py`).
With aspect-ratio buckets it also depends on the buckets, and each batch has images of one size (`buckets.py`).
"""

import dataclasses
import functools
import itertools
import re
import signal
import sys
from typing import Any

import absl.flags
import grain
import numpy as np

from jaxdiff.core.errors import ProcessLostError
from jaxdiff.data import images
from jaxdiff.data.buckets import BucketPlan, Buckets, PlanSettings, Slot
from jaxdiff.data.embeddings import Embeddings, digest
from jaxdiff.data.example import Source, blocks_of, cleaned
from jaxdiff.data.image_sizes import ImageSizes
from jaxdiff.data.mixture import MixtureOrder, MixtureSource
from jaxdiff.data.orders import SMALL, Order
from jaxdiff.data.skipped import REJECTS, REPLACED, Skipped

_ENDED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
"""Grain's message for a worker that was ended by a signal. A worker that exits by itself has a bug."""
_SPARE = "spare"  # with buckets, in a single epoch: an example that only pads a batch and is removed from it


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
    if not len(source):
        raise ValueError(f"{source}: no examples")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: the index must lie in 0…{process_count - 1}")
    if embeddings is not None and embeddings.count != len(source):
        raise ValueError(
            f"{embeddings.path}: holds {embeddings.count} embeddings for {len(source)} examples; store them again"
        )
    report = Skipped(len(source), config.strict, source.within if isinstance(source, MixtureSource) else None)
    prepare = _Prepare(config, embeddings)
    plan = _bucket_plan(source, config, sizes, process_count)
    if plan is None:
        examples = _ordered(source, config).random_map(prepare)
    else:
        assert sizes is not None  # otherwise there is no plan
        report.leave_out(sizes.faults)
        examples = _Slots(plan).seed(config.seed).random_map(_PrepareInBucket(prepare, _Numbered(source), plan))
    # Crops are drawn before sharding, so that no two processes draw the same sequence of windows.
    if process_count > 1 and (config.repeat or plan is not None):
        examples = _Shard(examples, config.batch, process_index, process_count)
    elif process_count > 1:
        examples = examples[process_index::process_count]
    # Rejects are counted here, in the main process, even if workers decode.
    stream = _read(examples, read_ahead).filter(report.keep).batch(config.batch, drop_remainder=False).map(_finish)
    if plan is not None and not config.repeat and process_count == 1:
        # Drops a batch of which all examples were skipped
        stream = stream.filter(lambda batch: len(batch["image"]) > 0)
    options = grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None)
    return Batches(grain.experimental.WithOptionsIterDataset(stream, options), report, plan)


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


def _ordered(source: Source, config: DataConfig) -> grain.MapDataset:
    """The examples of the source in the order of use."""
    examples = grain.MapDataset.source(_Numbered(source)).seed(config.seed)
    if isinstance(source, MixtureSource):
        examples = _Arranged(examples, MixtureOrder(source, config.seed, config.shuffle))
    elif config.shuffle and (len(source) < SMALL or blocks_of(source) is not None):
        examples = _Arranged(examples, Order(len(source), config.seed, True, blocks_of(source)))
    elif config.shuffle:
        examples = examples.shuffle()
    return examples.repeat() if config.repeat else examples


def _read(examples: grain.MapDataset, read_ahead: ReadAhead) -> grain.IterDataset:
    options = grain.ReadOptions(read_ahead.threads, read_ahead.ahead if read_ahead.threads else 0)
    stream = examples.to_iter_dataset(options)
    if not read_ahead.workers:
        return stream
    if not absl.flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, which are parsed only by absl's own main
        absl.flags.FLAGS.mark_as_parsed()
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=read_ahead.workers, per_worker_buffer_size=8))


class Batches:
    """Iterator over batches with `next`, `get_state` and `set_state` (a small JSON-able dict), and `skipped`.

    buckets: the plan of the batch sizes (its `str` is a one-line summary); None: all batches have one size.
    """

    def __init__(self, stream: grain.IterDataset, skipped: Skipped, buckets: BucketPlan | None = None):
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


class _Arranged(grain.MapDataset):
    """The examples in an order that continues across epochs."""

    def __init__(self, parent: grain.MapDataset, order: Order | MixtureOrder):
        super().__init__(parent)
        self._examples, self._order = parent, order

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._examples[self._order.place(index)]


class _Slots(grain.MapDataset):
    """The slots of a plan's batches."""

    def __init__(self, plan: BucketPlan):
        super().__init__()
        self._plan = plan

    def __len__(self) -> int:
        return sys.maxsize if self._plan.settings.repeat else len(self._plan) * self._plan.settings.step

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._plan.slot(index)


class _Shard(grain.MapDataset):
    """One process's consecutive `batch` examples of every `batch` × `count`."""

    def __init__(self, parent: grain.MapDataset, batch: int, process: int, count: int):
        super().__init__(parent)
        self._examples, self._batch, self._process, self._count = parent, batch, process, count

    def __len__(self) -> int:
        return len(self._examples) // self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        round, place = divmod(index, self._batch)
        return self._examples[(round * self._count + self._process) * self._batch + place]


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """The source with each example's index; a file that cannot be opened becomes a reject."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            return {**self.source[index], "index": int(index)}
        except OSError as error:
            return {"rejected": (f"example {index}", "unreadable", str(error))}


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.RandomMap):
    """One example of a source → one entry of a batch (as uint8, which is cheaper to transfer), or a reject."""

    config: DataConfig
    embeddings: Embeddings | None

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        return self.entry(element, (self.config.resolution, self.config.resolution), rng)

    def entry(self, element: dict, size: tuple[int, int], rng: np.random.Generator) -> dict:
        if "rejected" in element:
            return element
        text, fault = cleaned(element["caption"], element.get("caption_fault"))
        caption = text or ""
        wanted = self.config.captions or self.embeddings is not None
        if wanted and not caption and not self.config.caption_optional:
            return {"rejected": (element["name"], "no caption", "no caption")}
        try:
            image = images.resize(images.decode(element["image"]), size)
        except images.Unreadable as error:
            return {"rejected": (element["name"], "unreadable", str(error))}
        replaced = f"{element['name']}: {fault}" if wanted and fault is not None else ""
        return {
            **self._views(image, rng),
            **self._text(element["name"], element["index"], caption),
            REPLACED: replaced,
        }

    def _views(self, image: np.ndarray, rng: np.random.Generator) -> dict:
        if self.config.low_resolution is None:
            return {"image": image}
        low = images.resize(image, (len(image) // self.config.factor, image.shape[1] // self.config.factor))
        if self.config.crop is not None:
            image, low = images.aligned_crops(image, low, self.config.crop, rng)
        return {"image": image, "low_res": low}

    def _text(self, name: str, index: int, caption: str) -> dict:
        joined = {"caption": caption, "index": index} if self.config.captions else {}
        if self.embeddings is not None:
            text, mask, stored = self.embeddings[index]
            if stored != digest(caption):
                raise ValueError(
                    f"{self.embeddings.path}: embedding {index} was made from another caption than that of {name}; "
                    "delete that folder, or store the embeddings in another"
                )
            joined |= {"text": text, "text_mask": mask}
        return joined


@dataclasses.dataclass(frozen=True)
class _PrepareInBucket(grain.transforms.RandomMap):
    """The example of a slot, or another one of its bucket if it is rejected."""

    prepare: _Prepare
    source: "_Numbered"
    plan: BucketPlan

    def random_map(self, element: Slot, rng: np.random.Generator) -> dict:
        rejects: list[tuple[str, str, str]] = []
        size = self.plan.sizes[element.bucket]
        for index in itertools.chain([element.index], self.plan.others(element, rng)):
            entry = self.prepare.entry(self.source[index], size, rng)
            if "rejected" not in entry:
                spare = element.spare or (bool(rejects) and not self.prepare.config.repeat)
                return {**entry, REJECTS: rejects, _SPARE: spare}
            rejects.append(entry["rejected"])
        name, _, reason = rejects[-1]
        raise ValueError(
            f"not one of the {len(rejects) - 1} images of the bucket {size[0]} × {size[1]} is usable; the last: "
            f"{name}: {reason}"
        )


def _finish(batch: dict) -> dict[str, np.ndarray]:
    kept = ~batch.pop(_SPARE) if _SPARE in batch else slice(None)
    return {
        key: images.to_float(value[kept]) if key in ("image", "low_res") else value[kept]
        for key, value in batch.items()
        if key != REPLACED
    }

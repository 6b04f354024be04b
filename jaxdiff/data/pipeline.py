"""From any source of captioned pictures to numpy batches: the one Grain pipeline that all data goes through.

    source → shuffle → repeat → decode, resize, crop, join embeddings → this process's share → drop rejects → batch

The order of examples and every random crop are functions of the seed and the position alone, so an iterator that is
set to a saved state continues exactly, whatever the number of threads.
"""

import dataclasses
import functools
import re
import signal
import threading
import warnings
from collections import Counter
from typing import Any

import absl.flags
import grain
import numpy as np

from jaxdiff.core.errors import ProcessLostError
from jaxdiff.data import images
from jaxdiff.data.embeddings import Embeddings, digest
from jaxdiff.data.example import Source, cleaned

_SMALL = 4096
_ENDED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
"""What Grain says of a worker that a signal ended. One that ends itself has a bug."""
_REPLACED = "replaced"  # what was replaced in a caption, on its way to where it is counted


@dataclasses.dataclass(frozen=True)
class ReadAhead:
    """How the host reads ahead. Order and content of the batches do not depend on it.

    threads: decode in this many threads (Pillow releases the interpreter lock); 0 reads when asked.
    ahead: examples kept ready.
    workers: processes, each with those threads, for hosts where one process cannot keep up; 0 is none.
    """

    threads: int = 2
    ahead: int = 64
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the batches hold, and in which order. ValueError for sizes that do not fit together.

    resolution: side in pixels of the images; those that are not square lose the ends of their long side.
    batch: images per batch of this process.
    low_resolution: side of the same image shrunk, for super-resolution; the resolution is a multiple of it.
    crop: side of a random window of the image, a multiple of the factor between both resolutions.
    captions: the batches hold the captions.
    caption_optional: an example without a caption is used where captions or embeddings are asked for.
    strict: an example that would be skipped, or whose caption would be repaired, is a ValueError.
    shuffle, seed: a new order every epoch; the seed decides it and the windows.
    repeat: without end; otherwise one epoch, whose last batch may be short.
    """

    resolution: int
    batch: int
    low_resolution: int | None = None
    crop: int | None = None
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
        if self.crop is not None:
            if low is None:
                raise ValueError("crop is for super-resolution: give low_resolution too")
            factor = self.resolution // low
            if not factor <= self.crop <= self.resolution or self.crop % factor:
                raise ValueError(
                    f"crop {self.crop} must be a multiple of the factor {factor}, at most {self.resolution}"
                )


def image_batches(
    source: Source,
    config: DataConfig,
    embeddings: Embeddings | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    read_ahead: ReadAhead = ReadAhead(),
) -> "Batches":
    """Batches of images, `config.batch` of them from this process, as dicts of numpy arrays.

    image      float32 (b h w 3) in [-1, 1], h = w = `resolution`, or `crop` where one is given
    low_res    with `low_resolution`: float32 (b h/f w/f 3), f = resolution / low_resolution: the same image shrunk
               by `images.resize` (Pillow BICUBIC, antialiased) before both are cropped in the same random place
    text, text_mask   with `embeddings`: (b n d) float16 and (b n) bool, zero behind the mask
    caption, index    with `captions`: unicode strings (b,) and places in the source (b,), for the host's use

    An image that cannot be read, or (where `captions` or `embeddings` ask for it, unless `caption_optional`) one
    without a caption, is skipped: counted in `.skipped` and warned of in one line. A caption in which characters were
    replaced is used, but counted and warned of alike. Of `process_count` processes each gets a disjoint share; while
    it repeats, their batches one after the other are the batch that one process would get (until something is
    skipped). ValueError for an empty source, and for embeddings of another number of examples.
    """
    if not len(source):
        raise ValueError(f"{source}: no examples")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: the index must lie in 0…{process_count - 1}")
    if embeddings is not None and embeddings.count != len(source):
        raise ValueError(
            f"{embeddings.path}: holds {embeddings.count} embeddings for {len(source)} examples; store them again"
        )
    examples = _ordered(source, config).random_map(_Prepare(config, embeddings))
    # Crops are drawn before the share is taken, so that no two processes draw the same sequence of windows.
    if process_count > 1 and config.repeat:
        examples = _Share(examples, config.batch, process_index, process_count)
    elif process_count > 1:
        examples = examples[process_index::process_count]
    report = Skipped(len(source), config.strict)
    # The rejects are counted here, in the main process, whoever did the decoding.
    stream = _read(examples, read_ahead).filter(report.keep).batch(config.batch, drop_remainder=False).map(_finish)
    options = grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None)
    return Batches(grain.experimental.WithOptionsIterDataset(stream, options), report)


def _ordered(source: Source, config: DataConfig) -> grain.MapDataset:
    """The source's examples in the order in which they are used."""
    examples = grain.MapDataset.source(_Numbered(source)).seed(config.seed)
    if config.shuffle:
        examples = _ShuffleSmall(examples, config.seed) if len(source) < _SMALL else examples.shuffle()
    return examples.repeat() if config.repeat else examples


def _read(examples: grain.MapDataset, read_ahead: ReadAhead) -> grain.IterDataset:
    options = grain.ReadOptions(read_ahead.threads, read_ahead.ahead if read_ahead.threads else 0)
    stream = examples.to_iter_dataset(options)
    if not read_ahead.workers:
        return stream
    if not absl.flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, which only absl's own main parses
        absl.flags.FLAGS.mark_as_parsed()
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=read_ahead.workers, per_worker_buffer_size=8))


class Batches:
    """The iterator over batches: `next`, `get_state` and `set_state` (a small JSON-able dict), and what was skipped."""

    def __init__(self, stream: grain.IterDataset, skipped: "Skipped"):
        self._iterator = iter(stream)
        self.skipped = skipped

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. ProcessLostError where a worker process was killed."""
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
        """Where the next batch begins; examples that were only read ahead do not count as used."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly as the iterator that gave `state` did: same source, settings and number of workers."""
        try:
            self._iterator.set_state(state)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the saved place is another pipeline's (of other workers?): {error!r}") from error


class Skipped:
    """The examples left out since this iterator was made, each counted once: `reasons` holds how many of each kind.

    replaced: captions in which characters were replaced; those examples are used.
    """

    _LINES = 10

    def __init__(self, examples: int, strict: bool):
        self.reasons: Counter[str] = Counter()
        self.replaced = 0
        self._strict, self._examples = strict, examples
        self._names: set[str] = set()
        self._in_a_row = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def __str__(self) -> str:
        """`3 (2 unreadable, 1 no caption)`"""
        return f"{self.count} ({', '.join(f'{count} {kind}' for kind, count in self.reasons.most_common())})"

    def keep(self, example: dict) -> bool:
        """False for a reject, after counting it. Raises ValueError when strict, or when nothing else is left."""
        if "rejected" not in example:
            self._in_a_row = 0
            self._note(example[_REPLACED])
            return True
        name, kind, reason = example["rejected"]
        line = f"{name}: {reason}"
        if self._strict:
            raise ValueError(f"{line} (strict)")
        with self._lock:
            self._in_a_row += 1
            # Twice the source, as a usable example may come first in one order of it and last in the next: beyond, it
            # would never end.
            if self._in_a_row >= 2 * self._examples:
                raise ValueError(f"not one of the {self._examples} examples is usable; the last: {line}")
            if name not in self._names:
                self._names.add(name)
                self.reasons[kind] += 1
                self._warn(f"skipped {line}", self.count)
        return False

    def summary(self, total: int) -> str:
        """What was left out of `total` examples, or replaced, for people; empty where nothing was."""
        skipped = [f"skipped {self} of {total} examples"] if self.count else []
        return "; ".join(skipped + ([f"characters replaced in {self.replaced} captions"] if self.replaced else []))

    def _note(self, fault: str) -> None:
        if fault and self._strict:
            raise ValueError(f"{fault} (strict)")
        with self._lock:
            if fault and fault not in self._names:
                self._names.add(fault)
                self.replaced += 1
                self._warn(fault, self.replaced)

    def _warn(self, line: str, number: int) -> None:
        if number <= self._LINES:
            rest = "; further ones are only counted" if number == self._LINES else ""
            warnings.warn(f"{line}{rest}", stacklevel=2)


class _ShuffleSmall(grain.MapDataset):
    """A new permutation every epoch, held as a table: Grain's own, made for big sets, takes 0.5 ms an index on 64."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._examples, self._seed = parent, seed

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._examples[epoch * len(self) + _permutation(self._seed, epoch, len(self))[place]]


class _Share(grain.MapDataset):
    """Of every `batch` × `count` examples those of one process, so many in a row."""

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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """The source with each example's place in it; a file that cannot be opened becomes an example without picture."""

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
    """One example of a source → one entry of a batch (uint8 still, which is cheaper to pass on), or a reject."""

    config: DataConfig
    embeddings: Embeddings | None

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        if "rejected" in element:
            return element
        text, fault = cleaned(element["caption"], element.get("caption_fault"))
        caption = text or ""
        wanted = self.config.captions or self.embeddings is not None
        if wanted and not caption and not self.config.caption_optional:
            return {"rejected": (element["name"], "no caption", "no caption")}
        try:
            picture = images.resize(images.decode(element["image"]), self.config.resolution)
        except images.Unreadable as error:
            return {"rejected": (element["name"], "unreadable", str(error))}
        replaced = f"{element['name']}: {fault}" if wanted and fault is not None else ""
        return {
            **self._views(picture, rng),
            **self._text(element["name"], element["index"], caption),
            _REPLACED: replaced,
        }

    def _views(self, picture: np.ndarray, rng: np.random.Generator) -> dict:
        if self.config.low_resolution is None:
            return {"image": picture}
        low = images.resize(picture, self.config.low_resolution)
        if self.config.crop is not None:
            picture, low = images.aligned_crops(picture, low, self.config.crop, rng)
        return {"image": picture, "low_res": low}

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


def _finish(batch: dict) -> dict[str, np.ndarray]:
    return {
        key: images.to_float(value) if key in ("image", "low_res") else value
        for key, value in batch.items()
        if key != _REPLACED
    }

"""The stages of the input pipeline, as Grain has them: orders, shards, and the preparation of an example.

Apart from `pipeline.py`, because Grain takes a quarter of a second to import: commands that read no data do without.
"""

import dataclasses
import itertools
import sys

import absl.flags
import grain
import numpy as np

from jaxdiff.data import images
from jaxdiff.data.buckets import BucketPlan, Slot
from jaxdiff.data.embeddings import Embeddings, digest
from jaxdiff.data.example import Source, blocks_of, cleaned
from jaxdiff.data.mixture import MixtureOrder, MixtureSource
from jaxdiff.data.orders import SMALL, Order
from jaxdiff.data.pipeline import DataConfig, ReadAhead
from jaxdiff.data.skipped import REJECTS, REPLACED, Skipped

_SPARE = "spare"  # with buckets, in a single epoch: an example that only pads a batch and is removed from it


def stream_of(
    source: Source,
    config: DataConfig,
    embeddings: Embeddings | None,
    plan: BucketPlan | None,
    report: Skipped,
    process: tuple[int, int],
    read_ahead: ReadAhead,
) -> grain.IterDataset:
    """The batches of `pipeline.image_batches`. process: its index, and the number of processes."""
    index, count = process
    prepare = _Prepare(config, embeddings)
    if plan is None:
        examples = _ordered(source, config).random_map(prepare)
    else:
        examples = _Slots(plan).seed(config.seed).random_map(_PrepareInBucket(prepare, _Numbered(source), plan))
    # Crops are drawn before sharding, so that no two processes draw the same sequence of windows.
    if count > 1 and (config.repeat or plan is not None):
        examples = _Shard(examples, config.batch, index, count)
    elif count > 1:
        examples = examples[index::count]
    # Rejects are counted here, in the main process, even if workers decode.
    stream = _read(examples, read_ahead).filter(report.keep).batch(config.batch, drop_remainder=False).map(_finish)
    if plan is not None and not config.repeat and count == 1:
        # Drops a batch of which all examples were skipped
        stream = stream.filter(lambda batch: len(batch["image"]) > 0)
    options = grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None)
    return grain.experimental.WithOptionsIterDataset(stream, options)


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

"""Where captioned pictures come from: six sources, each a plain value, all opened into the same kind of sequence.

spec = parse("folder:photos")                      # once, at the command line
source = open(spec, 64, "train", "runs/data")      # what pipeline.images reads
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxdiff.data import emoji, folder, rainbow, records, shapes, tfds_sets
from jaxdiff.data.example import Source


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The embedded set: drawn on first use, `train` and `held_out` examples of it. Splits: train, held_out."""

    train: int = 20_000
    held_out: int = 1_000


@dataclasses.dataclass(frozen=True)
class Emoji:
    """Noto's artwork with its names, prepared beforehand by experiments.recipes.emoji_data (64, 256, 1024 pixels)."""


@dataclasses.dataclass(frozen=True)
class Rainbow:
    """The composition benchmark, 32 pixels a side, drawn on first use. Splits: train, test."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of pictures with `.txt` files beside them, or with a metadata.jsonl."""

    path: Path


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A TFDS name, such as `coco_captions` or `set/config:1.0.0`, or the folder of a prepared set."""

    name: str


@dataclasses.dataclass(frozen=True)
class Records:
    """What experiments.convert wrote: a folder of ArrayRecord files with a dataset.json."""

    path: Path


DataSpec = Shapes | Emoji | Rainbow | Folder | Tfds | Records

CHOICES = "shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"


def parse(text: str) -> DataSpec:
    """One of CHOICES → its dataclass; ValueError for anything else."""
    kind, colon, rest = text.partition(":")
    plain = {"shapes": Shapes, "emoji": Emoji, "rainbow": Rainbow}
    if kind in plain and not colon:
        return plain[kind]()
    with_path: dict[str, Callable[[str], DataSpec]] = {
        "folder": lambda path: Folder(Path(path)),
        "tfds": Tfds,
        "records": lambda path: Records(Path(path)),
    }
    if kind in with_path and rest:
        return with_path[kind](rest)
    raise ValueError(f"--data {text!r} is not one of: {CHOICES}")


def open(spec: DataSpec, resolution: int, split: str, data_dir: Path | str) -> Source:
    """The examples of one split. `resolution` picks the stored size of sets that are drawn (shapes, emoji); `data_dir`
    is where prepared sets live. An unknown split or a set that is not there is an error that says what to do.
    """
    if not isinstance(spec, Shapes | Rainbow | Tfds) and split != "train":
        raise ValueError(f"{describe(spec)} has only the split 'train', not {split!r}")
    match spec:
        case Shapes(train, held_out):
            return tfds_sets.Captioned(shapes.prepare(resolution, data_dir, train=train, held_out=held_out), split)
        case Emoji():
            return tfds_sets.Captioned(emoji.prepared(resolution, data_dir), split)
        case Rainbow():
            return tfds_sets.Captioned(rainbow.prepare(data_dir), split)
        case Folder(path):
            return folder.read(path)
        case Tfds(name):
            return tfds_sets.Captioned(tfds_sets.builder(name, data_dir), split)
        case Records(path):
            return records.read(path)


def describe(spec: DataSpec) -> str:
    """The command-line form of a spec: the inverse of `parse` (sizes of the shapes set aside)."""
    match spec:
        case Folder(path) | Records(path):
            return f"{_KIND[type(spec)]}:{path}"
        case Tfds(name):
            return f"tfds:{name}"
    return _KIND[type(spec)]


_KIND = {Shapes: "shapes", Emoji: "emoji", Rainbow: "rainbow", Folder: "folder", Tfds: "tfds", Records: "records"}

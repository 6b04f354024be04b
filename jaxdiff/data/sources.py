"""The seven sources of captioned images as plain values, which `open` turns into sequences of examples.

spec = parse("folder:photos")                      # once, at the command line
spec = parse_several(["hf:mine", "shapes"], [3, 1])
source = open(spec, 64, "train", "runs/data")      # the input of pipeline.image_batches
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdiff.data import folder, hugging_face, records
from jaxdiff.data.columns import ColumnNames
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import MixtureSource, check_weights


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The synthetic dataset, rasterised on first use. train, held_out: sizes of the splits of these names."""

    train: int = 20_000
    held_out: int = 1_000


@dataclasses.dataclass(frozen=True)
class Emoji:
    """Noto's artwork with its names, prepared beforehand by experiments.recipes.emoji_data (64, 256, 1024 pixels)."""


@dataclasses.dataclass(frozen=True)
class Rainbow:
    """The composition benchmark, 32 pixels a side, rasterised on first use. Splits: train, test."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of images with `.txt` files beside them, or with a metadata.jsonl."""

    path: Path


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A TFDS name, such as `coco_captions` or `dataset/config:1.0.0`, or the folder of a prepared dataset."""

    name: str


@dataclasses.dataclass(frozen=True)
class Records:
    """The output of experiments.convert: a folder of ArrayRecord files with a dataset.json."""

    path: Path


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A dataset downloaded from the Hugging Face hub: an imagefolder with metadata, or Parquet files with images.
    Splits: those of the dataset.

    image_column, caption_column: None: selected by usual names, with a note. caption_column "": no captions.
    """

    path: Path
    image_column: str | None = None
    caption_column: str | None = None


Single = Shapes | Emoji | Rainbow | Folder | Tfds | Records | HuggingFace


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several weighted sources (`mixture.py`); weights None: by the number of examples. ValueError for fewer than two
    sources, a duplicate source, and invalid weights."""

    specs: tuple[Single, ...]
    weights: tuple[float | int, ...] | None = None

    def __post_init__(self):
        if len(self.specs) < 2:
            raise ValueError("a mixture needs at least two sources")
        twice = next((spec for number, spec in enumerate(self.specs) if spec in self.specs[:number]), None)
        if twice is not None:
            raise ValueError(f"{describe(twice)} is named twice: name it once, with a larger weight")
        check_weights(self.weights, len(self.specs))


DataSpec = Single | Mixture

CHOICES = "shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH"


def parse_several(texts: Sequence[str], weights: Sequence[float | int] | None = None) -> DataSpec:
    """Parse `--data` and `--data-weights`: one text to its source, several to a `Mixture`. ValueError for no text, one
    that is not among CHOICES, a duplicate, and weights that are not one positive number per source."""
    if not texts:
        raise ValueError(f"--data names no source; it is one or more of: {CHOICES}")
    specs = tuple(parse(text) for text in texts)
    if weights is not None:
        try:
            check_weights(weights, len(specs))
        except ValueError as error:
            raise ValueError(f"--data-weights: {error}") from None
    return specs[0] if len(specs) == 1 else Mixture(specs, None if weights is None else tuple(weights))


def changed(spec: DataSpec, change: Callable[[Single], Single]) -> DataSpec:
    """The spec with `change` applied to its source, or to each source of a mixture."""
    if isinstance(spec, Mixture):
        return Mixture(tuple(change(each) for each in spec.specs), spec.weights)
    return change(spec)


def parse(text: str) -> Single:
    """One of CHOICES → its dataclass; ValueError for anything else."""
    kind, colon, rest = text.partition(":")
    plain = {"shapes": Shapes, "emoji": Emoji, "rainbow": Rainbow}
    if kind in plain and not colon:
        return plain[kind]()
    with_path: dict[str, Callable[[str], Single]] = {
        "folder": lambda path: Folder(Path(path)),
        "hf": lambda path: HuggingFace(Path(path)),
        "tfds": Tfds,
        "records": lambda path: Records(Path(path)),
    }
    if kind in with_path and rest:
        return with_path[kind](rest)
    own = f"; for this folder: folder:{text}" if Path(text).is_dir() else ""
    raise ValueError(f"--data {text!r} is not one of: {CHOICES}{own}")


def open(spec: DataSpec, resolution: int, split: str, data_dir: Path | str) -> Source:
    """The examples of one split. resolution: the stored size of rasterised datasets (shapes, emoji). data_dir: the
    folder of prepared datasets. An unknown split or a missing dataset is an error that says what to do.
    """
    if isinstance(spec, Mixture):
        sources = tuple(open(each, resolution, split, data_dir) for each in spec.specs)
        return MixtureSource(sources, spec.weights)
    if not isinstance(spec, Shapes | Rainbow | Tfds | HuggingFace) and split != "train":
        raise ValueError(f"{describe(spec)} has only the split 'train', not {split!r}")
    match spec:
        case Folder(path):
            return folder.read(path)
        case HuggingFace(path, image, caption):
            return hugging_face.read(path, split, ColumnNames(image, caption))
        case Records(path):
            return records.read(path)
        case _:
            return _of_tfds(spec, resolution, split, data_dir)


def _of_tfds(spec: Shapes | Emoji | Rainbow | Tfds, resolution: int, split: str, data_dir: Path | str) -> Source:
    # Imported here, because TFDS takes a third of a second, and commands that read no dataset do without it.
    from jaxdiff.data import emoji, rainbow, shapes, tfds_sets

    match spec:
        case Shapes(train, held_out):
            prepare = shapes.prepare_held_out if split == "held_out" else shapes.prepare
            builder = prepare(resolution, data_dir, train=train, held_out=held_out)
        case Emoji():
            builder = emoji.prepared(resolution, data_dir)
        case Rainbow():
            builder = rainbow.prepare(data_dir)
        case Tfds(name):
            builder = tfds_sets.builder(name, data_dir)
    return tfds_sets.Captioned(builder, split)


def describe(spec: DataSpec) -> str:
    """The command-line form of a spec: the inverse of `parse`, without the sizes of shapes and column names; for a
    mixture, its sources and weights."""
    match spec:
        case Mixture(specs, weights):
            shown = "" if weights is None else f" with weights {' '.join(f'{weight:g}' for weight in weights)}"
            return " ".join(map(describe, specs)) + shown
        case HuggingFace(path):
            return f"hf:{path}"
        case Folder(path) | Records(path):
            return f"{_KIND[type(spec)]}:{path}"
        case Tfds(name):
            return f"tfds:{name}"
    return _KIND[type(spec)]


_KIND: dict[type, str] = {Shapes: "shapes", Emoji: "emoji", Rainbow: "rainbow", Folder: "folder", Records: "records"}

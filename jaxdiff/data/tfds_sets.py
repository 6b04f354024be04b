"""Any TFDS dataset with an image and a text, with random access to ArrayRecord and without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import tensorflow_datasets as tfds

from jaxdiff.data import captions, parts
from jaxdiff.data.array_records import full_disk_is_an_os_error
from jaxdiff.data.example import Example

# If a dataset has several texts, the first of these names is the caption.
_PREFERRED = ("caption", "captions", "text", "prompt", "description")


@dataclasses.dataclass(frozen=True)
class Captioned:
    """One split of a prepared TFDS builder. The image and the caption are selected by feature type.

    Only the first of several captions is used. ValueError if the features lack an image or a text, for an unknown
    split, and for files without random access.
    """

    builder: tfds.core.DatasetBuilder
    split: str

    def __post_init__(self):
        splits = list(self.builder.info.splits)
        if self.split.partition("[")[0] not in splits:
            raise ValueError(f"{self.builder.name} has no split {self.split!r}, only {', '.join(splits) or 'none'}")
        _ = self._paths, self._records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise parts.named(
                error, *self._where(index), "delete the dataset's folder, so that it is prepared again"
            ) from error
        image_path, caption_path = self._paths
        caption = _first(_at(record, caption_path))
        caption, fault = captions.clean(captions.decode(caption) if isinstance(caption, bytes) else caption)
        return {
            "image": _at(record, image_path),
            "caption": caption,
            "name": f"{self.builder.name}/{self.split}[{index}]",
            "caption_fault": fault,
        }

    def _where(self, index: int) -> tuple[str, int]:
        """The file of an example, and its index in the file."""
        for part in self.builder.info.splits[self.split].file_instructions:
            if index < part.take:
                return str(part.filename), part.skip + index
            index -= part.take
        raise IndexError(f"{self.builder.name}/{self.split} has {len(self)} examples")

    @functools.cached_property
    def _paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return caption_features(self.builder.info.features, self.builder.name)

    @functools.cached_property
    def _records(self):
        image_path, _ = self._paths
        decoders = functools.reduce(lambda inner, key: {key: inner}, reversed(image_path), tfds.decode.SkipDecoding())
        try:
            return self.builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:  # tfrecord files allow sequential reads only
            raise ValueError(
                f"{self.builder.name}: its files allow no random access; prepare it with file_format='array_record'"
            ) from error


def builder(name: str, data_dir: Path | str) -> tfds.core.DatasetBuilder:
    """The builder of a TFDS name, prepared (and downloaded if necessary) below `data_dir`.

    `name` may also be the folder of a prepared dataset. A dataset already prepared in TFDS's default folder
    (`~/tensorflow_datasets`) is read from there. Preparing most datasets needs TensorFlow; reading does not.
    """
    if (Path(name) / "dataset_info.json").is_file():
        return tfds.builder_from_directory(name)
    ours = Path(data_dir) / name.partition("/")[0].partition(":")[0]
    try:
        dataset = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        if not ours.is_dir():
            default = tfds.builder(name, file_format="array_record")
            dataset = default if default.is_prepared() else dataset
        if not dataset.is_prepared():
            caption_features(dataset.info.features, name)  # checked before the download
            with full_disk_is_an_os_error(data_dir):
                dataset.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{name}: TFDS knows no dataset of that name, and no prepared one is there") from error
    except ImportError as error:
        raise ValueError(f"tfds:{name}: preparing it once needs a package: {error}") from error
    except AssertionError as error:  # TFDS's error for a missing version or manual download
        raise ValueError(f"tfds:{name}: {error}") from error
    return dataset


def caption_features(features: tfds.features.FeatureConnector, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The feature paths of the image and the caption. ValueError, listing the features, if one is missing."""
    leaves = list(_leaves(features))
    images = [path for path, feature in leaves if isinstance(feature, tfds.features.Image) and len(path) == 1]
    texts = [path for path, feature in leaves if isinstance(feature, tfds.features.Text)]
    listed = ", ".join(f"{'.'.join(path)} ({type(feature).__name__})" for path, feature in leaves)
    if not images:
        raise ValueError(f"tfds:{name}: no image among its features: {listed}")
    if not texts:
        raise ValueError(f"tfds:{name}: no text among its features, so no captions: {listed}")
    return images[0], min(texts, key=_rank)


def _rank(path: tuple[str, ...]) -> int:
    return min((_PREFERRED.index(key) for key in path if key in _PREFERRED), default=len(_PREFERRED))


def _leaves(feature: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(feature, tfds.features.Sequence):  # TFDS reads a sequence of dicts as a dict of sequences
        yield from _leaves(feature.feature, path)
    else:
        yield path, feature


def _at(record: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path, record)


def _first(value: Any) -> Any:
    while not isinstance(value, bytes | str):
        if not len(value):
            return None
        value = value[0]
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress TFDS's nested progress bars and its messages about paths and custom configurations, for builders with a
    progress bar of their own."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        absl.logging.set_verbosity(verbosity)

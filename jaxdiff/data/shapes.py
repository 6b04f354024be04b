"""`shapes`, the synthetic dataset: a TFDS builder that rasterises its images, so nothing is downloaded.

    builder = shapes.prepare(64, "data", train=20_000)
    source = builder.as_data_source("train")        # random access, decoded on demand; no TensorFlow

Example i of a split is `scene(split, i)` with `caption(scene, split, i)`, whatever the resolution, so the same index at
64, 256 and 1024 pixels is the same image.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from jaxdiff.data.array_records import full_disk_is_an_os_error
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import Split, scene
from jaxdiff.data.tfds_sets import quiet

RESOLUTIONS = range(32, 1025)


def prepare(
    resolution: int, data_dir: str | Path, train: int = 20_000, held_out: int = 1_000, progress: bool = True
) -> "Shapes":
    """The builder; its records are written below `data_dir` unless they exist.

    TFDS writes into a temporary folder and renames it at the end: a prepared dataset is complete.
    """
    with quiet():
        builder = _builder(ShapesConfig(resolution=resolution, train=train, held_out=held_out), data_dir)
        builder.progress = progress
        with full_disk_is_an_os_error(data_dir):
            builder.download_and_prepare()  # does nothing if the dataset is prepared
    return builder


def prepare_held_out(resolution: int, data_dir: str | Path, train: int = 20_000, held_out: int = 1_000) -> "Shapes":
    """`prepare` for its held-out split: without training images, unless the whole dataset is there already."""
    with quiet():
        whole = _builder(ShapesConfig(resolution=resolution, train=train, held_out=held_out), data_dir)
        prepared = whole.is_prepared()
    return prepare(resolution, data_dir, train if prepared else 1, held_out)


def _builder(config: "ShapesConfig", data_dir: str | Path) -> "Shapes":
    # TFDS requires listed configurations by name, and rejects another one of the same name.
    listed = config.name in [other.name for other in Shapes.BUILDER_CONFIGS]
    return Shapes(config=config.name if listed else config, data_dir=str(data_dir), file_format="array_record")


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """`resolution`: pixels a side, 32 to 1024; `train`, `held_out`: the number of examples in each split."""

    name: str = ""  # from the other fields
    resolution: int = 64
    train: int = 20_000
    held_out: int = 1_000

    def __post_init__(self):
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"shapes: resolution {self.resolution} is outside 32 to 1024")
        for split in ("train", "held_out"):
            if getattr(self, split) < 1:
                raise ValueError(f"shapes: {split} needs at least 1 example, not {getattr(self, split)}")
        self.name = f"{self.resolution}px_{self.train}_{self.held_out}"


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Anti-aliased coloured objects with captions; each example includes its exact attributes."""

    VERSION = tfds.core.Version("1.0.0")
    progress = True  # whether writing shows a bar
    BUILDER_CONFIGS = [ShapesConfig()]  # noqa: RUF012 (the name that TFDS reads)

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.resolution
        features = {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "index": np.int64,
            "objects": np.int64,  # how many: 1 or 2
            "background": tfds.features.Text(),
            "scene": tfds.features.Text(),  # JSON of Scene.as_dict: every attribute of every object
            "stated": tfds.features.Text(),  # JSON of Stated.as_dict: the attributes stated by the caption
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train),
            "held_out": self._generate_examples("held_out", config.held_out),
        }

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        name = f"shapes {config.resolution} px, {split}"
        for index in tqdm(range(count), desc=name, unit="image", disable=not self.progress):
            yield index, example(split, index, config.resolution)


def example(split: Split, index: int, resolution: int) -> dict:
    """One example as the builder stores it, the image as an open file of PNG bytes."""
    s = scene(split, index)
    c = caption(s, split, index)
    png = io.BytesIO()
    Image.fromarray(draw(s, resolution)).save(png, format="png", compress_level=1)
    png.seek(0)
    return {
        "image": png,
        "caption": c.text,
        "index": index,
        "objects": len(s.objects),
        "background": s.background,
        "scene": json.dumps(s.as_dict()),
        "stated": json.dumps(c.stated.as_dict()),
    }

"""Retrieval by a CLIP: images by captions, and captions by images.

    python -m experiments.evaluate retrieval --clip runs/clip/model --n 100
    python -m experiments.evaluate retrieval --clip openai/clip-vit-base-patch32 --data folder:photos

R@1, 5 and 10 in both directions among n images and their captions; for `shapes`, the first n held-out examples whose
captions do not describe each other's images. Seconds for the shipped CLIP.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.data import images, sources
from jaxdiff.data.example import Example, caption_of
from jaxdiff.data.shapes_caption import distinct_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.evaluation.features import Extractor, all_features, clip_image, pooled_text
from jaxdiff.evaluation.retrieval import retrieval
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import clip as weights
from jaxdiff.weights.imagen import SHIPPED


@dataclasses.dataclass(frozen=True)
class CLIPData:
    """A CLIP and the dataset of its evaluation."""

    clip: str = str(SHIPPED / "clip")
    """The CLIP: OUT/model of a training run, or a directory or hub id in the transformers layout. Default: the shipped
    CLIP of `shapes`."""
    data: str = "shapes"
    """shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH"""
    split: str | None = None
    """Split of the dataset; default: the held-out images of shapes, the train split of other datasets."""
    batch: int = 64
    """Images per batch."""
    json: Path | None = None
    """Write the scores to this file."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""

    def load(self) -> tuple[sources.DataSpec, TextEncoder, Extractor]:
        """The dataset and both towers. ValueError for bad settings, before anything is loaded."""
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: at least one image")
        spec = sources.parse(self.data)
        if self.json is not None:
            usable_file(self.json)
        return spec, weights.load_text_encoder(self.clip), clip_image(*weights.load_image(self.clip))

    def report(self, scores: Mapping[str, float], image: Extractor, provenance: dict) -> None:
        for name, value in scores.items():
            print(f"{name:28} {value:.4g}")
        if self.json is not None:
            own = {"data": self.data, "split": self.split, **provenance, "clip": str(image), "weights": self.clip}
            write_json(self.json, {**scores, "made_by": own})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of retrieval."""

    n: int = 100
    """Number of pairs, from the first."""
    on: CLIPData = CLIPData()


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """Retrieval by a CLIP: images by captions, captions by images."""
    if settings.n < 1:
        raise ValueError(f"--n {settings.n}: at least one pair")
    spec, text, image = settings.on.load()
    settings.on.report(_scores(settings, spec, text, image), image, {"n": settings.n})


def _scores(settings: Settings, spec: sources.DataSpec, text: TextEncoder, image: Extractor) -> dict[str, float]:
    on = settings.on
    if isinstance(spec, sources.Shapes):
        scenes, captions = zip(*distinct_examples(settings.n))
        shown, texts = (draw(scene, image.side) for scene in scenes), [caption.text for caption in captions]
    else:
        source = sources.open(spec, image.side, on.split or "train", on.data_dir)
        examples = [source[i] for i in range(min(settings.n, len(source)))]
        texts = [caption_of(example) for example in examples]
        if None in texts:
            raise ValueError(f"{examples[texts.index(None)]['name']}: has no caption, which retrieval needs")
        shown = map(decoded, examples)
    seen = all_features(image, with_bar(shown, len(texts)), on.batch)
    recall = retrieval(pooled_text(text, texts), seen)
    by_text = {f"images by caption, R@{k}": fraction for k, fraction in recall.image.items()}
    return by_text | {f"captions by image, R@{k}": fraction for k, fraction in recall.text.items()}


def decoded(example: Example) -> np.ndarray:
    """Decode an image. ValueError naming an unreadable one."""
    try:
        return images.decode(example["image"])
    except images.Unreadable as error:
        raise ValueError(f"{example['name']}: {error}") from error


def with_bar(shown: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    yield from tqdm(shown, total=count, desc="embed images", unit="image")

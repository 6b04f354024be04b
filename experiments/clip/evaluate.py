"""Judge a CLIP: does it find pictures by captions and captions by pictures, and name what it was not trained to name?

    python -m experiments.clip.evaluate --weights runs/clip/model --n 100
    python -m experiments.clip.evaluate --weights runs/clip/model --label colour --prompts "a {} shape" "{}"
    python -m experiments.clip.evaluate --weights openai/clip-vit-base-patch32 --data tfds:cifar10 --split test \\
        --label label --n 0

Retrieval: R@1, 5 and 10 both ways among n pictures and their captions; of `shapes` the first n held-out ones of which
no caption describes the picture of another. Zero-shot classification (`--label`): the classes of a TFDS set's feature,
or of an attribute of `shapes` (kind | colour | background | fill | size) in pictures of one object, told apart by the
mean of their prompts' embeddings. Seconds for the tiny one.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from experiments.cli import run
from experiments.judging import embedded
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.data import images, sources, tfds_sets
from jaxdiff.data.example import Example, caption_of
from jaxdiff.data.shapes_caption import distinct_examples, held_out_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, FILLS, KINDS, SIZES
from jaxdiff.evaluation.features import Extractor, all_features, clip_image
from jaxdiff.evaluation.retrieval import retrieval, zero_shot
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import clip as weights

OF_SHAPES = {"kind": KINDS, "colour": COLOURS, "background": BACKGROUNDS, "fill": FILLS, "size": SIZES}


@dataclasses.dataclass(frozen=True)
class Run:
    """What to judge, and on what."""

    weights: str
    """The CLIP: OUT/model of a training run, or a directory or hub id in the transformers layout."""
    data: str = "shapes"
    """shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"""
    split: str | None = None
    """Left out: the held-out pictures of shapes, the train split of other sets."""
    n: int = 100
    """Pairs for retrieval, from the first; 0: none."""
    label: str | None = None
    """What is classified without training: a class feature of a TFDS set, or an attribute of shapes."""
    label_n: int = 500
    """Pictures to classify."""
    prompts: tuple[str, ...] = ("a {}", "a picture of a {}", "there is a {}")
    """Captions of a class, {} standing for its name."""
    batch: int = 64
    """Pictures at once."""
    json: Path | None = None
    """A file for the scores."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Run) -> None:
    """Judge a CLIP by retrieval and zero-shot classification."""
    if min(settings.n, settings.label_n) < 0 or settings.batch < 1:
        raise ValueError("--n and --label-n cannot be negative, a --batch not empty")
    if not settings.n and settings.label is None:
        raise ValueError("nothing to judge: --n 0 and no --label")
    if any("{}" not in prompt for prompt in settings.prompts) or not settings.prompts:
        raise ValueError("--prompts: each has {} where the class's name goes")
    spec = sources.parse(settings.data)
    if settings.json is not None:
        usable_file(settings.json)
    text = weights.load_text_encoder(settings.weights)
    image = clip_image(*weights.load_image(settings.weights))
    scores: dict[str, float] = {}
    if settings.n:
        scores |= _retrieval(settings, spec, text, image)
    if settings.label is not None:
        scores |= _zero_shot(settings, spec, text, image)
    for name, value in scores.items():
        print(f"{name:28} {value:.4g}")
    if settings.json is not None:
        made_by = {name: getattr(settings, name) for name in ("data", "split", "n", "label", "label_n", "prompts")}
        made_by |= {"clip": str(image), "weights": str(settings.weights)}
        write_json(settings.json, {**scores, "made_by": made_by})


def _retrieval(settings: Run, spec: sources.DataSpec, text: TextEncoder, image: Extractor) -> dict[str, float]:
    if isinstance(spec, sources.Shapes):
        scenes, captions = zip(*distinct_examples(settings.n))
        shown, texts = (draw(scene, image.side) for scene in scenes), [caption.text for caption in captions]
    else:
        source = sources.open(spec, image.side, settings.split or "train", settings.data_dir)
        examples = [source[i] for i in range(min(settings.n, len(source)))]
        texts = [caption_of(example) for example in examples]
        if None in texts:
            raise ValueError(f"{examples[texts.index(None)]['name']}: has no caption, which retrieval needs")
        shown = map(_decoded, examples)
    seen = all_features(image, _shown(shown, len(texts)), settings.batch)
    found = retrieval(embedded(text, texts), seen)
    by_text = {f"pictures by caption, R@{k}": share for k, share in found.image.items()}
    return by_text | {f"captions by picture, R@{k}": share for k, share in found.text.items()}


def _zero_shot(settings: Run, spec: sources.DataSpec, text: TextEncoder, image: Extractor) -> dict[str, float]:
    names, shown, labels = _labelled(settings, spec, image.side)
    prompts = [prompt.replace("{}", name) for name in names for prompt in settings.prompts]
    classes = embedded(text, prompts).reshape(len(names), len(settings.prompts), -1)
    seen = all_features(image, _shown(shown, len(labels)), settings.batch)
    return {f"{settings.label}, of {len(names)} classes": float((zero_shot(seen, classes) == labels).mean())}


def _labelled(settings: Run, spec: sources.DataSpec, side: int) -> tuple[list[str], Iterator[np.ndarray], np.ndarray]:
    """Names of the classes, pictures, and the class of each."""
    wanted, count = settings.label, settings.label_n
    if isinstance(spec, sources.Shapes):
        if wanted not in OF_SHAPES:
            raise ValueError(f"--label {wanted}: shapes has {', '.join(OF_SHAPES)}")
        names = list(OF_SHAPES[wanted])
        scenes = [scene for scene, _ in held_out_examples(count)]
        values = [s.background if wanted == "background" else getattr(s.objects[0], wanted) for s in scenes]
        return names, (draw(scene, side) for scene in scenes), np.array([names.index(value) for value in values])
    source = sources.open(spec, side, settings.split or "train", settings.data_dir)
    features = source.builder.info.features if isinstance(source, tfds_sets.Captioned) else {}
    classes = {name: feature for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)}
    if wanted not in classes:
        raise ValueError(f"--label {wanted}: {settings.data} has {', '.join(classes) or 'no classes'}")
    count = min(count, len(source))
    records = source.builder.as_data_source(source.split)
    labels = np.array([records[i][wanted] for i in range(count)])
    return classes[wanted].names, (_decoded(source[i]) for i in range(count)), labels


def _decoded(example: Example) -> np.ndarray:
    try:
        return images.decode(example["image"])
    except images.Unreadable as error:
        raise ValueError(f"{example['name']}: {error}") from error


def _shown(shown: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    yield from tqdm(shown, total=count, desc="embed pictures", unit="picture")


if __name__ == "__main__":
    run(main)

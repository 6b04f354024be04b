"""Zero-shot classification by a CLIP.

    python -m experiments.evaluate zero-shot --label colour --prompts "a {} shape" "{}"
    python -m experiments.evaluate zero-shot --clip openai/clip-vit-base-patch32 --data tfds:cifar10 --split test \\
        --label label

Classes are those of a class feature of a TFDS dataset, or of an attribute of `shapes` (kind | colour | background |
fill | size) in images of one object. A class is represented by the mean embedding of its prompts. Seconds for the
shipped CLIP.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from experiments.evaluations.retrieval import CLIPData, decoded, with_bar
from experiments.tasks.task import Task
from jaxdiff.data import sources
from jaxdiff.data.shapes_caption import held_out_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, FILLS, KINDS, SIZES
from jaxdiff.evaluation.features import Extractor, all_features, pooled_text
from jaxdiff.evaluation.retrieval import zero_shot
from jaxdiff.text.encoder import TextEncoder

OF_SHAPES = {"kind": KINDS, "colour": COLOURS, "background": BACKGROUNDS, "fill": FILLS, "size": SIZES}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Labels and prompts."""

    label: str = "kind"
    """The label to classify: a class feature of a TFDS dataset, or an attribute of shapes."""
    n: int = 500
    """Images to classify."""
    prompts: tuple[str, ...] = ("a {}", "a picture of a {}", "there is a {}")
    """Prompts of a class, with {} for its name."""
    on: CLIPData = CLIPData()


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """Zero-shot classification by a CLIP."""
    if settings.n < 1:
        raise ValueError(f"--n {settings.n}: at least one image")
    if any("{}" not in prompt for prompt in settings.prompts) or not settings.prompts:
        raise ValueError("--prompts: each needs {} for the class's name")
    spec, text, image = settings.on.load()
    provenance = {"label": settings.label, "n": settings.n, "prompts": settings.prompts}
    settings.on.report(_scores(settings, spec, text, image), image, provenance)


def _scores(settings: Settings, spec: sources.DataSpec, text: TextEncoder, image: Extractor) -> dict[str, float]:
    names, shown, labels = _labelled(settings, spec, image.side)
    prompts = [prompt.replace("{}", name) for name in names for prompt in settings.prompts]
    classes = pooled_text(text, prompts).reshape(len(names), len(settings.prompts), -1)
    seen = all_features(image, with_bar(shown, len(labels)), settings.on.batch)
    return {f"{settings.label}, of {len(names)} classes": float((zero_shot(seen, classes) == labels).mean())}


def _labelled(
    settings: Settings, spec: sources.DataSpec, side: int
) -> tuple[list[str], Iterator[np.ndarray], np.ndarray]:
    """Class names, images, and the class of each image."""
    wanted, count = settings.label, settings.n
    if isinstance(spec, sources.Shapes):
        if wanted not in OF_SHAPES:
            raise ValueError(f"--label {wanted}: shapes has {', '.join(OF_SHAPES)}")
        names = list(OF_SHAPES[wanted])
        scenes = [scene for scene, _ in held_out_examples(count)]
        values = [s.background if wanted == "background" else getattr(s.objects[0], wanted) for s in scenes]
        return names, (draw(scene, side) for scene in scenes), np.array([names.index(value) for value in values])
    import tensorflow_datasets as tfds  # imported here, because it takes a third of a second

    from jaxdiff.data import tfds_sets

    source = sources.open(spec, side, settings.on.split or "train", settings.on.data_dir)
    features = source.builder.info.features if isinstance(source, tfds_sets.Captioned) else {}
    classes = {name: feature for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)}
    if wanted not in classes:
        raise ValueError(f"--label {wanted}: {settings.on.data} has {', '.join(classes) or 'no classes'}")
    count = min(count, len(source))
    records = source.builder.as_data_source(source.split)
    labels = np.array([records[i][wanted] for i in range(count)])
    return classes[wanted].names, (decoded(source[i]) for i in range(count)), labels

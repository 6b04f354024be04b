"""What the recipes that compare systems have in common: costs, scores on held-out captions of `shapes`, sheets."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from experiments.evaluations.attributes import attribute_scores
from experiments.options.metric_networks import MetricNetworks, loaded
from experiments.tasks.task import Task
from jaxdiff.data import grids, shapes
from jaxdiff.data.images import to_uint8
from jaxdiff.data.shapes_caption import held_out_captions, held_out_examples
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.features import Extractor, all_features
from jaxdiff.evaluation.fid import distance
from jaxdiff.evaluation.statistics import add, empty
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.training.plan import network_flops, training_flops
from jaxdiff.training.state import abstract_params

T = TypeVar("T")


Rows = Mapping[str, Callable[[dict[str, Any]], str]]
"""The rows of a table: how each is written from the scores of a system."""
SCORES: Rows = {
    "one object, of all captions right": lambda s: f"{s['one_object']:.0%}",
    "two objects": lambda s: f"{s['two_objects']:.0%}",
    "FD-shapes": lambda s: f"{s['frechet_classifier-shapes']:.2f}",
    "FD-clip": lambda s: f"{s['frechet_clip']:.1f}",
    "CLIP score": lambda s: f"{s['clip_score']:.2f}",
    "seconds an image": lambda s: f"{s['seconds_an_image']:.3f}",
}
"""Those of `measured`."""


def columns(scores: Mapping[str, dict[str, Any]], rows: Rows) -> str:
    """A table with a column for each system, in Markdown."""
    lines = [f"| | {' | '.join(scores)} |", f"|---{'|---' * len(scores)}|"]
    return "\n".join([*lines, *(f"| {row} | {' | '.join(map(cell, scores.values()))} |" for row, cell in rows.items())])


def count_of(model: Any) -> int:
    """Parameters of a trainable model."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))


def flops_of(model: Any) -> float:
    """FLOPs of training on one image of its side; a transformer of codes has none."""
    return training_flops(model, model.batch_spec(1, getattr(model, "side", 0)))


def inference_flops(task: Task, preset: str, model: Any) -> float:
    """FLOPs of one sampling step of one image, or of its decoding."""
    inference = task.inference(preset, model, 1)
    assert inference is not None
    used = jax.eval_shape(inference.used, abstract_params(model), task.frozen(model))
    return network_flops(inference.function, used, *inference.given)


def nearest(
    sized: Callable[[int], T], widths: Sequence[int], parameters: int, model_of: Callable[[T], Any] = lambda each: each
) -> T:
    """`sized` of the width whose model has the nearest number of parameters. widths: ascending."""

    def count(width: int) -> int:
        return count_of(model_of(sized(width)))

    place = bisect_left(widths, parameters, key=count)
    around = widths[max(0, place - 1) : place + 1]
    return sized(min(around, key=lambda width: abs(count(width) - parameters)))


def check_distances(count: int) -> None:
    """ValueError, before anything is trained, for too few images for a Fréchet distance."""
    widest = max(extractor.width for extractor in loaded(MetricNetworks()).extractors)
    if count <= widest:
        raise ValueError(f"--frechet {count}: more than {widest}, the number of features")


def measured(pipeline: Pipeline, n: int, distances: int) -> dict[str, Any]:
    """Accuracies of `n` captions of one and of two objects, seconds an image, and the Fréchet distances and CLIP score
    of `distances` captions of one object."""
    captions = {objects: held_out_captions(n, objects) for objects in (1, 2)}
    side = pipeline.sides[-1]
    attribute_scores(pipeline, {1: captions[1][:16]}, seed=1, batch=16)  # compile
    scores = attribute_scores(pipeline, captions, seed=0, batch=16)
    result = {
        "one_object": scores[f"attribute_accuracy_{side}"],
        "two_objects": scores[f"attribute_accuracy_{side}_two_objects"],
        "attributes": scores[f"attributes_{side}"],
        "seconds_an_image": scores["seconds_per_image"],
    }
    scenes, texts = zip(*held_out_examples(distances, 1))
    words = [text.text for text in texts]
    true = np.stack([shapes.draw(scene, side) for scene in scenes])
    sampled = to_uint8(pipeline.sample(words, SampleOptions(seed=2, batch=16))[-1])
    networks = loaded(MetricNetworks())
    for extractor in networks.extractors:
        result[f"frechet_{extractor.name}"] = frechet(extractor, true, sampled)
    if networks.clip is not None and networks.text is not None:
        result["clip_score"] = clip_score(
            np.asarray(networks.text.encode(words).pooled), all_features(networks.clip, sampled)
        ).score
    return result


def frechet(extractor: Extractor, true: np.ndarray, sampled: np.ndarray) -> float:
    """The Fréchet distance of two sets of images (n h w 3, uint8)."""
    first, second = (add(empty(extractor.width), all_features(extractor, each)) for each in (true, sampled))
    return distance(first, second)


def show(path: Path, systems: Mapping[str, Pipeline], objects: Sequence[int] = (1, 2)) -> None:
    """Write a sheet: a row for each system, a column for each of eight captions, as many of each number of objects.
    Of a cascade it shows the first images."""
    texts = [each.text for count in objects for each in held_out_captions(8 // len(objects), count)]
    tiles, labels = [], []
    for name, pipeline in systems.items():
        last = min(pipeline.image_boxes.values())
        tiles += list(pipeline.sample(texts, SampleOptions(seed=0, last=last))[-1])
        labels += [f"{name}: {text}" for text in texts]
    grids.write(path, grids.grid(tiles, labels, 128, len(texts)))

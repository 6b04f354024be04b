"""Attribute accuracy on `shapes`: the fraction of images with all attributes that the caption states.

    python -m experiments.evaluate attributes --n 100 --objects 1 --up-to 64 --json runs/scores.json

Samples n held-out captions of one object and n of two through all stages, and reads every image with the exact reader
of `jaxdiff.evaluation.attributes`. An image is right if all stated attributes are read back equal. The two kinds have
separate scores (`--objects 1` or `2` samples only one kind), because two objects are much harder. The shipped cascade
takes about 20 minutes on 2 CPU cores at n = 100, nearly all of it at 1024 (`--up-to 256`: 4 minutes; one kind: half as
long); its scores are in jaxdiff/weights/tiny/README.md. `--candidates 8` scores the best of eight samples by CLIP, as
DALL·E 1 is sampled.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.evaluations.scores import provenance, report
from experiments.options.candidates import SINGLE, CandidateOptions, Ranking
from experiments.options.sampling import SamplingOptions, mesh_of, spread, with_samplings
from experiments.options.weights import WeightsOptions
from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file
from jaxdiff.data import images
from jaxdiff.data.shapes_caption import Caption, Stated, held_out_captions
from jaxdiff.evaluation.attributes import Verdict, matches
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import Pipeline, SampleOptions, up_to

OBJECTS = {"1": (1,), "2": (2,), "both": (1, 2)}
KINDS = {1: "", 2: "_two_objects"}
"""Suffixes of score names, by the number of objects in the captions."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Captions and weights."""

    n: int = 100
    """Held-out captions of each kind (one object, two objects)."""
    objects: Literal["1", "2", "both"] = "both"
    """Captions of one object, of two, or both; each kind has its own scores."""
    up_to: int | None = None
    """Skip the stages above this resolution (64 | 256 | 1024)."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 16
    """Batch size of the base; super-resolution uses a sixteenth of it, at least 1."""
    json: Path | None = None
    """Write the scores to this file."""
    pipeline: WeightsOptions = WeightsOptions()
    ranking: CandidateOptions = CandidateOptions()
    sampling: SamplingOptions = SamplingOptions()


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """Attribute accuracy on held-out captions of `shapes`."""
    if settings.n < 1:
        raise ValueError(f"--n {settings.n}: at least one caption of each kind")
    settings.ranking.check()
    if settings.json is not None:
        usable_file(settings.json)
    mesh, ranking = mesh_of(settings.sampling.mesh), settings.ranking.load()
    model = up_to(settings.pipeline.load(tasks, settings.sampling.dtype), settings.up_to)
    model = with_samplings(model, settings.sampling)
    captions = {objects: held_out_captions(settings.n, objects) for objects in OBJECTS[settings.objects]}
    with spread(model, mesh) as placed:
        scores = attribute_scores(placed, captions, settings.seed, settings.batch, ranking)
    made_by = provenance(settings, model, ("n", "objects", "seed", "batch")) | settings.ranking.shown
    report(scores, made_by, settings.json)


class Tally:
    """Verdicts on the images of each stage, in the order of the captions."""

    def __init__(self):
        self.verdicts: dict[int, list[tuple[str, Verdict]]] = {}

    def add(self, resolution: int, sampled: Sequence[np.ndarray], captions: Sequence[Caption]) -> None:
        verdicts = self.verdicts.setdefault(resolution, [])
        verdicts += [(c.text, verdict(image, c.stated)) for image, c in zip(sampled, captions)]

    def counts(self, resolution: int) -> tuple[int, int]:
        """The number of right images, and of all."""
        verdicts = self.verdicts[resolution]
        return sum(v.right for _, v in verdicts), len(verdicts)

    def accuracy(self, resolution: int) -> float:
        """The fraction of right images."""
        right, total = self.counts(resolution)
        return right / total

    def attributes(self, resolution: int) -> dict[str, float]:
        """For each attribute, the fraction of right images among those whose captions state it."""
        checks = [v.checks for _, v in self.verdicts[resolution]]
        names = sorted({name for check in checks for name in check})
        return {name: statistics.mean(check[name] for check in checks if name in check) for name in names}

    def wrong(self, resolution: int) -> dict[str, list[str]]:
        """The captions of wrong images, with the wrong attributes."""
        verdicts = self.verdicts[resolution]
        return {text: [name for name, right in v.checks.items() if not right] for text, v in verdicts if not v.right}


def verdict(image: np.ndarray, stated: Stated) -> Verdict:
    """The verdict on the image rounded to 8 bits, as in a file."""
    return matches(images.to_uint8(image), stated)


def attribute_scores(
    model: Pipeline,
    captions: Mapping[int, Sequence[Caption]],
    seed: int,
    batch: int,
    ranking: Ranking = SINGLE,
) -> dict:
    """attribute_accuracy_R, attributes_R, wrong_R for each resolution R, for captions of one object; with the suffix
    _two_objects for those of two; seconds_per_image through all stages.

    captions: by the number of objects. The noise of each kind starts at index 0, so it does not depend on the other.
    """
    tallies = {objects: Tally() for objects in captions}
    options = SampleOptions(seed=seed, batch=batch, per_prompt=ranking.candidates)
    with Bars(model, len(captions)) as bars:
        for objects, each in captions.items():
            texts = [c.text for c in each]
            batches = ranking.best(model.batches(texts, options, bars), texts)
            bars.resume()
            for first, products in batches:
                for resolution, box in model.image_boxes.items():
                    tallies[objects].add(resolution, products[box], each[first : first + len(products[box])])
                bars.resume()
    scores: dict = {}
    for objects, tally in tallies.items():
        scores |= {f"attribute_accuracy_{r}{KINDS[objects]}": tally.accuracy(r) for r in model.image_boxes}
        scores |= {f"attributes_{r}{KINDS[objects]}": tally.attributes(r) for r in model.image_boxes}
        scores |= {f"wrong_{r}{KINDS[objects]}": tally.wrong(r) for r in model.image_boxes}
    count = sum(map(len, captions.values()))
    seconds = {str(r): bars.per_image(box, count) for box, r in enumerate(model.sides)}
    return scores | {"seconds_per_image": sum(seconds.values()), "seconds_per_image_of_stage": seconds}

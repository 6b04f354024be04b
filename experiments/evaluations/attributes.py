"""Attribute accuracy on `shapes`: does an image show what its caption says?

    python -m experiments.evaluate attributes --n 100 --objects 1 --up-to 64 --json runs/scores.json

n held-out captions of one object and n of two are sampled through all stages, and the exact reader of
`jaxdiff.evaluation.attributes` looks at every image; right is one in which everything that its caption states is read
back equal. The two kinds are scored apart (`--objects 1` or `2` samples one of them alone): two objects are far harder,
and an average would hide it. The shipped cascade takes about 20 minutes on 2 CPU cores at n = 100, nearly all of it at
1024 (`--up-to 256`: 4 minutes; one kind alone: half as long); its scores are in jaxdiff/weights/tiny/README.md.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.evaluations.scores import made_by, report
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
"""What the names of scores end in, by the number of objects that the captions name."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to score."""

    n: int = 100
    """Held-out captions to sample of each kind: so many of one object, and so many of two."""
    objects: Literal["1", "2", "both"] = "both"
    """Captions of one object, of two, or both; each kind has its own scores."""
    up_to: int | None = None
    """Leave out the stages above this resolution (64 | 256 | 1024)."""
    seed: int = 0
    """Of the noise."""
    batch: int = 16
    """Images sampled at once by the base; super-resolution takes a sixteenth of it, at least one."""
    json: Path | None = None
    """A file for the scores."""
    pipeline: WeightsOptions = WeightsOptions()
    sampling: SamplingOptions = SamplingOptions()


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """Attribute accuracy on held-out captions of `shapes`."""
    if settings.n < 1:
        raise ValueError(f"--n {settings.n}: at least one caption of each kind")
    if settings.json is not None:
        usable_file(settings.json)
    mesh = mesh_of(settings.sampling.mesh)
    model = up_to(settings.pipeline.load(tasks, settings.sampling.dtype), settings.up_to)
    model = with_samplings(model, settings.sampling)
    captions = {objects: held_out_captions(settings.n, objects) for objects in OBJECTS[settings.objects]}
    with spread(model, mesh) as placed:
        scores = attribute_scores(placed, captions, settings.seed, settings.batch)
    report(scores, made_by(settings, model, ("n", "objects", "seed", "batch")), settings.json)


class Tally:
    """Verdicts on the images of each stage, in the order of the captions."""

    def __init__(self):
        self.verdicts: dict[int, list[tuple[str, Verdict]]] = {}

    def add(self, resolution: int, sampled: Sequence[np.ndarray], captions: Sequence[Caption]) -> None:
        verdicts = self.verdicts.setdefault(resolution, [])
        verdicts += [(c.text, verdict(image, c.stated)) for image, c in zip(sampled, captions)]

    def counts(self, resolution: int) -> tuple[int, int]:
        """How many images are right, of how many."""
        verdicts = self.verdicts[resolution]
        return sum(v.right for _, v in verdicts), len(verdicts)

    def accuracy(self, resolution: int) -> float:
        """The fraction of right images."""
        right, total = self.counts(resolution)
        return right / total

    def attributes(self, resolution: int) -> dict[str, float]:
        """For each attribute, the fraction of images that have it right among those whose captions state it."""
        checks = [v.checks for _, v in self.verdicts[resolution]]
        names = sorted({name for check in checks for name in check})
        return {name: statistics.mean(check[name] for check in checks if name in check) for name in names}

    def wrong(self, resolution: int) -> dict[str, list[str]]:
        """The captions whose images are wrong, and what is wrong with each."""
        verdicts = self.verdicts[resolution]
        return {text: [name for name, right in v.checks.items() if not right] for text, v in verdicts if not v.right}


def verdict(image: np.ndarray, stated: Stated) -> Verdict:
    """On the image as a file would hold it: 8 bits."""
    return matches(images.to_uint8(image), stated)


def attribute_scores(model: Pipeline, captions: Mapping[int, Sequence[Caption]], seed: int, batch: int) -> dict:
    """attribute_accuracy_R, attributes_R, wrong_R of captions of one object for each resolution R, the same names with
    _two_objects behind them of two; seconds_per_image through all stages.

    `captions`: by the number of objects. The noise of each kind starts at number 0, whether the other is drawn or not.
    """
    tallies = {objects: Tally() for objects in captions}
    options = SampleOptions(seed=seed, batch=batch)
    with Bars(model, len(captions)) as bars:
        for objects, each in captions.items():
            batches = model.batches([c.text for c in each], options, bars)
            bars.resume()
            for first, products in batches:
                for resolution, sampled in zip(model.sides, products):
                    tallies[objects].add(resolution, sampled, each[first : first + len(sampled)])
                bars.resume()
    scores: dict = {}
    for objects, tally in tallies.items():
        scores |= {f"attribute_accuracy_{r}{KINDS[objects]}": tally.accuracy(r) for r in model.sides}
        scores |= {f"attributes_{r}{KINDS[objects]}": tally.attributes(r) for r in model.sides}
        scores |= {f"wrong_{r}{KINDS[objects]}": tally.wrong(r) for r in model.sides}
    count = sum(map(len, captions.values()))
    seconds = {str(r): bars.per_image(box, count) for box, r in enumerate(model.sides)}
    return scores | {"seconds_per_image": sum(seconds.values()), "seconds_per_image_of_stage": seconds}

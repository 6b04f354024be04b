"""Dominant-colour accuracy of images sampled from a dataset's captions.

    python -m experiments.evaluate colours --data folder:photos --weights runs/base64 --grid runs/colours.png
    python -m experiments.evaluate colours --data folder:photos --limit 64 --weights runs/base64 --json runs/c.json

A coarse metric for artwork on white, which has no exact attributes: a sample is right if its dominant colour, of twelve
named colours, equals that of the dataset's image for the same caption. On training captions it measures whether they
were learned. Takes 1 s per image to 256 pixels on 2 CPU cores.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.evaluations.scores import provenance, report
from experiments.options.sampling import SamplingOptions, mesh_of, with_samplings
from experiments.options.sampling import spread as spread_over
from experiments.options.weights import WeightsOptions
from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file
from jaxdiff.data import grids, sources
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.evaluation.colours import dominant
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import Pipeline, SampleOptions, up_to

COLUMNS = 16
WRONG = "caption", "expected", "sampled"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Dataset and weights."""

    data: str = "emoji"
    """The dataset: emoji | folder:PATH | hf:PATH | tfds:NAME | records:PATH"""
    limit: int = 0
    """The --limit of the model's training, to use only those captions; 0: all."""
    n: int = 64
    """Captions to sample, evenly spread over the dataset."""
    up_to: int | None = None
    """Skip the stages above this resolution."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 16
    """Batch size of the base."""
    json: Path | None = None
    """Write the scores to this file."""
    grid: Path | None = None
    """Write a PNG: rows of the dataset's images, each above a row of the samples of their captions."""
    pipeline: WeightsOptions = WeightsOptions()
    sampling: SamplingOptions = SamplingOptions()
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """Dominant-colour accuracy of sampled images."""
    if settings.n < 1 or settings.limit < 0:
        raise ValueError(f"--n {settings.n}, --limit {settings.limit}: at least one caption, of some or (0) all")
    for file in (settings.json, settings.grid):
        if file is not None:
            usable_file(file)
    spec, mesh = sources.parse(settings.data), mesh_of(settings.sampling.mesh)
    model = up_to(settings.pipeline.load(tasks, settings.sampling.dtype), settings.up_to)
    model = with_samplings(model, settings.sampling)
    captions, true = _examples(settings, spec, model.sides[-1])
    with spread_over(model, mesh) as placed:
        sampled = _sampled(placed, captions, settings.seed, settings.batch)
    scores = colour_scores(captions, true, sampled)
    if settings.grid is not None:
        grids.write(settings.grid, compared(captions, true, sampled[model.sides[-1]]))
        print(settings.grid)
    report(scores, provenance(settings, model, ("data", "limit", "n", "seed", "batch")), settings.json)


def _examples(settings: Settings, spec: sources.DataSpec, side: int) -> tuple[list[str], list[np.ndarray]]:
    """The captions and their images, preprocessed as in training."""
    source = sources.open(spec, side, "train", settings.data_dir)
    source = spread(spread(source, settings.limit) if settings.limit else source, settings.n)
    captions, true = [], []
    for batch in image_batches(source, DataConfig(side, 16, shuffle=False, repeat=False, captions=True)):
        captions += list(batch["caption"])
        true += list(batch["image"])
    if not captions:
        raise ValueError(f"--data {settings.data}: no image with a caption")
    return captions, true


def _sampled(model: Pipeline, captions: Sequence[str], seed: int, batch: int) -> dict[int, list[np.ndarray]]:
    """One image per caption, by resolution."""
    sampled: dict[int, list[np.ndarray]] = {side: [] for side in model.image_boxes}
    with Bars(model) as bars:
        for _, products in model.batches(captions, SampleOptions(seed=seed, batch=batch), bars):
            for side, images in ((side, products[box]) for side, box in model.image_boxes.items()):
                sampled[side] += list(np.asarray(images))
    return sampled


def colour_scores(
    captions: Sequence[str], true: Sequence[np.ndarray], sampled: Mapping[int, Sequence[np.ndarray]]
) -> dict:
    """dominant_colour_accuracy_R and wrong_R per resolution R."""
    colours = [dominant(image) for image in true]
    scores: dict = {}
    for side, images in sampled.items():
        pairs = list(zip(captions, colours, map(dominant, images), strict=True))
        wrong = [dict(zip(WRONG, pair, strict=True)) for pair in pairs if pair[1] != pair[2]]
        scores[f"dominant_colour_accuracy_{side}"] = 1 - len(wrong) / len(pairs)
        scores[f"wrong_{side}"] = wrong
    return scores


def compared(captions: Sequence[str], true: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> Image.Image:
    """Rows of the dataset's images, each above a row of their samples with captions."""
    marks = [f"{c}{'' if dominant(a) == dominant(b) else ' (colour!)'}" for c, a, b in zip(captions, true, sampled)]
    shown, texts = [], []
    for first in range(0, len(captions), COLUMNS):
        row = slice(first, first + COLUMNS)
        blank = [np.ones_like(true[0])] * (COLUMNS - len(captions[row]))
        shown += [*true[row], *blank, *sampled[row], *blank]
        texts += [""] * COLUMNS + marks[row] + [""] * len(blank)
    return grids.grid(shown, texts, 96, COLUMNS, font_size=9)

"""The composition benchmark, end to end: train on 30 % of `rainbow`, sample the held-out captions, read them exactly.

    python -m experiments.recipes.rainbow
    python -m experiments.recipes.rainbow --system dalle --steps 3000

Trains a system on the 2,765 training images at 32×32 (`rainbow_systems.py`: for Imagen a T5 and a base model) and
samples the held-out captions, about 4,700 (`--n` samples fewer). An image is right if all six attributes are read back
as in its caption (`jaxdiff.evaluation.rainbow`). For DALL·E 1 report.json also has `equal_codes`, the fraction of
samples with all codes of the caption's own image: the published measure of the community's. Its codes are of 2×2
pixels, few enough to be seen often, and the likeliest are taken. Cost and results are in experiments/results/README.md.
Writes OUT/grid.png (held-out images above their samples, wrong ones first) and OUT/report.json. Started again, it
resumes.
"""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import train
from experiments.cli import run
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions
from experiments.recipes.rainbow_systems import SYSTEMS, TEXT_BATCH, Training, TrainingOptions
from experiments.table import TASKS
from jaxdiff.core.files import write_json
from jaxdiff.data import grids
from jaxdiff.data.images import to_float
from jaxdiff.data.rainbow import EVERY, Attributes, draw, split
from jaxdiff.evaluation.rainbow import NAMES, Read, read
from jaxdiff.models.autoregressive import TrainedAutoregressive
from jaxdiff.models.boxes import Decoder
from jaxdiff.models.dvae import TrainedDVAE
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.training.loop import Diverged
from jaxdiff.weights import pretrained

COLUMNS, ROWS = 12, 4


@dataclass(frozen=True)
class Settings:
    """Train on 30 % of `rainbow` and sample the rest."""

    out: Path = Path("runs/rainbow")
    """Folder of the runs and the result."""
    system: Literal["imagen", "sd", "dalle", "unclip"] = "imagen"
    """Imagen's base model, latent diffusion, a VQ autoencoder with a transformer of its codes, or CLIP, a prior and a
    decoder."""
    training: TrainingOptions = TrainingOptions()
    n: int = 0
    """Held-out captions to sample, from the first; 0: all."""
    sample_batch: int = 64
    """Batch size of sampling."""
    seed: int = 0
    """Seed of training and sampling; the held-out combinations do not depend on it."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings) -> None:
    """Train on 30 % of `rainbow` and sample the rest."""
    if settings.n < 0 or settings.sample_batch < 1:
        raise ValueError(f"--n {settings.n}, --sample-batch {settings.sample_batch}: at least 0, and at least 1")
    use_cores(TEXT_BATCH, settings.training.batch)
    started = time.monotonic()
    data = DataOptions(("rainbow",), data_dir=settings.data_dir)
    runs = SYSTEMS[settings.system](Training(settings.out, data, settings.training, settings.seed))
    for each in runs:
        task = TASKS[each.task]
        if each.side is not None:
            preset = task.preset(each.settings.preset)
            preset = replace(preset, model=task.resized(preset.model, each.side))
            task = replace(task, presets={each.settings.preset: preset})
        train.main(each.task, task, each.settings)
    trained = time.monotonic() - started
    pipeline = greedy(pretrained.load([each.settings.out for each in runs if each.sampled]))
    places = split("test")[: settings.n or None]
    asked = [EVERY[place] for place in places]
    products = _sampled(pipeline, asked, settings)
    boxes = (pipeline.generator, *pipeline.decoders)
    provenance = {
        "system": settings.system,
        "parameters": sum(leaf.size for box in boxes for leaf in jax.tree.leaves(box.params)),
        "images_seen": {each.task: each.settings.run.steps * each.settings.run.batch for each in runs},
        "seed": settings.seed,
        "seconds_of_training_in_this_run": trained,
        "device": jax.devices()[0].device_kind,
    }
    equal = equal_codes(next(iter(pipeline.decoders), None), products[0], asked)
    report(settings.out, asked, products[-1], provenance | ({} if equal is None else {"equal_codes": equal}))


def greedy(pipeline: Pipeline) -> Pipeline:
    """A transformer of codes takes the likeliest, as a caption of this dataset has one image; others are unchanged."""
    if not isinstance(pipeline.generator, TrainedAutoregressive):
        return pipeline
    return replace(pipeline, generator=replace(pipeline.generator, sampling=TokenSampling(temperature=0.0)))


def _sampled(pipeline: Pipeline, asked: list[Attributes], settings: Settings) -> tuple[np.ndarray, ...]:
    """The product of each box."""
    captions = [each.caption for each in asked]
    with Bars(pipeline) as bars:
        return pipeline.sample(captions, SampleOptions(seed=settings.seed, batch=settings.sample_batch), bars)


def equal_codes(decoder: Decoder | None, sampled: np.ndarray, asked: list[Attributes]) -> float | None:
    """The fraction of the samples (n h w) with all codes of the image that was asked for; None for other products."""
    if not isinstance(decoder, TrainedDVAE | VQCodes):
        return None
    batches = [asked[first : first + TEXT_BATCH] for first in range(0, len(asked), TEXT_BATCH)]
    true = [np.asarray(decoder.encode(jnp.stack([to_float(draw(each)) for each in batch]))) for batch in batches]
    return float((np.concatenate(true) == sampled).all((1, 2)).mean())


def report(out: Path, asked: list[Attributes], sampled: np.ndarray, provenance: dict) -> None:
    """Read the images; write the scores and a grid."""
    detected = read(sampled)
    scores = scores_of(asked, detected)
    write_json(out / "report.json", {**scores, "made_by": provenance})
    order = sorted(range(len(asked)), key=lambda i: detected[i].right(asked[i]))[: COLUMNS * ROWS]
    shown, captions = [], []
    for first in range(0, len(order), COLUMNS):  # a row of true images, then a row of their samples
        row = order[first : first + COLUMNS]
        blank = [np.ones_like(sampled[0])] * (COLUMNS - len(row))
        shown += [*(to_float(draw(asked[i])) for i in row), *blank, *(sampled[i] for i in row), *blank]
        texts = [("" if detected[i].right(asked[i]) else "WRONG: ") + asked[i].caption for i in row]
        captions += [*[""] * COLUMNS, *texts, *[""] * len(blank)]
    grids.write(out / "grid.png", grids.grid(shown, captions, 96, COLUMNS, font_size=9))
    print(f"{out / 'grid.png'}: {scores['right']:.2%} of {len(asked)} held-out captions right in every attribute")
    print(", ".join(f"{name} {fraction:.2%}" for name, fraction in scores["attributes"].items()))
    if "equal_codes" in provenance:
        print(f"all codes equal {provenance['equal_codes']:.2%}")


def scores_of(asked: list[Attributes], detected: list[Read]) -> dict:
    """Fractions of right images and attributes, and the counts of each set of wrong attributes."""
    checks = [read.attributes(each) for read, each in zip(detected, asked, strict=True)]
    right = [read.right(each) for read, each in zip(detected, asked)]
    wrong = Counter(_wrong(read, check) for read, check, ok in zip(detected, checks, right) if not ok)
    return {
        "count": len(asked),
        "right": statistics.mean(right),
        "attributes": {name: statistics.mean(check[name] for check in checks) for name in NAMES},
        "wrong": dict(wrong.most_common()),
        "explained": statistics.mean(read.explained for read in detected),
    }


def _wrong(read: Read, check: dict[str, bool]) -> str:
    if not read.found:
        return "no image of the dataset"
    return ", ".join(name for name in NAMES if not check[name])


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

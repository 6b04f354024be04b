"""PSNR of super-resolution against bicubic, on `shapes`.

    python -m experiments.evaluate psnr --json runs/psnr.json

Held-out true images are downsampled by Pillow's antialiased BICUBIC, then upsampled by each super-resolution stage at
augmentation level 0 and guidance 1, and by the same filter for comparison. The result is the mean PSNR in dB of 8-bit
images. Two minutes for the shipped cascade on 2 CPU cores.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.evaluations.scores import provenance, report
from experiments.options.sampling import SamplingOptions, mesh_of, spread, with_samplings
from experiments.options.weights import WeightsOptions
from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file
from jaxdiff.data import images
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions, up_to, with_boxes
from jaxdiff.weights.imagen import trained


@dataclasses.dataclass(frozen=True)
class Settings:
    """Images and weights."""

    psnr_256: int = 64
    """True images for 64→256; 0: skip it."""
    psnr_1024: int = 12
    """True images for 256→1024; 0: skip it."""
    up_to: int | None = None
    """Skip the stages above this resolution (256 | 1024)."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 16
    """Batch size at 64 pixels; larger images use proportionally smaller batches."""
    json: Path | None = None
    """Write the scores to this file."""
    pipeline: WeightsOptions = WeightsOptions()
    sampling: SamplingOptions = SamplingOptions()


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """PSNR of super-resolution against bicubic, on held-out images of `shapes`."""
    counts = {256: settings.psnr_256, 1024: settings.psnr_1024}
    if min(counts.values()) < 0:
        raise ValueError("--psnr-256 and --psnr-1024 cannot be negative")
    if settings.json is not None:
        usable_file(settings.json)
    mesh = mesh_of(settings.sampling.mesh)
    model = up_to(settings.pipeline.load(tasks, settings.sampling.dtype), settings.up_to)
    model = with_samplings(model, settings.sampling)
    wanted = {side: count for side, count in counts.items() if count and side in model.sides[1:]}
    if not wanted:
        sides = ", ".join(map(str, model.sides))
        raise ValueError(
            f"nothing to score: the stages sample {sides} pixels; PSNR needs a super-resolution stage of 256 or 1024"
        )
    scores: dict = {}
    with spread(model, mesh) as placed:
        for side, count in wanted.items():
            scores |= psnr_scores(placed, side, count, settings.seed, settings.batch)
    report(scores, provenance(settings, model, ("psnr_256", "psnr_1024", "seed", "batch")), settings.json)


def psnr_scores(model: Pipeline, resolution: int, count: int, seed: int = 0, batch: int = 16) -> dict:
    """psnr_R and psnr_R_bicubic of the stage with this resolution R, over `count` held-out true images."""
    box = model.sides.index(resolution)
    model = with_boxes(model, [_plain(each) for each in trained(model)])
    texts, small = zip(*(small_image(resolution, model.sides[box - 1], index) for index in range(count)))
    after = After(box - 1, images.to_float(np.stack(small)))
    ours, bicubic = [], []
    with Bars(model) as bars:
        options = SampleOptions(seed=seed, last=box, batch=batch, after=after)
        for first, (sampled,) in model.batches(texts, options, bars):
            for index, image in enumerate(sampled, first):
                large = true_image(resolution, index)
                ours.append(psnr(large, images.to_uint8(image)))
                bicubic.append(psnr(large, images.resize(small[index], resolution)))
    return {f"psnr_{resolution}": statistics.mean(ours), f"psnr_{resolution}_bicubic": statistics.mean(bicubic)}


def _plain(model: TrainedModel) -> TrainedModel:
    """The model without augmentation and guidance."""
    return dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, aug_level=0.0, guidance=Guidance()))


def true_image(resolution: int, index: int) -> np.ndarray:
    """A held-out true image (uint8)."""
    return draw(scene("held_out", index), resolution)


def small_image(resolution: int, lower: int, index: int) -> tuple[str, np.ndarray]:
    """The caption of a held-out image, and the image downsampled by Pillow's antialiased BICUBIC."""
    text = caption(scene("held_out", index), "held_out", index).text
    return text, images.resize(true_image(resolution, index), lower)


def psnr(true: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB, capped at an RMS error of half a grey level."""
    error = np.mean((true.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 0.25)))

"""The curves of the Imagen paper (Fig. 4a to 4c, A.11): fidelity against alignment over guidance weights, for sizes of
the text encoder and the U-Net, thresholding and augmentation.

    python -m experiments.recipes.glosses
    python -m experiments.recipes.curves --out runs/curves                       # 2 CPU cores: hours, resumable
    python -m experiments.recipes.curves --figures encoders --encoders tiny google/t5-v1_1-small google/t5-v1_1-base

Super-resolution's augmentation (Fig. A.11a) is a further figure, `--figures augmentation`.

One GPU (not measured yet):

    python -m experiments.recipes.curves --out runs/curves64 --resolution 64 --unets quick tiny --unet tiny \\
        --steps 60000 --batch 256 --t5-steps 20000 --t5-batch 256 --n 5000 --sampling-steps 64 \\
        --examples 200000 --held-out 5000

Trains missing models, all with the same budget, samples n held-out captions with each setting and weight, and measures
the Fréchet distance of the classifier of `shapes` (FD-shapes, not FID) against the mean cosine of a CLIP that was
trained on `shapes`. Existing models and cells of the grid are reused. Writes OUT/<figure>.png, OUT/<figure>-images.png
(samples of the first four captions) and OUT/curves.csv. Results, with hardware and time, are in
experiments/results/README.md.
"""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from experiments.cli import run
from experiments.options.cores import use_cores
from experiments.options.metric_networks import MetricNetworks, loaded
from experiments.recipes.curves_grid import Grid, Places, Sampled, Setting
from experiments.recipes.curves_models import Training, preset_of
from experiments.recipes.curves_plot import Point, plot
from jaxdiff.core.files import replacing, usable
from jaxdiff.data import grids
from jaxdiff.training.loop import Diverged

Figure = Literal["encoders", "unets", "thresholding", "augmentation"]
SAMPLED, TRAINING, NETWORKS = Sampled(), Training(), MetricNetworks()
THRESHOLDINGS = ("none", "static", "dynamic")


@dataclasses.dataclass(frozen=True)
class Run:
    """Figures and settings of the grid."""

    out: Path = Path("runs/curves")
    """Folder of models, cells and figures."""
    figures: tuple[Figure, ...] = ("encoders", "unets", "thresholding")
    """Figures to compute: encoders | unets | thresholding | augmentation."""
    encoders: tuple[str, ...] = ("untrained", "micro", "tiny", "mini", "midi", "clip")
    """Text encoders of the first figure: T5 sizes that are pre-trained here, the largest of them `untrained`, `clip`
    (its text tower), or directories or hub ids of public T5s."""
    encoder: str = "midi"
    """Text encoder of the other figures."""
    unets: tuple[str, ...] = ("micro", "small", "medium")
    """Presets of the U-Nets of the second figure."""
    unet: str = "small"
    """U-Net of the other figures."""
    aug_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    """Noise levels on super-resolution's input, one curve each."""
    texts: Path | None = Path("runs/data/glosses.txt")
    """Further training texts of T5 (experiments.recipes.glosses)."""
    sampled: Sampled = SAMPLED
    training: Training = TRAINING
    networks: MetricNetworks = NETWORKS
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Run) -> None:
    """Train, sample and measure a grid of settings and plot the curves."""
    _check(settings)
    use_cores(settings.training.batch)
    networks = loaded(settings.networks)
    places = Places(usable(settings.out), settings.data_dir, settings.texts, settings.networks.clip)
    grid = Grid(settings.sampled, settings.training, places, networks)
    rows = []
    for figure in settings.figures:
        curves, shown = {}, {}
        for label, setting in _settings(settings, figure):
            grid.fill(setting)
            curves[label] = [grid.points(setting, weight) for weight in settings.sampled.guidance]
            shown |= {f"{label}, w {weight:g}": grid.shown(setting, weight) for weight in settings.sampled.guidance}
        _write_sheet(settings.out / f"{figure}-images.png", shown, len(settings.sampled.guidance))
        axes = {"alignment": networks.clip.name, "fidelity": networks.classifier.name}
        plot(settings.out / f"{figure}.png", curves, figure, **axes)
        print(f"{settings.out / figure}.png: {len(curves)} curves of {len(settings.sampled.guidance)} weights")
        rows += [(figure, label, *point) for label, line in curves.items() for points in line for point in points]
        _write(settings.out / "curves.csv", rows)


def _settings(settings: Run, figure: Figure) -> Iterator[tuple[str, Setting]]:
    """The label and the setting of each curve of a figure."""
    match figure:
        case "encoders":
            for name in settings.encoders:
                yield "CLIP text" if name == "clip" else f"T5 {name}", Setting(name, settings.unet)
        case "unets":
            for name in settings.unets:
                yield f"U-Net {name}", Setting(settings.encoder, name)
        case "thresholding":
            for name in THRESHOLDINGS:
                yield name, Setting(settings.encoder, settings.unet, name)
        case "augmentation":
            for level in settings.aug_levels:
                yield f"level {level:g}", Setting(settings.encoder, settings.unet, aug=level)


def _check(settings: Run) -> None:
    for name in ("figures", "encoders", "unets", "aug_levels"):
        if not getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')} names none")
    if not all(0 <= level <= 1 for level in settings.aug_levels):
        raise ValueError(f"--aug-levels {settings.aug_levels}: each lies between 0 and 1")
    for name in {*settings.unets, settings.unet}:
        preset_of(name, settings.training)
    if settings.networks.classifier is None or settings.networks.clip is None:
        raise ValueError("the axes are a classifier's distance and a CLIP's cosine: name both networks")
    if settings.texts is not None and not settings.texts.is_file():
        raise FileNotFoundError(
            f"{settings.texts}: no such file; create it with python -m experiments.recipes.glosses, or use --texts None"
        )


def _write_sheet(path: Path, shown: dict[str, Image.Image], columns: int) -> None:
    twice = [image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST) for image in shown.values()]
    grids.write(path, grids.sheet(twice, list(shown), twice[0].width, columns, font_size=10))


def _write(path: Path, rows: list[tuple]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "curve", *Point._fields))
        writer.writerows(rows)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

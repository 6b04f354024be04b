"""The curves of the Imagen paper (Fig. 4a to 4c, A.11): what the sizes of text encoder and U-Net, thresholding and
augmentation do to fidelity and alignment, a point for every guidance weight.

    python -m experiments.data.glosses
    python -m experiments.curves --out runs/curves                       # 2 CPU cores: hours, resumable
    python -m experiments.curves --figures encoders --encoders tiny google/t5-v1_1-small google/t5-v1_1-base

Super-resolution's augmentation (Fig. A.11a) is a further figure, `--figures augmentation`.

One GPU (not measured yet):

    python -m experiments.curves --out runs/curves64 --resolution 64 --unets quick tiny --unet tiny --steps 60000 \\
        --batch 256 --t5-steps 20000 --t5-batch 256 --n 5000 --sampling-steps 64 --examples 200000 --held-out 5000

Trains what is missing, all models with the same budget, draws n held-out captions with each setting and weight, and
judges: the Fréchet distance of the classifier of `shapes` (FD-shapes, no FID) against the mean cosine of a CLIP that
was trained on `shapes`. Each model, and each cell of the grid, is kept and not made again. Writes OUT/<figure>.png,
OUT/<figure>-pictures.png (what was drawn for the first four captions) and OUT/curves.csv. The pictures, with hardware
and time, are in experiments/README.md.
"""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from experiments.cli import run
from experiments.cores import use_cores
from experiments.curves_grid import Drawn, Grid, Places, Setting
from experiments.curves_models import Training
from experiments.curves_plot import Point, plot
from experiments.imagen import pictures, presets
from experiments.judging import Judges, loaded
from jaxdiff.core.files import replacing, usable
from jaxdiff.training.loop import Diverged

Figure = Literal["encoders", "unets", "thresholding", "augmentation"]
DRAWN, TRAINING, JUDGES = Drawn(), Training(), Judges()
THRESHOLDINGS = ("none", "static", "dynamic")


@dataclasses.dataclass(frozen=True)
class Run:
    """The grid."""

    out: Path = Path("runs/curves")
    """Folder of models, cells and figures."""
    figures: tuple[Figure, ...] = ("encoders", "unets", "thresholding")
    """Which ones: encoders | unets | thresholding | augmentation."""
    encoders: tuple[str, ...] = ("untrained", "micro", "tiny", "mini", "midi", "clip")
    """Text encoders of the first figure: sizes that are pre-trained here, the largest of them untrained, CLIP's text
    tower, or directories or hub ids of public T5s."""
    encoder: str = "midi"
    """The one of the other figures."""
    unets: tuple[str, ...] = ("micro", "small", "medium")
    """U-Nets of the second figure, by the names of their presets."""
    unet: str = "small"
    """The one of the other figures."""
    aug_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    """Noise on super-resolution's input, a curve each."""
    texts: Path | None = Path("runs/data/glosses.txt")
    """What T5 reads beside captions (experiments.data.glosses)."""
    drawn: Drawn = DRAWN
    training: Training = TRAINING
    judges: Judges = JUDGES
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Run) -> None:
    """Train, draw and judge a grid of settings; draw its curves."""
    _check(settings)
    use_cores(settings.training.batch)
    bench = loaded(settings.judges)
    places = Places(usable(settings.out), settings.data_dir, settings.texts, settings.judges.clip)
    grid = Grid(settings.drawn, settings.training, places, bench)
    rows = []
    for figure in settings.figures:
        curves, shown = {}, {}
        for label, setting in _settings(settings, figure):
            grid.fill(setting)
            curves[label] = [grid.points(setting, weight) for weight in settings.drawn.guidance]
            shown |= {f"{label}, w {weight:g}": grid.shown(setting, weight) for weight in settings.drawn.guidance}
        _write_sheet(settings.out / f"{figure}-pictures.png", shown, len(settings.drawn.guidance))
        judges = {"alignment": bench.clip.name, "fidelity": bench.classifier.name}
        plot(settings.out / f"{figure}.png", curves, figure, **judges)
        print(f"{settings.out / figure}.png: {len(curves)} curves of {len(settings.drawn.guidance)} weights")
        rows += [(figure, label, *point) for label, line in curves.items() for points in line for point in points]
        _write(settings.out / "curves.csv", rows)


def _settings(settings: Run, figure: Figure) -> Iterator[tuple[str, Setting]]:
    """The curves of a figure by their labels."""
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
        presets.stage(f"base{settings.training.resolution}", name)
    if settings.judges.classifier is None or settings.judges.clip is None:
        raise ValueError("the axes are a classifier's distance and a CLIP's cosine: name both judges")
    if settings.texts is not None and not settings.texts.is_file():
        raise FileNotFoundError(f"{settings.texts}: not there; run python -m experiments.data.glosses, or --texts None")


def _write_sheet(path: Path, shown: dict[str, Image.Image], columns: int) -> None:
    twice = [image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST) for image in shown.values()]
    pictures.write(path, pictures.sheet(twice, list(shown), twice[0].width, columns, font_size=10))


def _write(path: Path, rows: list[tuple]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "curve", *Point._fields))
        writer.writerows(rows)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

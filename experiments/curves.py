"""The curves of the Imagen paper (Fig. 4a to 4c, A.11): what the sizes of text encoder and U-Net, thresholding and
augmentation do to fidelity and alignment, a point for every guidance weight.

    python -m experiments.data.glosses
    python -m experiments.curves --out runs/curves                       # 2 CPU cores: hours, resumable
    python -m experiments.curves --figures encoders --encoders tiny google/t5-v1_1-small google/t5-v1_1-base

One GPU (not measured yet):

    python -m experiments.curves --out runs/curves64 --resolution 64 --unets quick tiny --unet tiny --steps 60000 \\
        --batch 256 --t5-steps 20000 --t5-batch 256 --n 5000 --sampling-steps 64 --examples 200000 --held-out 5000

Trains what is missing, all models with the same budget, draws n held-out captions with each setting and weight, and
judges: the Fréchet distance of the classifier of `shapes` (FD-shapes, no FID) against the mean cosine of a CLIP that
was trained on `shapes`. Each model, and each cell of the grid, is kept and not made again. Writes OUT/<figure>.png and
OUT/curves.csv. The pictures, with hardware and time, are in experiments/README.md.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import run
from experiments.cores import use_cores
from experiments.curves_models import Text, Training, model_of, text_of
from experiments.curves_plot import Point, plot
from experiments.imagen.presets import thresholding
from experiments.judging import Judges, OfSource, PictureSet, loaded, observe
from jaxdiff.data import sources
from jaxdiff.data.files import replacing, usable, write_json
from jaxdiff.data.pictures import to_uint8
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.evaluation import fid
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.judges import Observed
from jaxdiff.systems.cascade import Model
from jaxdiff.systems.imagen import null_text
from jaxdiff.systems.imagen_drawing import Sampling, draw
from jaxdiff.text.clip import encode
from jaxdiff.text.t5 import TextEmbedding
from jaxdiff.training.loop import Diverged

Figure = Literal["encoders", "unets", "thresholding"]
TRAINING, JUDGES = Training(), Judges()
THRESHOLDINGS = ("none", "static", "dynamic")


@dataclasses.dataclass(frozen=True)
class Run:
    """The grid."""

    out: Path = Path("runs/curves")
    """Folder of models, cells and figures."""
    figures: tuple[Figure, ...] = ("encoders", "unets", "thresholding")
    """Which ones."""
    encoders: tuple[str, ...] = ("untrained", "micro", "tiny", "mini", "midi", "clip")
    """Text encoders of the first figure: sizes that are pre-trained here, the largest of them untrained, CLIP's text
    tower, or directories or hub ids of public T5s."""
    encoder: str = "midi"
    """The one of the other figures."""
    unets: tuple[str, ...] = ("small", "medium", "tiny")
    """U-Nets of the second figure, by the names of their presets."""
    unet: str = "medium"
    """The one of the other figures."""
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Guidance weights, a point each."""
    sampling_steps: int = 12
    """Steps of the sampler (DPM-Solver++ 2M)."""
    seeds: tuple[int, ...] = (0, 1)
    """Each setting is trained and drawn once with each; what is drawn is their mean and spread."""
    n: int = 512
    """Held-out captions that are drawn."""
    draw_batch: int = 64
    """Pictures drawn at once."""
    texts: Path | None = Path("runs/data/glosses.txt")
    """What T5 reads beside captions (experiments.data.glosses)."""
    training: Training = TRAINING
    judges: Judges = JUDGES
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


class Setting(NamedTuple):
    """All that a curve holds fixed."""

    encoder: str
    unet: str
    thresholding: str = "dynamic"


def main(settings: Run) -> None:
    """Train, draw and judge a grid of settings; draw its curves."""
    _check(settings)
    use_cores(settings.training.batch)
    bench = loaded(settings.judges)
    usable(settings.out)
    curves = {figure: dict(_settings(settings, figure)) for figure in settings.figures}
    grid = _Grid(settings, bench)
    for setting in dict.fromkeys(setting for each in curves.values() for setting in each.values()):
        for seed in settings.seeds:
            grid.fill(setting, seed)
    rows = []
    for figure, labelled in curves.items():
        points = {
            label: [grid.points(setting, weight) for weight in settings.guidance] for label, setting in labelled.items()
        }
        plot(settings.out / f"{figure}.png", points, figure, grid.axes)
        rows += [(figure, label, *point) for label, line in points.items() for each in line for point in each]
        print(f"{settings.out / figure}.png: {len(points)} curves of {len(settings.guidance)} weights")
    with replacing(settings.out / "curves.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "curve", *Point._fields))
        writer.writerows(rows)


def _settings(settings: Run, figure: Figure) -> Iterator[tuple[str, Setting]]:
    """The curves of a figure by their labels."""
    if figure == "encoders":
        for name in settings.encoders:
            yield (f"{'CLIP text' if name == 'clip' else f'T5 {name}'}", Setting(name, settings.unet))
    elif figure == "unets":
        for name in settings.unets:
            yield f"U-Net {name}", Setting(settings.encoder, name)
    else:
        for name in THRESHOLDINGS:
            yield name, Setting(settings.encoder, settings.unet, name)


def _check(settings: Run) -> None:
    if settings.n < 2 or settings.draw_batch < 1 or settings.sampling_steps < 1:
        raise ValueError(
            f"n {settings.n}, draw_batch {settings.draw_batch}, sampling_steps {settings.sampling_steps}: too few"
        )
    for name in ("figures", "encoders", "unets", "guidance", "seeds"):
        if not getattr(settings, name):
            raise ValueError(f"--{name} names none")
    if settings.judges.classifier is None or settings.judges.clip is None:
        raise ValueError("the axes are a classifier's distance and a CLIP's cosine: name both judges")
    if settings.texts is not None and not settings.texts.is_file():
        raise FileNotFoundError(f"{settings.texts}: not there; run python -m experiments.data.glosses, or --texts None")


class _Drawn:
    """Pictures in memory, as a set to be judged."""

    format = "none"

    def __init__(self, name: str, pictures: np.ndarray):
        self.name, self._pictures = name, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def caption(self, index: int) -> None:
        return None


class _Grid:
    """Cells on disk, one JSON file each: OUT/cells/<encoder>-<unet>-s<seed>-<thresholding>-w<weight>.json."""

    def __init__(self, settings: Run, bench):
        self._settings, self._bench = settings, bench
        spec = sources.Shapes(settings.training.examples, settings.training.held_out)
        side = settings.training.resolution
        self._train, held_out = (sources.open(spec, side, split, settings.data_dir) for split in ("train", "held_out"))
        true = OfSource("shapes/held_out", held_out, 0)
        self._captions = [true.caption(i) for i in range(min(settings.n, len(true)))]
        self._true = self._look(true)
        self._texts = np.asarray(encode(bench.text, self._captions).embedding)
        self.axes = tuple(str(extractor) for extractor in bench.extractors)

    def fill(self, setting: Setting, seed: int) -> None:
        """The cells of a setting that are not there yet."""
        missing = [weight for weight in self._settings.guidance if not self._file(setting, seed, weight).is_file()]
        if not missing:
            return
        settings = self._settings
        text, model = self._model(setting, seed)
        condition = text(self._captions)
        for weight in missing:
            name = self._file(setting, seed, weight).stem
            pictures = self._draw(model, condition, setting, seed, weight)
            seen = self._look(_Drawn(name, pictures))
            distance, cosine = self._judged(seen)
            found = {"weight": weight, "fd": distance, "cosine": cosine, "seed": seed}
            told = {**setting._asdict(), "n": len(pictures), "steps": settings.sampling_steps}
            told |= {
                "training": dataclasses.asdict(settings.training),
                "judges": list(map(str, self._bench.extractors)),
            }
            write_json(self._file(setting, seed, weight), {**found, "made_by": told})
            print(f"{name}: FD {distance:.3f}, cosine {cosine:.4f}", flush=True)

    def points(self, setting: Setting, weight: float) -> list[Point]:
        """One point for each seed."""
        cells = [json.loads(self._file(setting, seed, weight).read_text()) for seed in self._settings.seeds]
        return [Point(cell["weight"], cell["seed"], cell["cosine"], cell["fd"]) for cell in cells]

    def _file(self, setting: Setting, seed: int, weight: float) -> Path:
        encoder = setting.encoder.replace("/", "--")
        name = f"{encoder}-{setting.unet}-s{seed}-{setting.thresholding}-w{weight:g}.json"
        return usable(self._settings.out / "cells") / name

    def _model(self, setting: Setting, seed: int) -> tuple[Text, Model]:
        settings, data_dir = self._settings, self._settings.data_dir
        folder = settings.out / "models" / f"{setting.encoder.replace('/', '--')}-{setting.unet}-s{seed}"
        length = 24
        text = text_of(
            setting.encoder, settings.out, settings.training, settings.judges.clip, length, settings.texts, data_dir
        )
        return text, model_of(setting.unet, text, seed, folder, settings.training, self._train, data_dir)

    def _draw(self, model: Model, text: TextEmbedding, setting: Setting, seed: int, weight: float) -> np.ndarray:
        """uint8 pictures of all captions; the noise of a caption is the same whatever the weight."""
        count, rows, side = len(self._captions), self._settings.draw_batch, model.stage.resolution
        sampling = Sampling(
            DPMSolverPP2M(), self._settings.sampling_steps, thresholding=thresholding(setting.thresholding)
        )
        drawn = []
        for first in range(0, count, rows):
            part = np.minimum(np.arange(first, first + rows), count - 1)
            keys = noise.sample_keys(jax.random.key(seed), jnp.asarray(part))
            said = TextEmbedding(text.embeddings[part], text.mask[part])
            weights = jnp.full(rows, weight, jnp.float32)
            null = null_text(model.stage, rows)
            found = draw(model.stage, model.params, sampling, said, null, keys, (side, side), weights=weights)
            drawn.append(to_uint8(np.asarray(found)[: count - first]))
        return np.concatenate(drawn)

    def _look(self, shown: PictureSet) -> dict[str, Observed]:
        return observe(shown, self._bench.extractors, self._settings.out / "seen")

    def _judged(self, seen: dict[str, Observed]) -> tuple[float, float]:
        """FD of the classifier and mean cosine of CLIP."""
        classifier, clip = (str(extractor) for extractor in self._bench.extractors[-2:])
        distance = fid.distance(seen[classifier].statistics, self._true[classifier].statistics)
        return distance, clip_score(self._texts, seen[clip].features).cosine


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

"""Real artwork, end to end: prepare the emoji dataset, pre-train T5 on its names, over-fit the tiny base model.

    python -m experiments.recipes.emoji

takes 64 emoji from all over the set and at most 20 minutes of training on 2 CPU cores (900 updates of about a second).
Expected: the right dominant colour in at least 80 % of the images sampled from their names; seen: 62 of 64 (2 cores
of an AMD EPYC, jax 0.10.2, 2026-11-24). Writes OUT/grid.png (above each other: the artwork and what was sampled) and
OUT/report.json. It needs npm and the network once, for the artwork (experiments.recipes.emoji_data).

The whole set on one GPU, 1,644 images with names of their own (not measured yet):

    python -m experiments.recipes.emoji --count 0 --steps 60000 --batch 256 --out runs/emoji-all
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import train
from experiments.cli import run
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.recipes import emoji_data
from experiments.table import TASKS
from experiments.tasks import diffusion, t5
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.core.files import write_json
from jaxdiff.data import grids
from jaxdiff.data.images import decode, to_float
from jaxdiff.data.mixture import spread
from jaxdiff.evaluation.colours import dominant
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.training.loop import Diverged
from jaxdiff.weights.stages import load_model
from jaxdiff.weights.t5 import load_text_encoder

COLUMNS = 16
TEXT_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Over-fit the tiny base model to emoji and sample them from their names."""

    out: Path = Path("runs/emoji")
    """Folder of the run."""
    count: int = 64
    """How many emoji, evenly spread over the set; 0: all."""
    text_steps: int = 300
    """Updates of T5 on the names."""
    steps: int = 900
    """Updates of the base model."""
    batch: int = 32
    """Images per update."""
    learning_rate: float = 2e-3
    """At its peak (Muon)."""
    shown: int = 64
    """How many are sampled and compared."""
    seed: int = 0
    """Of training and sampling."""
    data_dir: Path = Path("runs/data")
    """Where prepared datasets live."""


def main(settings: Settings) -> None:
    """Over-fit the tiny base model to emoji and sample them from their names."""
    if settings.shown < 1:
        raise ValueError(f"shown {settings.shown}: at least one emoji is sampled and compared")
    use_cores(TEXT_BATCH, settings.batch)
    emoji_data.main(settings.data_dir, resolutions=(64,))
    text = settings.out / "t5"
    data = DataOptions(("emoji",), limit=settings.count, data_dir=settings.data_dir)
    of_text = t5.Settings(
        text,
        run=RunOptions(settings.text_steps, TEXT_BATCH, ema_decay=0.99, save_every=100),
        dataset=DataOptions(("emoji",), data_dir=settings.data_dir),
        optimization=OptimizerOptions(learning_rate=2e-3),
        t5=t5.T5Options(vocab=2048),
    )
    train.main("t5", TASKS["t5"], of_text)
    of_images = diffusion.Settings(
        settings.out / "base64",
        run=RunOptions(settings.steps, settings.batch, ema_decay=0.995, seed=settings.seed),
        dataset=data,
        optimization=OptimizerOptions("muon", settings.learning_rate, warmup=60),
        text_encoder=TextOptions(str(text / "encoder")),
        # Where a name decides what there is to see.
        diffusion=diffusion.DiffusionOptions(logsnr=(-9.0, 0.0), logsnr_fraction=0.75, snr_power=0.0),
    )
    train.main("imagen.base64", TASKS["imagen.base64"], of_images)
    model = load_model(of_images.out / "model")
    encoder = load_text_encoder(text / "encoder", model.model.text.shape[0])
    source = diffusion.open_source(of_images, data.spec(), model.model)
    source = spread(source, settings.count) if settings.count else source
    shown = min(settings.shown, len(source))
    chosen = [source[i * len(source) // shown] for i in range(shown)]
    names = [example["caption"] for example in chosen]
    (drawn,) = imagen(encoder, model).sample(names, SampleOptions(seed=settings.seed))
    report(settings.out, names, [to_float(decode(example["image"])) for example in chosen], drawn)


def report(out: Path, names: list[str], artwork: list[np.ndarray], drawn: np.ndarray) -> None:
    """Compare colours; write the grid and the numbers."""
    colours = [(dominant(true), dominant(np.asarray(found))) for true, found in zip(artwork, drawn)]
    right = [true == found for true, found in colours]
    score = {
        "dominant_colour_accuracy": sum(right) / len(right),
        "images": [
            {"name": name, "colour": true, "drawn": found} for name, (true, found) in zip(names, colours, strict=True)
        ],
    }
    marks = [f"{name}{'' if ok else ' (colour!)'}" for name, ok in zip(names, right)]
    shown, captions = [], []
    for first in range(0, len(names), COLUMNS):  # a row of artwork, then the same row as it was sampled
        row = slice(first, first + COLUMNS)
        blank = [np.ones_like(artwork[0])] * (COLUMNS - len(names[row]))
        shown += [*artwork[row], *blank, *drawn[row], *blank]
        captions += [""] * COLUMNS + marks[row] + [""] * len(blank)
    grids.write(out / "grid.png", grids.grid(shown, captions, 96, COLUMNS, font_size=9))
    write_json(out / "report.json", score)
    print(f"{out / 'grid.png'}: dominant colour right in {sum(right)} of {len(right)}")


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

"""Real artwork, end to end: prepare the emoji set, pre-train T5 on its names, over-fit the tiny base model, redraw.

    python -m experiments.imagen.emoji

takes 64 emoji from all over the set and at most 20 minutes of training on 2 CPU cores (900 updates of about a second).
Expected: the right dominant colour in at least 80 % of the pictures redrawn from their names; seen: 62 of 64 (2 cores
of an AMD EPYC, jax 0.10.2, 2026-11-24). Writes OUT/grid.png (above each other: the artwork and what was drawn) and
OUT/report.json. It needs npm and the network once, for the artwork (experiments.data.emoji).

The whole set on one GPU, 1,644 pictures with names of their own (not measured yet):

    python -m experiments.imagen.emoji --count 0 --steps 60000 --batch 256 --out runs/emoji-all
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.cli import run
from experiments.cores import use_cores
from experiments.data import emoji as preparation
from experiments.imagen import pictures, train
from experiments.text.pretrain import Pretraining, pretrain
from jaxdiff.core.files import write_json
from jaxdiff.data.images import decode, to_float
from jaxdiff.evaluation.colours import dominant
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.training.loop import Diverged
from jaxdiff.weights.imagen import load_model
from jaxdiff.weights.t5 import load_text_encoder

COLUMNS = 16
TEXT_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Over-fit the tiny base model to emoji and redraw them from their names."""

    out: Path = Path("runs/emoji")
    """Folder of the run."""
    count: int = 64
    """How many emoji, evenly spread over the set; 0: all."""
    text_steps: int = 300
    """Updates of T5 on the names."""
    steps: int = 900
    """Updates of the base model."""
    batch: int = 32
    """Pictures per update."""
    learning_rate: float = 2e-3
    """At its peak (Muon)."""
    shown: int = 64
    """How many are redrawn and judged."""
    seed: int = 0
    """Of training and drawing."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Settings) -> None:
    """Over-fit the tiny base model to emoji and redraw them from their names."""
    if settings.shown < 1:
        raise ValueError(f"shown {settings.shown}: at least one emoji is redrawn and judged")
    use_cores(TEXT_BATCH, settings.batch)
    preparation.main(settings.data_dir, resolutions=(64,))
    text = settings.out / "t5"
    pretrain(
        Pretraining(
            data="emoji",
            out=text,
            vocab=2048,
            batch=TEXT_BATCH,
            steps=settings.text_steps,
            save_every=100,
            data_dir=settings.data_dir,
        )
    )
    run_settings = train.Run(
        stage="base64",
        out=settings.out / "base64",
        data="emoji",
        text=str(text / "encoder"),
        limit=settings.count,
        steps=settings.steps,
        batch=settings.batch,
        logsnr=(-9.0, 0.0),  # where a name decides what there is to see
        logsnr_fraction=0.75,
        snr_power=0.0,
        optimizer="muon",
        learning_rate=settings.learning_rate,
        warmup=60,
        ema_decay=0.995,
        seed=settings.seed,
        data_dir=settings.data_dir,
    )
    train.main(run_settings)
    model = load_model(run_settings.out / "model")
    encoder = load_text_encoder(text / "encoder", model.model.text.shape[0])
    source = train.open_source(run_settings, model.model)
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
        "pictures": [
            {"name": name, "colour": true, "drawn": found} for name, (true, found) in zip(names, colours, strict=True)
        ],
    }
    marks = [f"{name}{'' if ok else ' (colour!)'}" for name, ok in zip(names, right)]
    shown, captions = [], []
    for first in range(0, len(names), COLUMNS):  # a row of artwork, then the same row as it was drawn
        row = slice(first, first + COLUMNS)
        blank = [np.ones_like(artwork[0])] * (COLUMNS - len(names[row]))
        shown += [*artwork[row], *blank, *drawn[row], *blank]
        captions += [""] * COLUMNS + marks[row] + [""] * len(blank)
    pictures.write(out / "grid.png", pictures.grid(shown, captions, 96, COLUMNS, font_size=9))
    write_json(out / "report.json", score)
    print(f"{out / 'grid.png'}: dominant colour right in {sum(right)} of {len(right)}")


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

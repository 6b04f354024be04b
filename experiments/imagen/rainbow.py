"""The composition benchmark, end to end: train on 30 % of `rainbow`, draw what was left out, read it exactly.

    python -m experiments.imagen.rainbow

pre-trains T5 on the training captions, trains the 32×32 base model on their 2,765 pictures and draws the held-out
captions, about 4,700 (`--n` draws fewer). Right is a picture in which all six attributes are read back as its caption
says (`jaxdiff.evaluation.rainbow`). Cost and result are in experiments/README.md. Writes OUT/grid.png (above each
other: the held-out picture and what was drawn, wrong ones first) and OUT/report.json. Run again, it goes on where it
was.
"""

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments.cli import run
from experiments.cores import use_cores
from experiments.imagen import pictures, train
from experiments.imagen.drawing import Bars
from experiments.text.pretrain import Pretraining, pretrain
from jaxdiff.core.files import write_json
from jaxdiff.data.images import to_float
from jaxdiff.data.rainbow import EVERY, Attributes, draw, split
from jaxdiff.evaluation.rainbow import NAMES, Read, read
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.training.loop import Diverged
from jaxdiff.weights.imagen import load_model
from jaxdiff.weights.t5 import load_text_encoder

COLUMNS, ROWS = 12, 4
TEXT_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Train on 30 % of `rainbow` and draw the rest."""

    out: Path = Path("runs/rainbow")
    """Folder of the run."""
    preset: str = "tiny"
    """Size of the base model: micro | small | medium | tiny."""
    text_steps: int = 600
    """Updates of T5 on the training captions."""
    steps: int = 4000
    """Updates of the base model."""
    batch: int = 32
    """Pictures per update."""
    learning_rate: float = 2e-3
    """At its peak (Muon)."""
    n: int = 0
    """Held-out captions to draw, from the first; 0: all of them."""
    draw_batch: int = 64
    """Pictures drawn at once."""
    seed: int = 0
    """Of training and drawing; what is held out is always the same."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Settings) -> None:
    """Train on 30 % of `rainbow` and draw the rest."""
    if settings.n < 0 or settings.draw_batch < 1:
        raise ValueError(f"n {settings.n}, draw_batch {settings.draw_batch}: n cannot be negative, a batch not empty")
    use_cores(TEXT_BATCH, settings.batch)
    started = time.monotonic()
    text = settings.out / "t5"
    pretrain(
        Pretraining(
            data="rainbow",
            out=text,
            batch=TEXT_BATCH,
            steps=settings.text_steps,
            save_every=200,
            data_dir=settings.data_dir,
        )
    )
    base = train.Run(
        stage="base32",
        preset=settings.preset,
        out=settings.out / "base32",
        data="rainbow",
        text=str(text / "encoder"),
        steps=settings.steps,
        batch=settings.batch,
        optimizer="muon",
        learning_rate=settings.learning_rate,
        warmup=50,
        ema_decay=0.995,
        seed=settings.seed,
        data_dir=settings.data_dir,
    )
    train.main(base)
    trained = time.monotonic() - started
    model = load_model(base.out / "model")
    places = split("test")[: settings.n or None]
    encoder = load_text_encoder(text / "encoder", model.model.text.shape[0])
    drawn = _drawn(imagen(encoder, model), places, settings)
    asked = [EVERY[place] for place in places]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    made_by = {"parameters": parameters, "pictures_seen": settings.steps * settings.batch, "seed": settings.seed}
    made_by |= {"seconds_of_training_in_this_run": trained, "device": jax.devices()[0].device_kind}
    report(settings.out, asked, drawn, made_by)


def _drawn(model: Pipeline, places: tuple[int, ...], settings: Settings) -> np.ndarray:
    captions = [EVERY[place].caption for place in places]
    with Bars(model) as bars:
        (drawn,) = model.sample(captions, SampleOptions(seed=settings.seed, batch=settings.draw_batch), bars)
    return drawn


def report(out: Path, asked: list[Attributes], drawn: np.ndarray, made_by: dict) -> None:
    """Read the pictures; write the numbers and a sheet."""
    found = read(drawn)
    scores = scores_of(asked, found)
    write_json(out / "report.json", {**scores, "made_by": made_by})
    order = sorted(range(len(asked)), key=lambda i: found[i].right(asked[i]))[: COLUMNS * ROWS]
    shown, captions = [], []
    for first in range(0, len(order), COLUMNS):  # a row of true pictures, then the same row as it was drawn
        row = order[first : first + COLUMNS]
        blank = [np.ones_like(drawn[0])] * (COLUMNS - len(row))
        shown += [*(to_float(draw(asked[i])) for i in row), *blank, *(drawn[i] for i in row), *blank]
        said = [("" if found[i].right(asked[i]) else "WRONG: ") + asked[i].caption for i in row]
        captions += [*[""] * COLUMNS, *said, *[""] * len(blank)]
    pictures.write(out / "grid.png", pictures.grid(shown, captions, 96, COLUMNS, font_size=9))
    print(f"{out / 'grid.png'}: {scores['right']:.2%} of {len(asked)} held-out captions drawn right in every attribute")
    print(", ".join(f"{name} {share:.2%}" for name, share in scores["attributes"].items()))


def scores_of(asked: list[Attributes], found: list[Read]) -> dict:
    """Shares that are right, and of the wrong ones how many in each set of wrong attributes."""
    checks = [read.attributes(each) for read, each in zip(found, asked, strict=True)]
    right = [read.right(each) for read, each in zip(found, asked)]
    wrong = Counter(_wrong(read, check) for read, check, ok in zip(found, checks, right) if not ok)
    return {
        "count": len(asked),
        "right": statistics.mean(right),
        "attributes": {name: statistics.mean(check[name] for check in checks) for name in NAMES},
        "wrong": dict(wrong.most_common()),
        "explained": statistics.mean(read.explained for read in found),
    }


def _wrong(read: Read, check: dict[str, bool]) -> str:
    if not read.found:
        return "no picture of the set"
    return ", ".join(name for name in NAMES if not check[name])


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

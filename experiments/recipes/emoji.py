"""Real artwork, end to end: prepare the emoji dataset, pre-train T5 on its names, over-fit the tiny base model.

    python -m experiments.recipes.emoji

Uses 64 emoji, evenly spread over the dataset, and at most 20 minutes of training on 2 CPU cores (900 updates of about a
second). Expected: the right dominant colour in at least 80 % of the images sampled from their names; measured: 62 of 64
(2 cores of an AMD EPYC, jax 0.10.2, 2026-11-24, when near-white pixels still counted as a colour). Writes OUT/grid.png
and OUT/report.json, as `experiments.evaluate colours` does. Needs npm and the network once, for the artwork
(experiments.recipes.emoji_data).

The full dataset on one GPU, 1,644 images with different names (not measured yet):

    python -m experiments.recipes.emoji --count 0 --steps 60000 --batch 256 --out runs/emoji-all
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import train
from experiments.cli import run
from experiments.evaluations import colours
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.options.weights import WeightsOptions
from experiments.recipes import emoji_data
from experiments.table import TASKS
from experiments.tasks import diffusion, t5
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.training.loop import Diverged

TEXT_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Over-fit the tiny base model to emoji and sample them from their names."""

    out: Path = Path("runs/emoji")
    """Folder of the run."""
    count: int = 64
    """Number of emoji, evenly spread over the dataset; 0: all."""
    text_steps: int = 300
    """Updates of T5 on the names."""
    steps: int = 900
    """Updates of the base model."""
    batch: int = 32
    """Images per update."""
    learning_rate: float = 2e-3
    """Peak learning rate (Muon)."""
    shown: int = 64
    """Number of emoji to sample and compare."""
    seed: int = 0
    """Seed of training and sampling."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


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
        # Noise levels at which the name determines the image.
        diffusion=diffusion.DiffusionOptions(logsnr=(-9.0, 0.0), logsnr_fraction=0.75, snr_power=0.0),
    )
    train.main("imagen.base64", TASKS["imagen.base64"], of_images)
    score = colours.Settings(
        "emoji",
        settings.count,
        settings.shown,
        seed=settings.seed,
        json=settings.out / "report.json",
        grid=settings.out / "grid.png",
        pipeline=WeightsOptions((str(of_images.out),)),
        data_dir=settings.data_dir,
    )
    colours.main(score, TASKS)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

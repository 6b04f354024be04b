"""Evaluate trained models.

    python -m experiments.evaluate attributes --n 100 --objects 1 --up-to 64 --json scores.json
    python -m experiments.evaluate psnr --json psnr.json
    python -m experiments.evaluate metrics --weights runs/cascade --data shapes
    python -m experiments.evaluate reconstruction --autoencoder runs/autoencoder
    python -m experiments.evaluate retrieval --clip runs/clip/model

The docstrings of `experiments/evaluations/` describe each metric and its cost.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from experiments.cli import Command, run
from experiments.evaluations import attributes, colours, metrics, psnr, reconstruction, retrieval, zero_shot
from experiments.table import TASKS
from experiments.tasks.task import Task

EVALUATIONS: dict[str, tuple[Callable[[Any, Mapping[str, Task]], None], Any]] = {
    "attributes": (attributes.main, attributes.Settings()),
    "colours": (colours.main, colours.Settings()),
    "psnr": (psnr.main, psnr.Settings()),
    "metrics": (metrics.main, metrics.Settings()),
    "reconstruction": (reconstruction.main, reconstruction.Settings()),
    "retrieval": (retrieval.main, retrieval.Settings()),
    "zero-shot": (zero_shot.main, zero_shot.Settings()),
}


def commands(tasks: Mapping[str, Task] = TASKS) -> dict[str, Command]:
    """One command per evaluation. tasks: the models whose runs can be sampled."""
    return {
        name: Command(partial(main, tasks=tasks), settings, (main.__doc__ or "").strip())
        for name, (main, settings) in EVALUATIONS.items()
    }


if __name__ == "__main__":
    run(commands())

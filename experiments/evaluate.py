"""Measure: does a model do what it is for?

    python -m experiments.evaluate attributes --n 100 --objects 1 --up-to 64 --json scores.json
    python -m experiments.evaluate psnr --json psnr.json
    python -m experiments.evaluate metrics --weights runs/cascade --data shapes
    python -m experiments.evaluate retrieval --clip runs/clip/model

What each measures, with its cost, is in the docstrings of `experiments/evaluations/`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from experiments.cli import Command, run
from experiments.evaluations import attributes, colours, metrics, psnr, retrieval, zero_shot
from experiments.table import TASKS
from experiments.tasks.task import Task

EVALUATIONS: dict[str, tuple[Callable[[Any, Mapping[str, Task]], None], Any]] = {
    "attributes": (attributes.main, attributes.Settings()),
    "colours": (colours.main, colours.Settings()),
    "psnr": (psnr.main, psnr.Settings()),
    "metrics": (metrics.main, metrics.Settings()),
    "retrieval": (retrieval.main, retrieval.Settings()),
    "zero-shot": (zero_shot.main, zero_shot.Settings()),
}


def commands(tasks: Mapping[str, Task] = TASKS) -> dict[str, Command]:
    """A command for each evaluation. `tasks`: whose runs can be sampled from."""
    return {
        name: Command(partial(main, tasks=tasks), settings, (main.__doc__ or "").strip())
        for name, (main, settings) in EVALUATIONS.items()
    }


if __name__ == "__main__":
    run(commands())

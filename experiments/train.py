"""Train a model: a stage of Imagen, a T5, a CLIP, a classifier.

    python -m experiments.train imagen.base64 --preset tiny --data shapes --out runs/base64 --steps 5000
    python -m experiments.train --help                   # lists the models
    python -m experiments.train imagen.base64 --help     # lists the settings of one
    python -m experiments.train --config runs/base64/settings.json --steps 8000 --out runs/longer

Started again with the same folder, a run resumes from its last checkpoint. OUT gets settings.json (for `--config`),
checkpoints/, metrics.jsonl, tensorboard/, loss.png and, at the end, the model. The docstrings of `experiments/tasks/`
have the purpose, commands and costs of each model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from experiments.cli import Command, run
from experiments.options import settings_file
from experiments.options.cores import use_cores
from experiments.table import TASKS
from experiments.tasks.task import Start, Task
from jaxdiff.training.checkpoints import SettingsDifferError
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.distributed import alike, gathered, on_process_0, start
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged, Hooks, Layout, Loaded, train
from jaxdiff.training.resume import RunFinishedError


def commands(tasks: Mapping[str, Task] = TASKS) -> dict[str, Command]:
    """A command for each line of the table."""
    return {name: Command(partial(main, name, task), task.settings, task.about) for name, task in tasks.items()}


def main(name: str, task: Task, settings: Any) -> None:
    """Train a model of the table and write it to --out."""
    processes = start(settings.cluster)  # must precede any use of a device
    alike(vars(settings))
    try:
        with locked(settings.out):
            _train(name, task, settings, processes)
    except ValueError as error:
        if (message := settings_file.in_flags(str(error), settings)) == str(error):
            raise
        raise ValueError(message) from error


def _train(name: str, task: Task, settings: Any, processes: int) -> None:
    """Train in a folder locked by this run."""
    run_options = settings.run
    use_cores(max(1, run_options.batch // max(1, run_options.accumulate * processes)), least=task.least_on_a_core)
    # Reject bad settings before anything is rasterised, embedded or written.
    config = task.config(settings, name)
    if run_options.batch < task.least_batch:
        raise ValueError(f"--batch {run_options.batch}: at least {task.least_batch} for {name}")
    mesh = settings.devices.make(run_options.batch, run_options.accumulate)
    work = task.prepare(settings, Start(processes, mesh))
    on_process_0(lambda: print(f"{name}, preset {settings.preset}: {_summary(config)}"))

    def begin() -> None:
        work.begin()
        settings_file.save(settings.out / settings_file.NAME, name, settings)

    if not settings.resumes:  # otherwise the loop may still reject these settings
        on_process_0(begin)
    with _explained(name, task, settings):
        state = train(
            work.model,
            work.batches,
            config,
            settings.out,
            data=work.data,
            layout=Layout(mesh, work.placement),
            loaded=Loaded(work.initial, work.frozen, work.initial_extra),
            hooks=Hooks(work.sample_hook, work.held_out),
        )
    params, extra = gathered((state.ema, state.extra))

    def finish() -> None:
        print(work.finish(params, extra))
        settings_file.save(settings.out / settings_file.NAME, name, settings)

    on_process_0(finish)


def _summary(config: TrainConfig) -> str:
    """The values that a command line may leave to the preset and the number of steps."""
    optimizers = config.optimizer.values() if isinstance(config.optimizer, Mapping) else [config.optimizer]
    rules = [f"{type(each.kind).__name__} at {each.learning_rate:g}, warmup {each.warmup}" for each in optimizers]
    return f"{'; '.join(rules)}, {config.steps} steps, a checkpoint every {config.save_every}"


@contextmanager
def _explained(name: str, task: Task, settings: Any) -> Iterator[None]:
    """Name the flags that differ from a run's, and the command that continues from a finished run."""
    kept = settings.out / settings_file.NAME
    try:
        yield
    except RunFinishedError as error:
        start = f" --init {settings.out}" if task.takes_init else ""
        line = f"python -m experiments.train {name} --config {kept}{start} --steps {settings.run.steps}"
        begin = " from its averaged parameters" if task.takes_init else ""
        raise ValueError(f"{error}{begin}: {line} --out {settings.out}-2") from error
    except SettingsDifferError as error:
        changed = settings_file.changed(kept, settings) if kept.is_file() else []
        if not changed:
            raise
        raise ValueError(f"{', '.join(changed)}: flags that differ from {kept} ({error})") from error


if __name__ == "__main__":
    run(commands(), stopped_by=(Diverged,))

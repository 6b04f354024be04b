"""`train`: the loop around the compiled step, with logs, samples, checkpoints and resumption.

The code between two steps is in `iteration.py`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdiff.core.clock import clock
from jaxdiff.core.settings import flatten
from jaxdiff.core.trees import digest_of
from jaxdiff.training import multihost
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.distributed import agree, check_shared
from jaxdiff.training.held_out import HeldOut, HeldOutBatches
from jaxdiff.training.interruption import Interruption, InterruptRequested, Preempted
from jaxdiff.training.iteration import Iteration, Outside
from jaxdiff.training.lock import locked
from jaxdiff.training.mesh import check_processes, make_mesh
from jaxdiff.training.metrics import PLOT, plot
from jaxdiff.training.param_sharding import BY_SHAPE, ParamSharding
from jaxdiff.training.prefetch import Batches, Prefetch
from jaxdiff.training.reporter import Diverged, Reporter
from jaxdiff.training.resume import adapted, comparable
from jaxdiff.training.state import (
    Metrics,
    Params,
    Trainable,
    TrainState,
    abstract_state,
    init_state,
    place_frozen,
    placements_of,
)
from jaxdiff.training.step import make_step
from jaxdiff.training.watchdog import Watchdog

VERSION = 3
"""Version of the checkpoint content. 1 had no version field and named settings by bare class names; 2 had no
`extra`."""


@dataclass(frozen=True)
class Layout:
    """The mesh (None: all devices along `data`), and how parameters are split over it."""

    mesh: Mesh | None = None
    sharding: ParamSharding = BY_SHAPE


@dataclass(frozen=True)
class Loaded:
    """Loaded arrays, on the host or on devices; every process needs all of them.

    params, extra: initial ones instead of the trainable's own. frozen: arrays that the loss reads and never updates.
    """

    params: Params | None = None
    frozen: Any = ()
    extra: Any = None


@dataclass(frozen=True)
class Hooks:
    """Hooks that get the averaged parameters at regular steps and after the last one.

    sample: called with the step, the parameters and `extra` every `sample_every` steps; it must not keep a reference to
        them.
    held_out: the batches whose losses are logged every `evaluate_every` steps, as `held_out_loss` and the trainable's
        further metrics (`held_out.HasHeldOutLosses`).
    """

    sample: Callable[[int, Params, Any], None] | None = None
    held_out: HeldOutBatches | None = None


def train(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    layout: Layout = Layout(),
    loaded: Loaded = Loaded(),
    hooks: Hooks = Hooks(),
) -> TrainState:
    """Train until `config.steps` and return the last state; resumes if `out` has a checkpoint.

    Writes into `out`: checkpoints/, metrics.jsonl, tensorboard/, loss.png. `data` describes the batches (the dataset,
    its size, the batch size): resuming with other data or other frozen arrays is refused. `layout` and `hooks` may
    change between starts, and `config.steps` if the learning rate schedule allows it (`training.resume`). With several
    processes (`distributed.start`) all of them make the same call with a shared folder; hooks are called on all,
    because the parameters are sharded over them.

    Raises Diverged; Preempted, after saving; ValueError for an unreadable checkpoint, one with other settings
    (checkpoints.SettingsDifferError), more steps than a finished run can take (resume.RunFinishedError), a batch that
    does not divide over the devices, data that ends, and processes that differ; OSError if saving fails or `out` is
    deleted; multihost.FolderInUseError if another run holds `out` or takes it over; multihost.PeerLostError if another
    process is lost. If one process raises, the others end too.
    """
    out = Path(out)
    with locked(out) as lock:  # before reading, deleting or writing anything in the folder
        mesh = make_mesh() if layout.mesh is None else layout.mesh
        check_processes(mesh)
        fixed = flatten(_fixed(trainable, config, data, loaded.frozen))
        agree("settings", {**fixed, **flatten({"config": config, "mesh": dict(mesh.shape)})})
        check_shared(out)
        folder = out / "checkpoints"
        allowed = lambda step, saved: adapted(step, saved, fixed, config.optimizer, config.steps, out)  # noqa: E731
        # Signals are held back until the checkpoint is on disk, which is when `Checkpoints` exits.
        with (
            _announced(),
            jax.set_mesh(mesh),
            Interruption() as interruption,
            Watchdog(out, config.stall, config.stall_exit) as watchdog,
            Checkpoints(folder, fixed, config.keep, lambda: lock.check(folder), allowed) as checkpoints,
            _ended_together(),
        ):
            with _stopped_early(interruption), _preparing(config):
                begun = _begin(trainable, batches, config, replace(layout, mesh=mesh), loaded, checkpoints)
                first = int(begun.state.step)
                feed = Prefetch(batches, mesh, config.accumulate, config.steps - first)
            shown = config.progress, config.description, config.unit
            reporter = Reporter(out, config.log_every, config.steps, first, *shown)
            evaluation = _evaluation(trainable, begun, mesh, hooks) if config.evaluate_every else None
            sample = hooks.sample if config.sample_every else None
            outside = Outside(checkpoints, reporter, interruption, watchdog, lock)
            loop = Iteration(begun.state, first, begun.step, feed, config, outside, evaluation, sample)
            with _reported(out, reporter, lambda: lock.check(folder)):
                state = loop.run()
        lock.check(folder)
        if multihost.index() == 0 and (loop.wrote or not (out / PLOT).is_file()):
            plot(out)
        return state


def _fixed(trainable: Trainable, config: TrainConfig, data: Mapping[str, Any] | None, frozen: Any) -> dict[str, Any]:
    """The settings that must not change when a run resumes; `resume` allows changes of `steps` and the schedule."""
    return {
        "version": VERSION,
        "steps": config.steps,
        "stage": trainable,
        "optimizer": comparable(config.optimizer),
        "accumulate": config.accumulate,
        "ema_decay": config.ema_decay,
        "ema_warmup": config.ema_warmup,
        "seed": config.seed,
        "data": dict(data or {}),
        "frozen": f"arrays of hash {digest_of(frozen)}" if jax.tree.leaves(frozen) else "nothing",
    }


@dataclass(frozen=True)
class _Begun:
    """The initial or restored state, the placements of states, the frozen arrays on the devices, and the compiled
    step."""

    state: TrainState
    placements: TrainState
    frozen: Any
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def _begin(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    layout: Layout,
    loaded: Loaded,
    checkpoints: Checkpoints,
) -> _Begun:
    """Initialise, or restore the newest checkpoint, including the state of `batches`."""
    assert layout.mesh is not None
    where = layout.mesh, layout.sharding
    abstract = abstract_state(trainable, config.optimizer, *where)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    if checkpoints.latest() is None:
        state = init_state(
            trainable, config.optimizer, init_key, layout.mesh, loaded.params, layout.sharding, loaded.extra
        )
    else:
        state, place = checkpoints.restore(abstract)
        batches.set_state(place)
    frozen = place_frozen(loaded.frozen, *where)
    step = make_step(
        trainable,
        config.optimizer,
        placements_of(abstract),
        frozen=placements_of(frozen),
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup,
    )
    return _Begun(state, placements_of(abstract), frozen, lambda state, batch: step(state, batch, key, frozen))


def _evaluation(trainable: Trainable, begun: _Begun, mesh: Mesh, hooks: Hooks) -> HeldOut | None:
    if hooks.held_out is None:
        return None
    return HeldOut(trainable, begun.placements, begun.frozen, mesh, hooks.held_out)


def _preparing(config: TrainConfig) -> AbstractContextManager[None]:
    """On a terminal, a line with the elapsed time until the progress bar appears (initialisation is compiled)."""
    shown = config.progress and multihost.index() == 0 and sys.stderr.isatty()
    return clock(f"{config.description or 'training'}: preparing", leave=False) if shown else nullcontext()


@contextmanager
def _announced() -> Iterator[None]:
    """Print why the run stopped, after its checkpoint is on disk."""
    try:
        yield
    except Preempted as stop:
        if multihost.index() == 0:
            print(stop.message, file=sys.stderr)
        raise


@contextmanager
def _reported(out: Path, reporter: Reporter, check: Callable[[], None]) -> Iterator[None]:
    """Close the logs in any case; plot the loss if it diverged. `check` raises if the folder is gone, which then
    replaces an OSError."""
    try:
        yield
    except OSError:
        check()
        raise
    except Diverged:
        if multihost.index() == 0:
            plot(out)
        raise
    finally:
        reporter.close()


@contextmanager
def _stopped_early(interruption: Interruption) -> Iterator[None]:
    """Before the first step a signal stops at once, because there is nothing to save."""
    try:
        with interruption.at_once():
            yield
    except InterruptRequested:
        raise Preempted(f"stopped by {interruption.name} before a step was taken; run again to go on") from None


@contextmanager
def _ended_together() -> Iterator[None]:
    """On a failure of this process, end the others, which may wait for it in a collective.

    Diverged is excluded: all processes raise it after the same step.
    """
    try:
        with multihost.together():
            yield
    except Diverged:
        raise
    except Exception as error:
        multihost.end_soon(error)
        raise

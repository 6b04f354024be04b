"""The loop around the compiled step, with logs, samples, checkpoints, and resumption by running again.

What runs between two steps is `iteration.py`.
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
"""Of what a checkpoint holds. 1, which did not say so, named settings by the bare names of their classes; 2 had no
`extra`."""


@dataclass(frozen=True)
class Layout:
    """The mesh, all devices along `data` where it is None, and how parameters are split over it."""

    mesh: Mesh | None = None
    sharding: ParamSharding = BY_SHAPE


@dataclass(frozen=True)
class Loaded:
    """Arrays from elsewhere, on the host or on devices, with several processes all of them in each.

    params: to start from in place of the trainable's own. frozen: what its loss reads and never updates.
    """

    params: Params | None = None
    frozen: Any = ()


@dataclass(frozen=True)
class Hooks:
    """What is done beside the steps, with the averaged parameters, every so many of them and after the last.

    sample: called with the step and the parameters every `sample_every` steps; it must not keep them.
    held_out: the batches whose losses are logged every `evaluate_every` steps, as `held_out_loss` and what else the
        trainable says of them (`held_out.HasHeldOutLosses`).
    """

    sample: Callable[[int, Params], None] | None = None
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
    """Train until `config.steps` and return the last state; run again with the same folder, it goes on from there.

    Writes into `out`: checkpoints/, metrics.jsonl, tensorboard/, loss.png. `data` says what the batches are made of
    (the dataset, its size, the batch): to go on with other data than the run began with is refused, and so are other
    frozen arrays. `layout` and `hooks` may change from one start to the next, and `config.steps` where the learning
    rate allows it (`training.resume`). Of several processes (`distributed.start`) all call this alike, with a folder
    that they share; hooks are called on all of them, since the parameters are spread over them.

    Raises Diverged; Preempted, after saving; ValueError for a checkpoint that cannot be read, or of other settings
    (checkpoints.SettingsDifferError), more steps than a finished run can take (resume.RunFinishedError), a batch that
    does not divide over the devices, data that ends, processes that differ; OSError where saving fails or
    `out` is deleted meanwhile; multihost.FolderInUseError where another run has `out` or takes it over;
    multihost.PeerLostError where another process is gone. Where one process raises, the others end too.
    """
    out = Path(out)
    with locked(out) as lock:  # before anything is read, deleted or written there
        mesh = make_mesh() if layout.mesh is None else layout.mesh
        check_processes(mesh)
        fixed = flatten(_fixed(trainable, config, data, loaded.frozen))
        agree("settings", {**fixed, **flatten({"config": config, "mesh": dict(mesh.shape)})})
        check_shared(out)
        folder = out / "checkpoints"
        allowed = lambda step, saved: adapted(step, saved, fixed, config.optimizer, config.steps, out)  # noqa: E731
        # Signals are held back until what they asked to save is on disk, which is when the checkpoints are left.
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
    """What must be the same where a run goes on; `steps` and the schedule as `resume` allows."""
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
    """The first state or that of the newest checkpoint, the placements of such states, the frozen arrays on the
    devices, and the step of state and batch."""

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
    """Sets the batches to the place of the newest checkpoint too."""
    assert layout.mesh is not None
    where = layout.mesh, layout.sharding
    abstract = abstract_state(trainable, config.optimizer, *where)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    if checkpoints.latest() is None:
        state = init_state(trainable, config.optimizer, init_key, layout.mesh, loaded.params, layout.sharding)
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
    """On a terminal, a line with the time that goes by until there is a bar: what draws the parameters is compiled."""
    shown = config.progress and multihost.index() == 0 and sys.stderr.isatty()
    return clock(f"{config.description or 'training'}: preparing", leave=False) if shown else nullcontext()


@contextmanager
def _announced() -> Iterator[None]:
    """Say why the run stops, once what it saved is on disk."""
    try:
        yield
    except Preempted as stop:
        if multihost.index() == 0:
            print(stop.message, file=sys.stderr)
        raise


@contextmanager
def _reported(out: Path, reporter: Reporter, check: Callable[[], None]) -> Iterator[None]:
    """Close the logs at the end, however it comes; plot the loss where it diverged. `check` raises where the folder is
    gone, which is then what to say of an OSError."""
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
    """Before the first step there is nothing to save, and a signal stops at once."""
    try:
        with interruption.at_once():
            yield
    except InterruptRequested:
        raise Preempted(f"stopped by {interruption.name} before a step was taken; run again to go on") from None


@contextmanager
def _ended_together() -> Iterator[None]:
    """A failure of this process alone: the others, which may wait for it in a collective, are made to end.

    Diverged is none: it is raised by all, after the same step.
    """
    try:
        with multihost.together():
            yield
    except Diverged:
        raise
    except Exception as error:
        multihost.end_soon(error)
        raise

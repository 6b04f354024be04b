"""The loop around the compiled step, with logs, samples, checkpoints, and resumption by running again.

The host only hands over batches. It keeps at most two steps in flight, reads a log interval's metrics while the next
step already runs, and learns of losses that are not finite from counters that live on the devices.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdiff.core.settings import flatten
from jaxdiff.core.trees import digest_of
from jaxdiff.training import multihost
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.distributed import agree, check_shared
from jaxdiff.training.interruption import Interruption, InterruptRequested, Preempted
from jaxdiff.training.lock import FolderLock, locked
from jaxdiff.training.mesh import check_processes, make_mesh
from jaxdiff.training.metrics import PLOT, plot
from jaxdiff.training.optimizer import OptimizerConfig, Optimizers
from jaxdiff.training.param_sharding import BY_SHAPE, ParamSharding
from jaxdiff.training.prefetch import Batches, Prefetch
from jaxdiff.training.reporter import Diverged, Reporter
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
class TrainConfig:
    """How long and how to train. Raises ValueError for a setting that makes no sense."""

    optimizer: Optimizers = field(default_factory=OptimizerConfig)  # of all arrays, or one for each label
    steps: int = 2_500_000
    accumulate: int = 1  # parts that a batch is taken in
    ema_decay: float = 0.9999  # a convention; the paper prints none
    ema_warmup: bool = True  # decay min(ema_decay, (1 + n) / (10 + n)) after n updates
    log_every: int = 100
    sample_every: int = 0  # 0: never
    save_every: int = 1000
    keep: int = 3  # checkpoints
    seed: int = 0
    stall: float = 0.0  # seconds without progress after which that is reported with stacks; 0: never
    stall_exit: float = 0.0  # and after which the process ends, and with it the others of the run; 0: never
    progress: bool = True  # whether a bar is shown
    description: str = ""  # of the bar

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("stall", "stall_exit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 (never) or more")
        if self.sample_every < 0:
            raise ValueError(f"sample_every {self.sample_every}: must be 0 (never) or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: must be at least 0 and below 2**32")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be at least 0 and below 1")


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


def train(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    layout: Layout = Layout(),
    loaded: Loaded = Loaded(),
    sample_hook: Callable[[int, Params], None] | None = None,
) -> TrainState:
    """Train until `config.steps` and return the last state; run again with the same folder, it goes on from there.

    Writes into `out`: checkpoints/, metrics.jsonl, tensorboard/, loss.png. `data` says what the batches are made of
    (the dataset, its size, the batch): to go on with other data than the run began with is refused, and so are other
    frozen arrays. `layout` may change from one start to the next. `sample_hook(step, averaged parameters)` is called
    every `sample_every` steps and after the last; it must not keep the parameters.
    Of several processes (`distributed.start`) all call this alike, with a folder that they share; the hook is called on
    all of them, since the parameters are spread over them.

    Raises Diverged; Preempted, after saving; ValueError for a checkpoint of other settings or that cannot be read, a
    batch that does not divide over the devices, data that ends, processes that differ; OSError where saving fails or
    `out` is deleted meanwhile; multihost.FolderInUseError where another run has `out` or takes it over;
    multihost.PeerLostError where another process is gone. Where one process raises, the others end too.
    """
    out = Path(out)
    with locked(out) as lock:  # before anything is read, deleted or written there
        mesh = make_mesh() if layout.mesh is None else layout.mesh
        check_processes(mesh)
        fixed = _fixed(trainable, config, data, loaded.frozen)
        agree("settings", flatten({**fixed, "config": config, "mesh": dict(mesh.shape)}))
        check_shared(out)
        folder = out / "checkpoints"
        # Signals are held back until what they asked to save is on disk, which is when the checkpoints are left.
        with (
            _announced(),
            jax.set_mesh(mesh),
            Interruption() as interruption,
            Watchdog(out, config.stall, config.stall_exit) as watchdog,
            Checkpoints(folder, flatten(fixed), config.keep, lambda: lock.check(folder)) as checkpoints,
            _ended_together(),
        ):
            with _stopped_early(interruption):
                state, step = _begin(trainable, batches, config, replace(layout, mesh=mesh), loaded, checkpoints)
                first = int(state.step)
                feed = Prefetch(batches, mesh, config.accumulate, config.steps - first)
            reporter = Reporter(out, config.log_every, config.steps, first, config.progress, config.description)
            loop = _Loop(state, first, step, feed, config, checkpoints, reporter, interruption, watchdog, lock)
            with _reported(out, reporter, lambda: lock.check(folder)):
                state = loop.run(sample_hook if config.sample_every else None)
        lock.check(folder)
        if multihost.index() == 0 and (first < config.steps or not (out / PLOT).is_file()):
            plot(out)
        return state


def _fixed(trainable: Trainable, config: TrainConfig, data: Mapping[str, Any] | None, frozen: Any) -> dict[str, Any]:
    """What must be the same where a run goes on."""
    return {
        "version": VERSION,
        "stage": trainable,
        "optimizer": config.optimizer,
        "accumulate": config.accumulate,
        "ema_decay": config.ema_decay,
        "ema_warmup": config.ema_warmup,
        "seed": config.seed,
        "data": dict(data or {}),
        "frozen": f"arrays of hash {digest_of(frozen)}" if jax.tree.leaves(frozen) else "nothing",
    }


def _begin(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    layout: Layout,
    loaded: Loaded,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Callable[[TrainState, Any], tuple[TrainState, Metrics]]]:
    """The first state or that of the newest checkpoint, its batches too, and the step of state and batch."""
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
    return state, lambda state, batch: step(state, batch, key, frozen)


@dataclass
class _Loop:
    """The loop itself, from the state's step to the last."""

    state: TrainState
    number: int  # of the state's step
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    feed: Prefetch
    config: TrainConfig
    checkpoints: Checkpoints
    reporter: Reporter
    interruption: Interruption
    watchdog: Watchdog
    lock: FolderLock

    def run(self, sample_hook: Callable[[int, Params], None] | None) -> TrainState:
        config = self.config
        self.first = self.saved = self.number
        self.in_flight: deque[Any] = deque()
        self.compiled: set[tuple[tuple[int, ...], ...]] = set()  # shapes of batches that a step was taken with
        save_due = False
        while self.number < config.steps:
            self.watchdog.doing(f"waiting for the data of step {self.number + 1}")
            try:
                with self.interruption.at_once():
                    batch, rows, place = next(self.feed)
            except InterruptRequested:
                self.stop(self.interruption.name)
            metrics = self.advance(batch, rows)
            self.place = place
            if self.number % config.log_every == 0 or self.lock.due():
                self.look()
            last = self.number == config.steps
            stop = self.interruption.reached(self.number)
            save_due |= self.number % config.save_every == 0
            # Where losses have just stopped being finite, the parameters themselves may be lost: the last checkpoint
            # must not be of those. It is saved after the first good step, or where the run ends.
            if last or stop or (save_due and int(metrics["consecutive_skips"]) == 0):
                self.save()
                save_due = False
            if stop and not last:
                self.stop(stop)
            if sample_hook is not None and (last or self.number % config.sample_every == 0):
                self.sample(sample_hook)
        return self.state

    def advance(self, batch: Any, rows: int) -> Any:
        """One step, begun; its metrics."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        compiles = shapes not in self.compiled
        self.watchdog.doing(f"in step {self.number + 1}", compiles)
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, batch)
        if compiles:
            self.compiled.add(shapes)
            self.reporter.leave_out(time.perf_counter() - began)
        self.number += 1
        self.reporter.add(self.number, rows, metrics)
        self.in_flight.append(metrics["loss"])
        if len(self.in_flight) > 2:
            jax.block_until_ready(self.in_flight.popleft())
        return metrics

    def look(self) -> None:
        """Raises where the run's folder is gone or another run has it."""
        self.lock.check(self.checkpoints.directory)

    def save(self) -> None:
        """The state, unless it is on disk already. Raises Diverged, and nothing is saved."""
        if self.number == self.saved:
            return
        self.look()
        self.watchdog.doing(f"saving step {self.number}")
        self.reporter.flush()
        self.checkpoints.save(self.number, self.state, self.place)
        self.reporter.restart_clock()
        self.saved = self.number

    def sample(self, hook: Callable[[int, Params], None]) -> None:
        self.look()
        self.watchdog.doing(f"drawing samples after step {self.number}", compiles=True)
        self.reporter.flush()
        try:
            with self.interruption.at_once():
                hook(self.number, self.state.ema)
        except InterruptRequested:
            self.stop(self.interruption.name)
        self.reporter.restart_clock()

    def stop(self, by: str) -> None:
        """Save and raise Preempted."""
        self.save()
        self.watchdog.doing(f"finishing the checkpoint of step {self.number}", compiles=True)
        done = f"saved in {self.checkpoints.directory}" if self.number else "before anything was to be saved"
        raise Preempted(f"stopped by {by} after step {self.number}, {done}; run again to go on")


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

"""The loop around the compiled step, with logs, samples, checkpoints, and resumption by running again.

The host only hands over batches. It keeps at most two steps in flight, reads a log interval's metrics while the next
step already runs, and learns of losses that are not finite from counters that live on the devices.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdiff.core.settings import flatten
from jaxdiff.training import multihost
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.distributed import agree, check_shared
from jaxdiff.training.interruption import Interruption, InterruptRequested, Preempted
from jaxdiff.training.lock import FolderLock, locked
from jaxdiff.training.mesh import check_processes, make_mesh
from jaxdiff.training.metrics import PLOT, plot
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.param_sharding import BY_SHAPE, ParamSharding
from jaxdiff.training.prefetch import Batches, Prefetch
from jaxdiff.training.reporter import Diverged, Reporter
from jaxdiff.training.state import Params, Trainable, TrainState, abstract_state, init_state
from jaxdiff.training.step import Step, make_step
from jaxdiff.training.watchdog import Watchdog

VERSION = 3
"""Of what a checkpoint holds. 1, which did not say so, named settings by the bare names of their classes; 2 had no
`extra`."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train. Raises ValueError for a setting that makes no sense."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
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


def train(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    placement: ParamSharding = BY_SHAPE,
    sample_hook: Callable[[int, Params], None] | None = None,
    initial: Params | None = None,
    progress: bool = True,
    description: str = "",
) -> TrainState:
    """Train until `config.steps` and return the last state; run again with the same folder, it goes on from there.

    Writes into `out`: checkpoints/, metrics.jsonl, tensorboard/, loss.png. `data` says what the batches are made of
    (the set, its size, the batch): to go on with other data than the run began with is refused. `mesh`: all devices
    along `data` by default. `placement`: of the parameters on it. Both may change from one start to the next.
    `sample_hook(step, averaged parameters)` is called every `sample_every` steps and after the last; it must not keep
    the parameters. `initial`: parameters to start from in place of its own.
    Of several processes (`distributed.start`) all call this alike, with a folder that they share; the hook is called on
    all of them, since the parameters are spread over them.

    Raises Diverged; Preempted, after saving; ValueError for a checkpoint of other settings or that cannot be read, a
    batch that does not divide over the devices, data that ends, processes that differ; OSError where saving fails or
    `out` is deleted meanwhile; multihost.FolderInUseError where another run has `out` or takes it over;
    multihost.PeerLostError where another process is gone. Where one process raises, the others end too.
    """
    out = Path(out)
    with locked(out) as lock:  # before anything is read, deleted or written there
        mesh = make_mesh() if mesh is None else mesh
        check_processes(mesh)
        fixed = {
            "version": VERSION,
            "stage": trainable,
            "optimizer": config.optimizer,
            "accumulate": config.accumulate,
            "ema_decay": config.ema_decay,
            "ema_warmup": config.ema_warmup,
            "seed": config.seed,
            "data": dict(data or {}),
        }
        agree("settings", flatten({**fixed, "config": config, "mesh": dict(mesh.shape)}))
        check_shared(out)
        abstract = abstract_state(trainable, config.optimizer, mesh, placement)
        init_key, key = jax.random.split(jax.random.key(config.seed))
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
                latest = checkpoints.latest()
                if latest is None:
                    state = init_state(trainable, config.optimizer, init_key, mesh, initial, placement)
                else:
                    state, place = checkpoints.restore(abstract)
                    batches.set_state(place)
                step = make_step(
                    trainable,
                    config.optimizer,
                    jax.tree.map(lambda leaf: leaf.sharding, abstract),
                    accumulate=config.accumulate,
                    ema_decay=config.ema_decay,
                    ema_warmup=config.ema_warmup,
                )
                first = int(state.step)
                feed = Prefetch(batches, mesh, config.accumulate, config.steps - first)
            reporter = Reporter(out, config.log_every, config.steps, first, progress, description)
            try:
                loop = _Loop(state, first, step, key, feed, config, checkpoints, reporter, interruption, watchdog, lock)
                state = loop.run(sample_hook if config.sample_every else None)
            except OSError:
                lock.check(folder)  # where the folder is gone, that is what to say
                raise
            except Diverged:
                if multihost.index() == 0:
                    plot(out)
                raise
            finally:
                reporter.close()
        lock.check(folder)
        if multihost.index() == 0 and (first < config.steps or not (out / PLOT).is_file()):
            plot(out)
        return state


@dataclass
class _Loop:
    """The loop itself, from the state's step to the last."""

    state: TrainState
    number: int  # of the state's step
    step: Step
    key: Any
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
        self.watchdog.doing(f"in step {self.number + 1}", compiles=self.number == self.first)
        self.state, metrics = self.step(self.state, batch, self.key)
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

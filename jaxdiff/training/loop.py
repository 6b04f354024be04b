"""Train a stage: the loop around the compiled step, with logs, samples, checkpoints, and resumption by running again.

The host only hands over batches. It keeps at most two steps in flight, reads a log interval's metrics while the next
step already runs, and learns of losses that are not finite from counters that live on the devices.
"""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.mesh import check_batch, make_mesh, to_devices
from jaxdiff.training.metrics import PLOT, MetricsLog, plot
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.settings import flatten
from jaxdiff.training.state import Params, Stage, TrainState, abstract_state, init_state
from jaxdiff.training.step import make_step

TOO_MANY = 10  # steps in a row without a finite loss


class Diverged(RuntimeError):
    """Ten steps in a row had a loss, gradient or update that was not finite; the last good checkpoint is as it was."""


class Preempted(SystemExit):
    """The run was told to stop (SIGTERM, SIGINT) and has saved; a script that lets it pass exits with 75."""

    def __init__(self, message: str) -> None:
        super().__init__(75)
        self.message = message


@runtime_checkable
class Batches(Protocol):
    """A resumable stream of dicts of numpy arrays (this process's rows), such as Grain's DatasetIterator."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


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

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.sample_every < 0:
            raise ValueError(f"sample_every {self.sample_every}: must be 0 (never) or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: must be at least 0 and below 2**32")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be at least 0 and below 1")


def train(
    stage: Stage,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    sample_hook: Callable[[int, Params], None] | None = None,
    initial: Params | None = None,
    progress: bool = True,
    description: str = "",
) -> TrainState:
    """Train until `config.steps` and return the last state; run again with the same folder, it goes on from there.

    Writes into `out`: checkpoints/, metrics.jsonl, tensorboard/, loss.png. `data` says what the batches are made of
    (the set, its size, the batch): to go on with other data than the run began with is refused. `mesh`: all devices
    along `data` by default.
    `sample_hook(step, averaged parameters)` is called every `sample_every` steps and after the last; it must not keep
    the parameters. `initial`: parameters to start from in place of the stage's own.

    Raises Diverged; Preempted, after saving; ValueError for a checkpoint of other settings or that cannot be read, a
    batch that does not divide over the devices, data that ends; OSError where saving fails.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh() if mesh is None else mesh
    fixed = {
        "stage": stage,
        "optimizer": config.optimizer,
        "accumulate": config.accumulate,
        "ema_decay": config.ema_decay,
        "ema_warmup": config.ema_warmup,
        "seed": config.seed,
        "data": dict(data or {}),
    }
    abstract = abstract_state(stage, config.optimizer, mesh)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    folder = out / "checkpoints"
    # Signals are held back until what they asked to save is on disk, which is when the checkpoints are left.
    with (
        _announced(),
        jax.set_mesh(mesh),
        _Interruption() as interruption,
        Checkpoints(folder, flatten(fixed), config.keep) as checkpoints,
    ):
        if checkpoints.latest() is None:
            state = init_state(stage, config.optimizer, init_key, mesh, initial)
        else:
            state, place = checkpoints.restore(abstract)
            batches.set_state(place)
        step = make_step(
            stage,
            config.optimizer,
            jax.tree.map(lambda leaf: leaf.sharding, abstract),
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
        )
        first = int(state.step)
        reporter = _Reporter(out, config, first, progress, description)
        try:
            state = _run(state, step, key, batches, config, mesh, checkpoints, reporter, interruption, sample_hook)
        finally:
            reporter.close()
    if jax.process_index() == 0 and (first < config.steps or not (out / PLOT).is_file()):
        plot(out)
    return state


def _run(
    state: TrainState,
    step: Any,
    key: Any,
    batches: Batches,
    config: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    reporter: "_Reporter",
    interruption: "_Interruption",
    sample_hook: Callable[[int, Params], None] | None,
) -> TrainState:
    """The loop itself, from the state's step to the last."""
    first = int(state.step)
    in_flight: deque[Any] = deque()
    save_due = False
    for number, (batch, rows, place) in enumerate(_prefetch(batches, config, mesh, config.steps - first), first + 1):
        state, metrics = step(state, batch, key)
        reporter.add(number, rows, metrics)
        in_flight.append(metrics["loss"])
        if len(in_flight) > 2:
            jax.block_until_ready(in_flight.popleft())
        last = number == config.steps
        stop = interruption.reached(number)
        save_due |= number % config.save_every == 0
        # Where losses have just stopped being finite, the parameters themselves may be lost: the last checkpoint must
        # not be of those. It is saved after the first good step, or where the run ends.
        if last or stop or (save_due and int(metrics["in_a_row"]) == 0):
            reporter.flush()  # raises Diverged before anything is saved
            checkpoints.save(number, state, place)
            reporter.restart_clock()
            save_due = False
        if stop and not last:
            message = f"stopped by {stop} after step {number}, saved in {checkpoints.directory}; run again to go on"
            raise Preempted(message)
        if sample_hook is not None and config.sample_every and (last or number % config.sample_every == 0):
            reporter.flush()
            sample_hook(number, state.ema)
            reporter.restart_clock()
    return state


def _prefetch(batches: Batches, config: TrainConfig, mesh: Mesh, count: int) -> Iterator[tuple[Any, int, Any]]:
    """`count` batches on the devices, their number of rows over all processes, and the iterator's state after each.

    One batch more than is asked for is on its way to the devices.
    """
    ready: deque[tuple[Any, int, Any]] = deque()
    for index in range(count):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(f"the data ended after {index} batches of the {count} still to come: repeat it") from None
        rows = {np.shape(value)[0] for value in batch.values()}
        if len(rows) != 1:
            raise ValueError(f"arrays of a batch differ in their number of rows: {sorted(rows)}")
        total = rows.pop() * jax.process_count()
        check_batch(total, mesh, config.accumulate)
        ready.append((to_devices(batch, mesh), total, batches.get_state()))
        if len(ready) == 2:
            yield ready.popleft()
    yield from ready


class _Reporter:
    """Gathers metrics on the devices, and writes one line an interval, read while the next step runs."""

    def __init__(self, out: Path, config: TrainConfig, first: int, progress: bool, description: str) -> None:
        chief = jax.process_index() == 0
        self._log = MetricsLog(out, first) if chief else None
        self._every = config.log_every
        self._gathered: list[Any] = []  # metrics of the steps since the last line, on the devices
        self._due: tuple[int, list[Any], int] | None = None  # a full interval, not yet read
        self._rows = 0
        self._clock: float | None = None  # None: the next step's time is not counted (it may compile)
        self._bar = tqdm(
            total=config.steps,
            initial=first,
            desc=description or None,
            unit="step",
            disable=not (progress and chief),
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )

    def add(self, step: int, rows: int, metrics: Any) -> None:
        self._read()
        self._gathered.append(metrics)
        if self._clock is None:
            jax.block_until_ready(metrics["loss"])
            self._clock = time.perf_counter()
        else:
            self._rows += rows
        if step % self._every == 0:
            self._due = (step, self._gathered, self._rows)
            self._gathered, self._rows = [], 0
        self._step = step
        self._bar.update()

    def flush(self) -> None:
        """Write everything up to now. Raises Diverged."""
        self._read()
        if self._gathered:
            self._due = (self._step, self._gathered, self._rows)
            self._gathered, self._rows = [], 0
            self._read()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the speed."""
        self._clock = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def _read(self) -> None:
        if self._due is None:
            return
        step, gathered, rows = self._due
        self._due = None
        values = jax.device_get(gathered)
        now = time.perf_counter()
        speed = rows / (now - self._clock) if rows else None
        self._clock = now
        latest = values[-1]
        counters = ("skipped", "in_a_row", "worst_run")
        line: dict[str, Any] = {"step": step}
        for name in ("loss", "grad_norm", *sorted(latest.keys() - {"loss", "grad_norm", "learning_rate", *counters})):
            line[name] = _mean([float(value[name]) for value in values])
        line |= {"learning_rate": float(latest["learning_rate"]), "images_per_second": speed}
        line["skipped"] = int(latest["skipped"])
        if self._log is not None:
            self._log.write(line)
        loss = "none finite" if line["loss"] is None else f"{line['loss']:.4g}"
        self._bar.set_postfix_str(f"loss {loss}, {speed or 0:.3g} images/s", refresh=False)
        if int(latest["worst_run"]) >= TOO_MANY:
            raise Diverged(
                f"{int(latest['worst_run'])} steps in a row by step {step} had a loss, gradient or update that was not "
                "finite: stopped, the last checkpoint is as it was; begin a new run from it with a lower learning rate "
                "or look at the data"
            )


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


@contextmanager
def _announced() -> Iterator[None]:
    """Say why the run stops, once what it saved is on disk."""
    try:
        yield
    except Preempted as stop:
        print(stop.message, file=sys.stderr)
        raise


class _Interruption:
    """Inside, SIGTERM and SIGINT are noted in place of acted on; a second SIGINT interrupts as usual.

    With several processes, jax's own agreement decides, so that all of them stop after the same step.
    """

    def __enter__(self) -> "_Interruption":
        self._name = ""
        mine = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if mine else ()
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> str:
        """The signal's name where the run is to stop after this step, otherwise nothing."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return "the scheduler"
        return self._name

    def _note(self, number: int, _: Any) -> None:
        self._name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

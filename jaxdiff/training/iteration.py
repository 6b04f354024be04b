"""The training loop: data, metrics, evaluations, samples, checkpoints, signals.

The host only feeds batches. It keeps at most two steps in flight, reads a log interval's metrics while the next step
runs, and detects non-finite losses from counters on the devices.
"""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from jaxdiff.training.agreement import gather
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.held_out import HeldOut
from jaxdiff.training.interruption import Interruption, InterruptRequested, Preempted
from jaxdiff.training.lock import FolderLock
from jaxdiff.training.prefetch import Prefetch
from jaxdiff.training.reporter import Reporter
from jaxdiff.training.state import Metrics, Params, TrainState
from jaxdiff.training.watchdog import Watchdog


@dataclass(frozen=True)
class Outside:
    """The services that the loop uses."""

    checkpoints: Checkpoints
    reporter: Reporter
    interruption: Interruption
    watchdog: Watchdog
    lock: FolderLock


@dataclass
class Iteration:
    """The loop, from the state's step to the last."""

    state: TrainState
    number: int  # of the state's step
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    feed: Prefetch
    config: TrainConfig
    outside: Outside
    evaluation: HeldOut | None
    sample: Callable[[int, Params, Any], None] | None

    def run(self) -> TrainState:
        config, outside = self.config, self.outside
        self.saved = self.number
        self.in_flight: deque[tuple[int, Any]] = deque()
        self.compiled: set[Any] = set()  # shapes of batches
        self.wrote = self.number < config.steps
        self.make_up()
        save_due = False
        while self.number < config.steps:
            outside.watchdog.doing(f"waiting for the data of step {self.number + 1}")
            try:
                with outside.interruption.at_once():
                    batch, rows, place = next(self.feed)
            except InterruptRequested:
                self.stop(outside.interruption.name)
            metrics = self.advance(batch, rows)
            self.place = place
            if self.number % config.log_every == 0 or outside.lock.due():
                self.look()
            last = self.number == config.steps
            stop = outside.interruption.reached()
            if evaluated := self.evaluation_due():  # before saving, so that the log line of a saved step is complete
                stop = stop or self.evaluate(outside.reporter.flush)
            save_due |= self.number % config.save_every == 0
            # After a non-finite loss the parameters themselves may be bad and must not become the last checkpoint:
            # save after the first good step, or at the end of the run.
            if last or stop or (save_due and int(metrics["consecutive_skips"]) == 0):
                self.save()
                save_due = False
            if stop and (evaluated or not last):
                self.stop(stop)
            if self.sample is not None and (last or self.number % config.sample_every == 0):
                self.run_sampling(self.sample)
        return self.state

    def advance(self, batch: Any, rows: int) -> Any:
        """Start one step and return its metrics. Waits for it if a new batch shape needs compilation."""
        reporter = self.outside.reporter
        shape = tuple((name, leaf.shape, leaf.dtype) for name, leaf in sorted(batch.items()))
        new = shape not in self.compiled
        self.compiled.add(shape)
        self.outside.watchdog.doing(f"in step {self.number + 1}", compiles=new)
        with reporter.paused("compiling") if new else nullcontext():
            self.state, metrics = self.step(self.state, batch)
            if new:
                jax.block_until_ready(metrics["loss"])
        self.number += 1
        if new:
            reporter.skip_time(self.number)
        reporter.add(self.number, 0 if new else rows, metrics)
        self.in_flight.append((self.number, metrics["loss"]))
        if len(self.in_flight) > 2:
            number, loss = self.in_flight.popleft()
            jax.block_until_ready(loss)
            reporter.completed(number)
        return metrics

    def look(self) -> None:
        """Raises if the run's folder is gone or taken over by another run."""
        self.outside.lock.check(self.outside.checkpoints.directory)

    def save(self) -> None:
        """Save the state unless it is already saved. Raises Diverged without saving."""
        if self.number == self.saved:
            return
        self.look()
        self.outside.watchdog.doing(f"saving step {self.number}")
        with self.outside.reporter.paused():
            self.outside.reporter.flush()
            self.outside.checkpoints.save(self.number, self.state, self.place)
        self.saved = self.number

    def run_sampling(self, sample: Callable[[int, Params, Any], None]) -> None:
        self.look()
        self.outside.watchdog.doing(f"sampling after step {self.number}", compiles=True)
        with self.outside.reporter.paused("sampling"):
            self.outside.reporter.flush()
            stop = self.broken_off(lambda: sample(self.number, self.state.ema, self.state.extra))
        if stop:
            self.stop(stop)

    def evaluation_due(self) -> bool:
        last = self.number == self.config.steps
        return self.evaluation is not None and (last or self.number % self.config.evaluate_every == 0)

    def evaluate(self, write: Callable[[dict[str, float]], None]) -> str:
        """Write held-out losses of the averaged parameters. On a signal, nothing is written and its name is
        returned."""
        assert self.evaluation is not None  # it is due
        self.look()
        values: dict[str, float] = {}
        evaluation = self.evaluation
        with self.outside.reporter.paused("evaluating"):
            stop = self.broken_off(lambda: values.update(evaluation(self.state, self.before_batch)))
            if not stop:
                write(values)
        return stop

    def before_batch(self, number: int) -> None:
        """Called before each evaluation batch; all processes stop before the same batch."""
        what = f"evaluating held-out batch {number + 1} after step {self.number}"
        self.outside.watchdog.doing(what, compiles=number == 0)
        self.stopped_by = self.outside.interruption.reached()
        if self.stopped_by:
            raise InterruptRequested

    def broken_off(self, function: Callable[[], None]) -> str:
        """Call `function`; returns the name of the signal that interrupted it, or an empty string."""
        self.stopped_by = ""
        try:
            with self.outside.interruption.at_once():
                function()
        except InterruptRequested:
            return self.stopped_by or self.outside.interruption.name
        return ""

    def make_up(self) -> None:
        """Repeat an interrupted evaluation of the restored step."""
        if not 0 < self.number <= self.config.steps or not self.evaluation_due():
            return
        if gather(self.outside.reporter.lacks_held_out(self.number))[0]:
            self.wrote = True
            stop = self.evaluate(self.outside.reporter.complete)
            if stop:
                self.stop(stop)

    def stop(self, by: str) -> None:
        """Save and raise Preempted."""
        self.save()
        self.outside.watchdog.doing(f"finishing the checkpoint of step {self.number}", compiles=True)
        done = f"saved in {self.outside.checkpoints.directory}" if self.number else "before anything was to be saved"
        raise Preempted(f"stopped by {by} after step {self.number}, {done}; run again to go on")

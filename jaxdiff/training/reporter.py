"""Reporting of a running training: metrics gathered on the devices, one log line per interval, a progress bar."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.core.clock import ticking
from jaxdiff.training.metrics import HELD_OUT, MetricsLog

TOO_MANY = 10  # steps in a row without a finite loss


class Diverged(RuntimeError):
    """Ten consecutive steps had a non-finite loss, gradient or update. The last good checkpoint is unchanged."""


class Reporter:
    """Gathers metrics on the devices and writes one line per interval, fetched while the next step runs.

    The speed excludes time inside `paused`: compilation, saving, sampling, evaluation. unit: plural name of a batch's
    rows.
    """

    def __init__(
        self, out: Path, every: int, total: int, first: int, progress: bool, description: str, unit: str = "images"
    ) -> None:
        chief = jax.process_index() == 0
        self._log = MetricsLog(out, first) if chief else None
        self._every, self._unit = every, unit
        self._gathered: list[Any] = []  # metrics of the steps since the last line, on the devices
        self._due: tuple[int, list[Any], int] | None = None  # a full interval, not yet fetched
        self._rows = 0
        self._time = _Stopwatch(first)
        self._step = first
        self._loss, self._held_out, self._speed = "", "", ""
        self._bar = _Bar(
            self._time,
            total=total,
            initial=first,
            desc=description or None,
            unit="step",
            disable=not (progress and chief),
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )

    def lacks_held_out(self, step: int) -> bool:
        """Whether the log ended at this step without a held-out loss when this run started."""
        last = None if self._log is None else self._log.last
        return last is not None and last["step"] == step and HELD_OUT not in last

    def add(self, step: int, rows: int, metrics: Any) -> None:
        """Add a step that was dispatched. rows: of its batch; 0 if its time is not counted because it was compiled."""
        self._read()
        self._gathered.append(metrics)
        self._rows += rows
        if step % self._every == 0:
            self._due = (step, self._gathered, self._rows)
            self._gathered, self._rows = [], 0
        self._step = step
        self._bar.update()

    def completed(self, step: int) -> None:
        """The devices have finished this step."""
        self._time.completed(step)

    @contextmanager
    def paused(self, doing: str = "") -> Iterator[None]:
        """Stop counting time in the block; the bar shows what the run is `doing` and for how long."""
        self._wait()
        try:
            if not doing or self._bar.disable:
                yield
            else:
                show = lambda seconds: self._bar.set_postfix_str(f"{doing} {tqdm.format_interval(seconds)}")  # noqa: E731
                with ticking(show, every=1.0 if sys.stderr.isatty() else 30.0):
                    yield
        finally:
            self._time.start()
            self._show(refresh=bool(doing))

    def skip_time(self, step: int) -> None:
        """Exclude the step that just ran while paused from the timed steps."""
        self._time.uncounted(step)

    def flush(self, held_out: Mapping[str, float] | None = None) -> None:
        """Write all pending metrics, the last line with the held-out losses of its step. Raises Diverged."""
        if self._due is None and self._gathered:
            self._due = (self._step, self._gathered, self._rows)
            self._gathered, self._rows = [], 0
        self._read(held_out)

    def complete(self, held_out: Mapping[str, float]) -> None:
        """Add the held-out losses to the log's last line from before this run."""
        if self._log is not None:
            self._log.complete(dict(held_out))
        self._note(held_out)

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def _wait(self) -> None:
        """Wait until all steps are done, and stop the clock."""
        latest = self._gathered or (self._due[1] if self._due else [])
        if latest:
            jax.block_until_ready(latest[-1]["loss"])
        self._time.completed(self._step)
        self._time.stop()

    def _read(self, held_out: Mapping[str, float] | None = None) -> None:
        if self._due is None:
            return
        held_out = held_out or {}
        step, gathered, rows = self._due
        self._due = None
        values = jax.device_get(gathered)
        seconds = self._time.lap()
        speed = rows / seconds if rows and seconds > 0 else None
        latest = values[-1]
        line = {**_line(step, values), **held_out, f"{self._unit}_per_second": speed, "skipped": int(latest["skipped"])}
        if self._log is not None:
            self._log.write(line)
        self._loss = f"loss {_number(line['loss'])}"
        self._speed = f"{speed:.3g} {self._unit}/s" if speed else self._speed
        self._note(held_out)
        if int(latest["max_consecutive_skips"]) >= TOO_MANY:
            raise Diverged(
                f"{int(latest['max_consecutive_skips'])} steps in a row by step {step} had a loss, gradient or update "
                "that was not finite: stopped, the last checkpoint is unchanged; start a new run from it with a lower "
                "learning rate, or check the data"
            )

    def _note(self, held_out: Mapping[str, float]) -> None:
        if HELD_OUT in held_out:
            self._held_out = f"held-out {_number(held_out[HELD_OUT])}"
        self._show()

    def _show(self, refresh: bool = False) -> None:
        values = filter(None, (self._loss, self._held_out, self._speed))
        self._bar.set_postfix_str(", ".join(values), refresh=refresh)


class _Stopwatch:
    """Measures the seconds of steps, without pauses; initially stopped. step: the run's current step."""

    def __init__(self, step: int) -> None:
        self._started: float | None = None
        self._lap = 0.0  # seconds since the last lap, up to the last stop
        self._total = 0.0  # seconds up to the last stop
        self._step, self._steps, self._seconds = step, 0, 0.0  # the last completed one, and the counts up to it

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._lap, self._total, self._started = self._lap + self._running(), self._total + self._running(), None

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, running = self._lap + self._running(), self._started is not None
        self._total += self._running()
        self._lap, self._started = 0.0, time.perf_counter() if running else None
        return seconds

    def completed(self, step: int) -> None:
        if step > self._step:
            self._steps, self._seconds = self._steps + step - self._step, self._total + self._running()
            self._step = step

    def uncounted(self, step: int) -> None:
        """Exclude this step; time before the first counted step is not counted either."""
        self._step = step
        if not self._steps:
            self._lap = self._total = 0.0

    @property
    def rate(self) -> float:
        """Completed steps per second; 0 if unknown."""
        return self._steps / self._seconds if self._seconds > 0 else 0.0

    def _running(self) -> float:
        return 0.0 if self._started is None else time.perf_counter() - self._started


class _Bar(tqdm):
    """A progress bar whose rate and remaining time come from a stopwatch."""

    def __init__(self, stopwatch: _Stopwatch, **options: Any) -> None:
        self._stopwatch = stopwatch
        super().__init__(**options)

    @property
    def format_dict(self) -> Any:
        return {**super().format_dict, "rate": self._stopwatch.rate}


def _line(step: int, values: list[Any]) -> dict[str, Any]:
    """Means of an interval's metrics, and its last learning rates."""
    latest = values[-1]
    counters = ("skipped", "consecutive_skips", "max_consecutive_skips")
    rates = [name for name in latest if name.startswith("learning_rate")]
    line: dict[str, Any] = {"step": step}
    for name in ("loss", "grad_norm", *sorted(latest.keys() - {"loss", "grad_norm", *rates, *counters})):
        line[name] = _mean([float(value[name]) for value in values])
    return line | {name: float(latest[name]) for name in rates}


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def _number(value: float | None) -> str:
    return "none finite" if value is None or not np.isfinite(value) else f"{value:.4g}"

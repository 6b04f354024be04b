"""What a run tells while it goes on: metrics gathered on the devices, a line an interval, a progress bar, the end."""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.training.metrics import MetricsLog

TOO_MANY = 10  # steps in a row without a finite loss


class Diverged(RuntimeError):
    """Ten steps in a row had a loss, gradient or update that was not finite; the last good checkpoint is as it was."""


class Reporter:
    """Gathers metrics on the devices, and writes one line an interval, read while the next step runs."""

    def __init__(self, out: Path, every: int, total: int, first: int, progress: bool, description: str) -> None:
        chief = jax.process_index() == 0
        self._log = MetricsLog(out, first) if chief else None
        self._every = every
        self._gathered: list[Any] = []  # metrics of the steps since the last line, on the devices
        self._due: tuple[int, list[Any], int] | None = None  # a full interval, not yet read
        self._rows = 0
        self._clock: float | None = None  # None: the next step's time is not counted (it may compile)
        self._bar = tqdm(
            total=total,
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

    def leave_out(self, seconds: float) -> None:
        """Leave so much of the time since the last step out of the speed."""
        if self._clock is not None:
            self._clock += seconds

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
        speed = rows / (now - self._clock) if rows and self._clock is not None else None
        self._clock = now
        latest = values[-1]
        counters = ("skipped", "consecutive_skips", "max_consecutive_skips")
        line: dict[str, Any] = {"step": step}
        rates = [name for name in latest if name.startswith("learning_rate")]
        for name in ("loss", "grad_norm", *sorted(latest.keys() - {"loss", "grad_norm", *rates, *counters})):
            line[name] = _mean([float(value[name]) for value in values])
        line |= {name: float(latest[name]) for name in rates} | {"images_per_second": speed}
        line["skipped"] = int(latest["skipped"])
        if self._log is not None:
            self._log.write(line)
        loss = "none finite" if line["loss"] is None else f"{line['loss']:.4g}"
        self._bar.set_postfix_str(f"loss {loss}, {speed or 0:.3g} images/s", refresh=False)
        if int(latest["max_consecutive_skips"]) >= TOO_MANY:
            raise Diverged(
                f"{int(latest['max_consecutive_skips'])} steps in a row by step {step} had a loss, gradient or update "
                "that was not finite: stopped, the last checkpoint is as it was; begin a new run from it with a lower "
                "learning rate or look at the data"
            )


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None

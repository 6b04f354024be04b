"""Logs of a run: metrics.jsonl, TensorBoard event files, loss.png."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.core.files import replacing

LINES = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"
PLOT = "loss.png"
HELD_OUT = "held_out_loss"
"""The metric that is plotted with the loss."""


class MetricsLog:
    """metrics.jsonl (one object a line) and `tensorboard/` in a run's folder, continued after step `resumed`.

    Lines of later steps from an interrupted run are removed, so no step appears twice. If lines are unreadable, a
    warning lists them, the others are kept, and the original file is saved as metrics.damaged.jsonl, then
    metrics.damaged-2.jsonl, and so on.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        self._path = folder / LINES
        lines = _truncate(self._path, resumed)
        self.last = lines[-1] if lines else None
        """The last existing line."""
        self._file = self._path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # imported here, because it imports PyTorch if installed

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)
        self._failures: list[OSError] = []
        events = self._board.file_writer.event_writer._ev_writer  # no public API
        for name in ("write_event", "flush", "close"):
            setattr(events, name, _noting(getattr(events, name), self._failures))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, which needs a `step`; non-finite values become null. OSError if writing fails."""
        with self._explained():
            self._file.write(_as_text(line))
            self._file.flush()
        self._show(line)

    def complete(self, values: dict[str, Any]) -> None:
        """Add missing values to the last existing line; call it before `write`."""
        assert self.last is not None
        lines = [*_readable(self._path.read_bytes()).lines[:-1], self.last | values]
        with self._explained():
            self._file.close()
            with replacing(self._path) as temporary:
                temporary.write_text("".join(map(_as_text, lines)), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")
        self._show({"step": self.last["step"]} | values)

    def _show(self, line: dict[str, Any]) -> None:
        """Write the numbers of a line to TensorBoard."""
        with self._explained("tensorboard"):
            if self._failures:
                raise self._failures[0]
        for name, value in line.items():
            if name != "step" and _is_number(value):
                self._board.add_scalar(name, value, line["step"])

    @contextmanager
    def _explained(self, name: str = LINES) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self._path.with_name(name)
            raise OSError(
                f"{path}: cannot be written: {error.strerror}; checkpoints saved before are intact"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # `write` has already written or raised
            self._file.close()
        self._board.close()


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps({name: _finite(value) for name, value in line.items()}) + "\n"


def _noting(call: Callable[..., Any], errors: list[OSError]) -> Callable[..., Any]:
    """Wrap `call` to record its OSErrors: raised in TensorBoard's thread, they would end it, and later writes would
    wait forever."""

    def noting(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            errors.append(error)

    return noting


def read(path: str | Path) -> list[dict[str, Any]]:
    """The readable lines of a metrics.jsonl, sorted by step; the last line of each step.

    One warning lists the skipped lines and why. A truncated last line of a killed run is skipped silently.
    """
    log = _readable(Path(path).read_bytes())
    if log.problem(cut=False):
        warnings.warn(f"{path}: {log.problem(cut=False)}", stacklevel=2)
    return log.lines


def plot(folder: Path) -> None:
    """Plot loss.png from metrics.jsonl: logged losses, their moving median and any held-out losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read(folder / LINES)
    (steps, losses), (evaluated, held_out) = (_curve(lines, name) for name in ("loss", HELD_OUT))
    if not len(steps):
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    axes.plot(steps, _moving_median(losses), color="tab:blue", label="moving median")
    if len(held_out):
        axes.plot(evaluated, held_out, ".-", color="tab:orange", label="held-out, averaged parameters")
    if steps[-1] >= 100 * steps[0]:
        axes.set_xscale("log")
    values = np.concatenate([losses, held_out])
    if values.min() > 0 and values.max() > 3 * values.min():
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(folder / PLOT) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines with a number of this name."""
    having = [line for line in lines if _is_number(line.get(name))]
    return np.array([line["step"] for line in having]), np.array([line[name] for line in having], float)


def _moving_median(values: np.ndarray) -> np.ndarray:
    reach = max(1, min(25, len(values) // 20))
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _truncate(path: Path, last: int) -> list[dict[str, Any]]:
    """Truncate the file after step `last`; returns the remaining lines."""
    if not path.exists():
        return []
    content = path.read_bytes()
    log = _readable(content)
    lines = [line for line in log.lines if line["step"] <= last]
    kept = "".join(json.dumps(line) + "\n" for line in lines).encode()
    problem = log.problem()
    if log.damaged or log.repeated:
        copy = _free_name(path.with_name(DAMAGED))
        shutil.copyfile(path, copy)
        problem += f"; the file as it was is {copy}"
    if problem:
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    if kept != content:
        with replacing(path) as temporary:
            temporary.write_bytes(kept)
    return lines


def _free_name(path: Path) -> Path:
    """`path`, or the first unused of `name-2.jsonl`, `name-3.jsonl`, …: existing files are never overwritten."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


@dataclass(frozen=True)
class _Readable:
    """The parsed lines of a metrics.jsonl by step, and the numbers of the skipped lines."""

    lines: list[dict[str, Any]]
    damaged: list[int]
    repeated: list[int]  # a later line has the same step
    cut: int | None  # the last, if it has no end

    def problem(self, cut: bool = True) -> str:
        problems = []
        if self.damaged:
            problems.append(f"{_numbers(self.damaged)} cannot be read (damaged, or without a step)")
        if self.repeated:
            problems.append(f"{_numbers(self.repeated)} have a step that a later line has too")
        if cut and self.cut is not None:
            problems.append(f"line {self.cut}, the last, was cut short")
        return f"{', '.join(problems)}: left out, {len(self.lines)} are kept" if problems else ""


def _readable(content: bytes) -> _Readable:
    *ended, rest = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    by_step: dict[int, tuple[int, dict[str, Any]]] = {}
    damaged, repeated, cut = [], [], None
    for number, text in enumerate([*ended, rest], 1):
        if not text.strip():
            continue
        line = _parsed(text.strip(b"\0 \t\r"))
        if line is None and number > len(ended) and b"\0" not in text:
            cut = number
            continue
        if line is None or b"\0" in text:  # a block of zeros may have replaced further lines
            damaged.append(number)
        if line is None:
            continue
        if line["step"] in by_step:
            repeated.append(by_step[line["step"]][0])
        by_step[line["step"]] = (number, line)
    return _Readable([by_step[step][1] for step in sorted(by_step)], damaged, sorted(repeated), cut)


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object of a line with a step, otherwise None."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step < 2**63 else None


def _numbers(lines: list[int]) -> str:
    """`3 lines (2, 5, 6)`, with at most ten numbers."""
    more = ", …" if len(lines) > 10 else ""
    return f"{len(lines)} line{'s' * (len(lines) > 1)} ({', '.join(map(str, lines[:10]))}{more})"


def _is_number(value: Any) -> bool:
    """Whether the value is a finite number within the range of a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None

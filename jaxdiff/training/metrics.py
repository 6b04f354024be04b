"""What a run leaves to read: metrics.jsonl, TensorBoard event files, loss.png."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

PLOT = "loss.png"


class MetricsLog:
    """metrics.jsonl (one object a line) and `tensorboard/` in a run's folder, continued after step `resumed`.

    Lines of later steps, which a run that died has left, are cut off: no step appears twice.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        path = folder / "metrics.jsonl"
        _truncate(path, resumed)
        self._file = path.open("a")
        from tensorboardX import SummaryWriter  # here, because it imports PyTorch wherever that is installed

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)

    def write(self, line: dict[str, Any]) -> None:
        """`line` has a `step`; values that are not finite become null."""
        self._file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step" and value is not None and math.isfinite(value):
                self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a killed run is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot(folder: Path) -> None:
    """loss.png from metrics.jsonl: every logged loss, and its moving median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in read(folder / "metrics.jsonl") if line["loss"] is not None]
    steps, losses = np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])
    if not len(steps):
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    axes.plot(steps, _moving_median(losses), color="tab:blue", label="moving median")
    if steps[-1] >= 100 * steps[0]:
        axes.set_xscale("log")
    if losses.min() > 0 and losses.max() > 3 * losses.min():
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    temporary = folder / "loss.tmp.png"
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, folder / PLOT)
    finally:
        temporary.unlink(missing_ok=True)


def _moving_median(values: np.ndarray) -> np.ndarray:
    reach = max(1, min(25, len(values) // 20))
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _truncate(path: Path, last: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read(path) if line["step"] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None

"""Plot fidelity against alignment as PNG: one line per setting, one labelled point per guidance weight."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff.core.files import replacing

TITLES = {
    "encoders": "size of the frozen text encoder (Imagen, Fig. 4a)",
    "unets": "size of the U-Net (Imagen, Fig. 4b)",
    "thresholding": "thresholding (Imagen, Fig. 4c)",
    "augmentation": "noise on super-resolution's input (Imagen, Fig. A.11a)",
}


class Point(NamedTuple):
    """One cell: the scores of one guidance weight and one seed."""

    weight: float
    seed: int
    cosine: float
    fd: float


def plot(
    path: Path, curves: Mapping[str, Sequence[Sequence[Point]]], figure: str, *, alignment: str, fidelity: str
) -> None:
    """Lines through the means over seeds, with bars from minimum to maximum. alignment, fidelity: network names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(8, 5.5), dpi=110, layout="constrained"))
    axes = canvas.figure.subplots()
    for number, (label, line) in enumerate(curves.items()):
        colour = f"C{number}"
        x = np.array([[point.cosine for point in points] for points in line])
        y = np.array([[point.fd for point in points] for points in line])
        mean_x, mean_y = x.mean(1), y.mean(1)
        spread = {"xerr": _spread(x), "yerr": _spread(y)} if x.shape[1] > 1 else {}
        axes.errorbar(
            mean_x, mean_y, **spread, color=colour, marker="o", markersize=4, label=label, ecolor=(colour, 0.35)
        )
        for points, at in zip(line, zip(mean_x, mean_y)):
            axes.annotate(f"{points[0].weight:g}", at, (3, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")  # 7, not 7 × 10⁰
    axes.set_xlabel(f"mean cosine of {alignment} (higher: nearer to the caption)")
    axes.set_ylabel(f"Fréchet distance of {fidelity} (lower: nearer to true images)")
    axes.set_title(TITLES[figure])
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        canvas.figure.savefig(temporary, format="png")


def _spread(values: np.ndarray) -> np.ndarray:
    mean = values.mean(1)
    return np.stack([mean - values.min(1), values.max(1) - mean])

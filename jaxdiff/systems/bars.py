"""Progress bars and timing of sampling.

with Bars(pipeline) as bars:
    pipeline.sample(prompts, options, bars)
"""

import time
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class HasSides(Protocol):
    """The part of a pipeline that `Bars` needs: the side of each box's product, in its own pixels."""

    @property
    def sides(self) -> tuple[int, ...]: ...


class Bars:
    """A progress bar and the elapsed seconds for each box, as a progress callback of `Pipeline.batches`.

    The time between two reports counts for the box of the second report. runs: number of calls of `batches`, each with
    about the same number of samples.
    """

    def __init__(self, pipeline: HasSides, runs: int = 1):
        self._sides, self._runs = pipeline.sides, runs
        self._boxes: dict[int, _Box] = {}
        self._clock = time.perf_counter()

    def __call__(self, box: int, done: int, total: int) -> None:
        if box not in self._boxes:
            # Steps done before the bar existed must not count for its speed.
            options = {"total": total * self._runs, "desc": f"{self._sides[box]:5d} px", "unit": "step"}
            self._boxes[box] = _Box(tqdm(initial=done, **options))
        self._boxes[box].report(done, total, time.perf_counter() - self._clock)
        self.resume()

    def resume(self) -> None:
        """Restart the clock: the time since the last report counts for no box."""
        self._clock = time.perf_counter()

    def seconds(self, box: int) -> float:
        """Total seconds of a box, compilation included."""
        return sum(seconds for seconds, _ in self._boxes[box].reports)

    def per_image(self, box: int, count: int) -> float:
        """Seconds per image for `count` images. Excludes the first report, which includes compilation, if there are
        others."""
        reports = self._boxes[box].reports
        seconds, steps = map(sum, zip(*(reports[1:] or reports)))
        return seconds / steps * sum(steps for _, steps in reports) / count

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: Any) -> None:
        for box in self._boxes.values():
            box.bar.close()


class _Box:
    """A bar, and the seconds and steps of each report."""

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.reports: list[tuple[float, int]] = []
        self._done = 0

    def report(self, done: int, total: int, seconds: float) -> None:
        steps = done - self._done if done > self._done else done  # otherwise a new run started
        if self.reports:
            self.bar.update(steps)
        self.reports.append((seconds, steps))
        self._done = done
        if self.bar.n >= self.bar.total:
            self.bar.close()

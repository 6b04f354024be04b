"""What command lines can set about sampling, and what scripts that sample share: checks and progress bars."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.imagen import presets
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.training.mesh import make_mesh, parse
from jaxdiff.weights.imagen import trained


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the stages draw. One value for all stages, or one for each, separated by commas; what is left out, or empty
    between commas (`50,,`), is the stage's own setting."""

    sampler: str = ""
    """ddpm | ddim | dpmpp | heun | euler"""
    steps: str = ""
    """Steps of the sampler."""
    respacing: str = ""
    """Which of DeepFloyd IF's 1000 steps are drawn: fast27 | smart27 | smart50 | smart100 | smart185 | super27 |
    super40 | super100 | even | leading (the last two take --steps)."""
    eta: float | None = None
    """Randomness of ddim, 0 (none) to 1."""
    guidance: str = ""
    """Guidance weight; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Guide between these log-SNRs alone."""
    guidance_rescale: float | None = None
    """How far a guided prediction is brought back to the spread of the unguided one, 0 to 1."""
    thresholding: str = ""
    """static | dynamic | none"""
    percentile: float | None = None
    """Of dynamic thresholding, as a fraction (0.995)."""
    cap: float | None = None
    """The largest scale of dynamic thresholding; 1 makes it static."""
    aug_level: str = ""
    """Noise put on the input of super-resolution, 0 to 1."""
    tile: int | None = None
    """Draw super-resolution in overlapping tiles of so many pixels a side."""
    tile_overlap: int = 32
    """Pixels that neighbouring tiles share."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the generators compute in; bfloat16 on accelerators. DeepFloyd IF's parameters and its T5 are loaded in it,
    too."""
    mesh: str = ""
    """Draw on all devices of this machine: data=-1, each its own pictures; data=2,tensor=4, each picture of
    super-resolution on four of them, by its rows. Parameters lie on every device. Left out: one device."""


def with_boxes(pipeline: Pipeline, boxes: Sequence[TrainedModel]) -> Pipeline:
    """The pipeline with other boxes, as many as it has."""
    generator, *decoders = boxes
    return dataclasses.replace(pipeline, generator=generator, decoders=tuple(decoders))


def with_dtype(pipeline: Pipeline, dtype: str | None) -> Pipeline:
    """The pipeline with boxes that compute in `dtype` (None: each in its own). Parameters and samplers stay float32."""
    if dtype is None:
        return pipeline
    models = trained(pipeline)
    cast = [presets.executed(each.model, dtype=dtype) for each in models]
    return with_boxes(pipeline, [dataclasses.replace(each, model=model) for each, model in zip(models, cast)])


def with_samplings(pipeline: Pipeline, drawing: Drawing) -> Pipeline:
    """The pipeline with boxes that sample as the command line says. ValueError naming what is wrong with it."""
    models = trained(pipeline)
    chosen = samplings(models, drawing)
    return with_boxes(pipeline, [dataclasses.replace(each, sampling=new) for each, new in zip(models, chosen)])


def box_of(pipeline: Pipeline, side: int | None) -> int | None:
    """Number of the box that produces images of this side; None for None."""
    if side is None:
        return None
    if side not in pipeline.sides:
        raise ValueError(f"no stage draws {side} pixels; this cascade draws {', '.join(map(str, pipeline.sides))}")
    return pipeline.sides.index(side)


def mesh_of(text: str) -> Mesh | None:
    """The mesh that --mesh asks for. ValueError, before weights are read, for one that cannot be."""
    if not text:
        return None
    shape = parse(text).over(jax.device_count())
    if shape.fsdp != 1:
        raise ValueError(
            f"--mesh {text}: each device has all parameters when drawing, so that only data and tensor remain"
        )
    return make_mesh(*shape.sizes)


@contextmanager
def spread(pipeline: Pipeline, mesh: Mesh | None) -> Iterator[Pipeline]:
    """The pipeline on the devices of a mesh, within which it has to be used; as it is, where there is none."""
    if mesh is None:
        yield pipeline
        return

    def place(each: TrainedModel) -> TrainedModel:
        model = presets.split(each.model, "none", False, rows=each.model.low_res is not None)
        params = jax.device_put(each.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(each, model=model, params=params)

    with jax.set_mesh(mesh):
        yield with_boxes(pipeline, [place(each) for each in trained(pipeline)])


def samplings(models: Sequence[TrainedModel], drawing: Drawing) -> tuple[SamplingConfig, ...]:
    """How each stage draws: its own settings with those of the command line put in. ValueError naming a bad one."""
    chosen = {
        "sampler": each("sampler", drawing.sampler, len(models), presets.sampler),
        "steps": each("steps", drawing.steps, len(models), int),
        "spacing": each("respacing", drawing.respacing, len(models), presets.respacing),
        "guidance": each("guidance", drawing.guidance, len(models), float),
        "thresholding": each("thresholding", drawing.thresholding, len(models), presets.thresholding),
        "aug_level": each("aug-level", drawing.aug_level, len(models), float),
    }
    made = []
    for number, model in enumerate(models):
        given = {name: values[number] for name, values in chosen.items() if values[number] is not None}
        given |= _spaced(model.sampling, given)
        given |= _learned(model, given)
        given["guidance"] = _guidance(model.sampling.guidance, given.get("guidance"), drawing)
        if drawing.tile is not None and model.model.low_res is not None:
            given["tiles"] = Tiles(drawing.tile, drawing.tile_overlap)
        made.append(_dynamic(_random(dataclasses.replace(model.sampling, **given), drawing), drawing))
    if drawing.eta is not None and not any(isinstance(s.sampler, DDIM) for s in made):
        raise ValueError("--eta is for the sampler ddim, and no stage uses it here")
    if (drawing.percentile, drawing.cap) != (None, None) and not any(
        isinstance(s.thresholding, DynamicThreshold) for s in made
    ):
        raise ValueError("--percentile and --cap are for dynamic thresholding, and no stage uses it here")
    return tuple(made)


def each(name: str, text: str, stages: int, convert: Callable[[str], Any]) -> list[Any]:
    """A value for each stage, None where it is left out. ValueError naming the option."""
    values = [value.strip() for value in text.split(",")]
    if len(values) not in (1, stages):
        raise ValueError(f"--{name} {text}: {len(values)} values for {stages} stages; give one, or one for each")
    try:
        found = [convert(value) if value else None for value in values]
    except ValueError as error:
        raise ValueError(f"--{name} {text}: {error}") from error
    return found * stages if len(found) == 1 else found


def _guidance(guidance: Guidance, weight: float | None, drawing: Drawing) -> Guidance:
    given = {"weight": weight, "interval": drawing.guidance_interval, "rescale": drawing.guidance_rescale}
    return dataclasses.replace(guidance, **{name: value for name, value in given.items() if value is not None})


def _spaced(sampling: SamplingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Steps and spacing that go together: a respacing has its own number of steps, or, where another is asked for,
    takes so many evenly."""
    spacing, steps = given.get("spacing", sampling.spacing), given.get("steps")
    if not isinstance(spacing, Respaced) or steps == spacing.steps or (steps is not None and steps < 1):
        return {}
    if "spacing" in given and spacing.counts != (1,):
        if steps is not None:
            raise ValueError(f"--respacing of {spacing.steps} steps and --steps {steps}: leave one of them out")
        return {"steps": spacing.steps}
    steps = sampling.steps if steps is None else steps
    return {"steps": steps, "spacing": Respaced((steps,))}


def _learned(model: TrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """ddpm with the variance that the network has learned, where it has."""
    if not isinstance(given.get("sampler"), DDPM) or not model.model.unet.learned_variance:
        return {}
    return {"sampler": DDPM(None)}


def _random(sampling: SamplingConfig, drawing: Drawing) -> SamplingConfig:
    """With eta, where the sampler is DDIM."""
    if drawing.eta is None or not isinstance(sampling.sampler, DDIM):
        return sampling
    return dataclasses.replace(sampling, sampler=dataclasses.replace(sampling.sampler, eta=drawing.eta))


def _dynamic(sampling: SamplingConfig, drawing: Drawing) -> SamplingConfig:
    """With the percentile and the cap, where the thresholding is dynamic."""
    given = {"percentile": drawing.percentile, "cap": drawing.cap}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or not isinstance(sampling.thresholding, DynamicThreshold):
        return sampling
    return dataclasses.replace(sampling, thresholding=dataclasses.replace(sampling.thresholding, **given))


def size_of(text: str) -> tuple[int, int] | None:
    """`SIDE` or `HEIGHTxWIDTH` in pixels; None where it is empty."""
    if not text:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError as error:
        raise ValueError(f"--size {text}: not of the form SIDE or HEIGHTxWIDTH") from error
    return height, width


class Bars:
    """A progress bar for each box of a pipeline, for `Pipeline.batches`, and the seconds that the boxes took.

    The time between two reports of progress belongs to the box that makes the second one. runs: how often `batches`
    will be called, for about as many samples each.
    """

    def __init__(self, pipeline: Pipeline, runs: int = 1):
        self._sides, self._runs = pipeline.sides, runs
        self._boxes: dict[int, _Box] = {}
        self._clock = time.perf_counter()

    def __call__(self, box: int, done: int, total: int) -> None:
        if box not in self._boxes:
            # What was done before the bar was there must not count for its speed.
            options = {"total": total * self._runs, "desc": f"{self._sides[box]:5d} px", "unit": "step"}
            self._boxes[box] = _Box(tqdm(initial=done, **options))
        self._boxes[box].report(done, total, time.perf_counter() - self._clock)
        self.resume()

    def resume(self) -> None:
        """The time since the last report belongs to no box."""
        self._clock = time.perf_counter()

    def seconds(self, box: int) -> float:
        """All the seconds of a box, compilation included."""
        return sum(seconds for seconds, _ in self._boxes[box].reports)

    def per_picture(self, box: int, count: int) -> float:
        """Seconds a picture, of `count` in all; without those of the first report, which compiles, where there are
        others."""
        reports = self._boxes[box].reports
        seconds, steps = map(sum, zip(*(reports[1:] or reports)))
        return seconds / steps * sum(steps for _, steps in reports) / count

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_) -> None:
        for box in self._boxes.values():
            box.bar.close()


class _Box:
    """A bar, and the seconds and steps of each report."""

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.reports: list[tuple[float, int]] = []
        self._done = 0

    def report(self, done: int, total: int, seconds: float) -> None:
        steps = done - self._done if done > self._done else done  # else another run has begun
        if self.reports:
            self.bar.update(steps)
        self.reports.append((seconds, steps))
        self._done = done
        if self.bar.n >= self.bar.total:
            self.bar.close()

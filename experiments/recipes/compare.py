"""The systems compared: the same data, parameters and training FLOPs; `shapes` at 64×64.

    python -m experiments.recipes.compare
    python -m experiments.recipes.compare --tflop 20000 --batch 128 --out runs/compare-gpu     # a GPU
    python -m experiments.recipes.compare --trained imagen=jaxdiff/weights/tiny unclip=runs/prior,runs/decoder

Each system gets one budget of training FLOPs, which its trained parts divide (`SYSTEMS`): autoencoders and priors
count. The width of its generator, or of unCLIP's decoder, is that with which all trained parts together have the
parameters of the latent diffusion system. T5 and CLIP are the shipped ones; DALL·E 1 learns its own text encoder, and
has a VQ autoencoder, as a dVAE of this size learns too few codes in this time. Every system samples the same held-out
captions with the settings of its preset. OUT/README.md is the page: scores, costs, and a sheet with a row for each
system. Started again, it resumes: finished runs and scores stay. With --trained there is only the sheet, of captions
with one object, by runs that exist.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import train
from experiments.cli import Command, run
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.recipes.comparison import (
    SCORES,
    Rows,
    check_distances,
    columns,
    count_of,
    flops_of,
    inference_flops,
    measured,
    nearest,
    show,
)
from experiments.table import TASKS
from experiments.tasks import autoencoder, dalle, diffusion, latents, unclip
from experiments.tasks.task import Task
from jaxdiff.core.files import replacing, write_json
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.weights import pretrained
from jaxdiff.weights.unclip import CANDIDATES

TOLERANCE = 0.05
"""Allowed relative difference of parameters and FLOPs."""


@dataclass(frozen=True)
class Settings:
    """The budget, and the size of the test."""

    out: Path = Path("runs/compare")
    """Folder of the runs and of the page."""
    systems: tuple[str, ...] = ()
    """Systems to compare; default: all."""
    trained: tuple[str, ...] = ()
    """NAME=RUN, or NAME=RUN,RUN for a system of several: only show these, at 64×64."""
    tflop: float = 160.0
    """Training budget of each system, in 10¹² floating-point operations."""
    batch: int = 16
    """Images per update."""
    learning_rate: float = 2e-3
    """Peak learning rate of all parts (Muon)."""
    n: int = 100
    """Held-out captions of each kind."""
    frechet: int = 512
    """Held-out captions of the Fréchet distances and the CLIP score."""
    examples: int = DataOptions().examples
    """Training images to render."""
    seed: int = 0
    """Seed of training."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""

    def check(self) -> None:
        """ValueError naming the flag."""
        if unknown := [name for name in self.systems if name not in SYSTEMS]:
            raise ValueError(f"--systems {' '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
        if wrong := next((each for each in self.trained if not all(each.partition("="))), None):
            raise ValueError(f"--trained {wrong}: NAME=RUN, or NAME=RUN,RUN")
        for name in ("tflop", "batch", "n", "frechet", "examples"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name):g}: must be above 0")


@dataclass(frozen=True)
class Part:
    """A trained part. fraction: of its system's FLOPs. settings: of its task, with the preset; for earlier parts in
    this folder. widened: the preset's model of another width, for the part whose width is fitted. sampled: whether
    sampling loads its run; others are found from the runs that were trained on them."""

    task: str
    fraction: float
    settings: Callable[[Path], Any]
    widened: Callable[[Any, int], Any] | None = None
    widths: range = range(0)
    sampled: bool = True


def _unet(model: Any, width: int) -> Any:
    return dataclasses.replace(model, unet=dataclasses.replace(model.unet, channels=width))


def _network(model: Any, width: int) -> Any:
    return dataclasses.replace(model, network=dataclasses.replace(model.network, width=width))


SYSTEMS: dict[str, tuple[Part, ...]] = {
    "sd": (
        Part("sd.autoencoder", 0.4, lambda out: autoencoder.Settings(preset="tiny"), sampled=False),
        Part(
            "sd.unet",
            0.6,
            lambda out: latents.LatentSettings(
                preset="tiny", latent=latents.LatentOptions(str(out / "sd.autoencoder"))
            ),
        ),
    ),
    "imagen": (Part("imagen.base64", 1.0, lambda out: diffusion.Settings(preset="quick"), _unet, range(32, 257, 4)),),
    "dalle": (
        Part("sd.autoencoder", 0.25, lambda out: autoencoder.Settings(preset="tiny-vq"), sampled=False),
        Part(
            "dalle.transformer",
            0.75,
            lambda out: dalle.Settings(
                preset="tiny", transformer=dalle.TransformerOptions(codes=str(out / "sd.autoencoder"))
            ),
            _network,
            range(64, 513, 8),
        ),
    ),
    "unclip": (
        Part("unclip.prior", 0.1, lambda out: unclip.UnCLIPSettings(preset="tiny")),
        Part("unclip.decoder", 0.9, lambda out: unclip.UnCLIPSettings(preset="tiny"), _unet, range(16, 257, 2)),
    ),
}
"""The parts in the order of their training. The first system sets the parameters."""


@dataclass(frozen=True)
class Fitted:
    """A part with its model of the fitted width, and its number of updates."""

    part: Part
    task: Task
    preset: str
    model: Any
    updates: int

    def flops(self, batch: int) -> float:
        """Of its training."""
        return self.updates * batch * flops_of(self.model)


def main(settings: Settings) -> None:
    """Train, measure and show."""
    settings.check()
    if settings.trained:
        named = (each.split("=", 1) for each in settings.trained)
        show(settings.out / "images.png", {name: pretrained.load(runs.split(",")) for name, runs in named}, (1,))
        print(f"{settings.out / 'images.png'}: a row for each system")
        return
    check_distances(settings.frechet)
    use_cores(settings.batch)
    parameters = sum(count_of(_model(TASKS[part.task], _preset(part))) for part in SYSTEMS["sd"])
    scores, pipelines = {}, {}
    fits = {name: fitted(SYSTEMS[name], parameters, settings) for name in settings.systems or SYSTEMS}
    costs = {name: costs_of(name, parts, parameters, settings) for name, parts in fits.items()}
    for name, parts in fits.items():
        out = settings.out / name
        for each in parts:
            train.main(each.part.task, each.task, training(each, out, settings))
        pipelines[name] = pretrained.load([out / each.part.task for each in parts if each.part.sampled])
        file = out / "scores.json"
        if not file.is_file():
            write_json(file, costs[name] | measured(pipelines[name], settings.n, settings.frechet))
        scores[name] = json.loads(file.read_text(encoding="utf-8"))
    show(settings.out / "images.png", pipelines)
    with replacing(settings.out / "README.md") as temporary:
        temporary.write_text(page(scores, settings), encoding="utf-8")
    print(columns(scores, ROWS))
    print(f"{settings.out / 'README.md'}: the page")


def fitted(parts: tuple[Part, ...], parameters: int, settings: Settings) -> list[Fitted]:
    """The parts of a system with about `parameters` in all, and the updates that its budget allows."""
    fixed = sum(count_of(_model(TASKS[part.task], _preset(part))) for part in parts if part.widened is None)
    result = []
    for part in parts:
        task, preset = TASKS[part.task], _preset(part)
        if (widened := part.widened) is not None:
            first = task.preset(preset)

            def sized(width: int, task=task, first=first, widened=widened) -> Task:
                return dataclasses.replace(
                    task, presets={"equal": dataclasses.replace(first, model=widened(first.model, width))}
                )

            task = nearest(sized, part.widths, parameters - fixed, lambda task: _model(task, "equal"))
            preset = "equal"
        model = _model(task, preset)
        updates = round(part.fraction * settings.tflop * 1e12 / flops_of(model) / settings.batch)
        if updates < 2:
            raise ValueError(f"--tflop {settings.tflop:g}: {updates} updates of {part.task}; at least 2")
        result.append(Fitted(part, task, preset, model, updates))
    return result


def costs_of(name: str, parts: list[Fitted], parameters: int, settings: Settings) -> dict[str, Any]:
    """Parameters, images and FLOPs. ValueError if they differ from those of the others by more than 5 %."""
    last = parts[-1]
    steps = sum(_steps(each) * inference_flops(each.task, each.preset, each.model) for each in parts)
    result = {
        "parameters": sum(count_of(each.model) for each in parts),
        "images": {each.part.task: each.updates * settings.batch for each in parts},
        "flops": sum(each.flops(settings.batch) for each in parts),
        "flops_an_image": steps,
        "preset": last.preset,
    }
    for what, wanted in (("parameters", parameters), ("flops", settings.tflop * 1e12)):
        if abs(result[what] / wanted - 1.0) > TOLERANCE:
            raise ValueError(f"{what} of {name}: {result[what]:.4g}, of the others {wanted:.4g}")
    return result


def _steps(part: Fitted) -> int:
    """How often sampling evaluates it: a diffusion model in each step, a prior for each candidate, others once."""
    sampling = getattr(part.task.preset(part.preset), "sampling", None)
    if not isinstance(sampling, SamplingConfig):
        return 1
    return sampling.steps * (CANDIDATES if isinstance(part.model.product, EmbeddingSpec) else 1)


def training(part: Fitted, out: Path, settings: Settings) -> Any:
    """The settings of its run."""
    return dataclasses.replace(
        part.part.settings(out),
        out=out / part.part.task,
        preset=part.preset,
        run=RunOptions(part.updates, settings.batch, seed=settings.seed, save_every=1000, evaluate_every=1000),
        dataset=DataOptions(examples=settings.examples, data_dir=settings.data_dir),
        optimization=OptimizerOptions("muon", settings.learning_rate, warmup=min(100, part.updates - 1)),
    )


def _preset(part: Part) -> str:
    return part.settings(Path()).preset


def _model(task: Task, preset: str) -> Any:
    return task.on_one_device(task.model(preset, task.settings.compute))


ROWS: Rows = {
    "trained parameters": lambda s: f"{s['parameters'] / 1e6:.2f} M",
    "training FLOPs": lambda s: f"{s['flops'] / 1e12:.1f} T",
    "training images": lambda s: ", ".join(f"{name} {count:,}" for name, count in s["images"].items()),
    **SCORES,
    "FLOPs an image": lambda s: f"{s['flops_an_image'] / 1e9:.1f} G",
}


def page(scores: dict[str, dict[str, Any]], settings: Settings) -> str:
    """The page, in Markdown."""
    return "\n".join(
        [
            "# The systems compared",
            "",
            f"`python -m experiments.recipes.compare --tflop {settings.tflop:g} --batch {settings.batch}`: "
            f"{settings.n} held-out captions of each kind of `shapes`, {settings.frechet} for distances and the CLIP "
            "score.",
            "",
            columns(scores, ROWS),
            "",
            "![A row for each system, a column for each caption](images.png)",
            "",
        ]
    )


if __name__ == "__main__":
    run(Command(main, Settings(), "the systems with the same data, parameters and training FLOPs"))

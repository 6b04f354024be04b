"""Latent and pixel diffusion of equal size and equal training: `shapes` at 64×64.

    python -m experiments.train sd.autoencoder --data shapes --steps 4500 --batch 8 --out runs/autoencoder
    python -m experiments.train sd.unet --data shapes --autoencoder runs/autoencoder --steps 3600 --out runs/unet
    python -m experiments.recipes.latent_pixels --latent runs/unet --out runs/latent-pixels

A base model of Imagen (preset `quick`, widened to the latent U-Net's number of parameters) is trained on the same data
and text, with the same optimizer and batch, for as many updates as take the FLOPs of the latent U-Net's training; those
of the autoencoder's training are told apart. Both sample held-out captions of one and of two objects, each with the
settings of its own preset. OUT/scores.json has the numbers, OUT/table.md the table, OUT/images.png samples.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import train
from experiments.cli import Command, run
from experiments.options import settings_file
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.recipes.comparison import SCORES, check_distances, columns, count_of, flops_of, measured, nearest, show
from experiments.table import TASKS
from experiments.tasks import diffusion
from experiments.tasks.noise_levels import NoiseLevels
from jaxdiff.core.files import replacing, write_json
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.weights import latent_runs, pretrained

LEVELS = NoiseLevels((-7.0, -2.0), 0.5, snr_power=0.1)
"""Those of `experiments.quickstart --train`, with which a pixel model learns colours in minutes."""
TOLERANCE = 0.05
"""Allowed relative difference of parameters and FLOPs."""


@dataclass(frozen=True)
class Settings:
    """The latent run, and the size of the test."""

    latent: Path = Path("runs/unet")
    """Run of sd.unet, finished."""
    out: Path = Path("runs/latent-pixels")
    """Folder of the results and of the pixel model's run."""
    n: int = 100
    """Held-out captions of each kind."""
    frechet: int = 512
    """Held-out captions of the Fréchet distance."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings) -> None:
    """Train the pixel model and compare both."""
    check_distances(settings.frechet)
    trained = options_of(settings.latent)
    use_cores(trained["batch"])
    pipeline = pretrained.load(settings.latent)
    generator, decoder = pipeline.generator, pipeline.decoders[0]
    assert isinstance(generator, TrainedModel) and isinstance(decoder, TrainedAutoencoder)
    images = trained["steps"] * trained["batch"]
    latent = {"parameters": count_of(generator.model), "flops": images * flops_of(generator.model), "images": images}
    length, width = generator.model.text.shape
    model = equal(latent["parameters"], length, width)
    steps = round(latent["flops"] / flops_of(model) / trained["batch"])
    images = steps * trained["batch"]
    pixels = {"parameters": count_of(model), "flops": images * flops_of(model), "images": images}
    for name, value in pixels.items():
        if name != "images" and abs(value / latent[name] - 1.0) > TOLERANCE:
            raise ValueError(f"{name} of the pixel model: {value:.4g}, of the latent one {latent[name]:.4g}")
    out = settings.out / "pixels"
    pixel_run(model, settings, trained, steps)
    systems = {"latent": (pipeline, latent), "pixel": (pretrained.load(out), pixels)}
    scores = {}
    for name, (system, counts) in systems.items():
        scores[name] = counts | measured(system, settings.n, settings.frechet)
    scores["autoencoder"] = autoencoder_of(settings.latent, decoder)
    write_json(settings.out / "scores.json", scores)
    with replacing(settings.out / "table.md") as temporary:
        temporary.write_text(table(scores) + "\n", encoding="utf-8")
    show(settings.out / "images.png", {name: system for name, (system, _) in systems.items()})
    print(table(scores))


def options_of(run_folder: Path) -> dict[str, Any]:
    """The settings of a run, by flag."""
    return settings_file.read(run_folder / settings_file.NAME)[1]


def equal(parameters: int, length: int, width: int) -> DiffusionModel:
    """The preset `quick` of the width whose number of parameters is nearest."""
    preset = TASKS["imagen.base64"].preset("quick").model.reading(length, width)

    def of(channels: int) -> DiffusionModel:
        return dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, channels=channels))

    return nearest(of, range(32, 257, 4), parameters)


def pixel_run(model: DiffusionModel, settings: Settings, trained: dict[str, Any], steps: int) -> None:
    """Train the pixel model as `experiments.train imagen.base64` does; resumes."""
    task = TASKS["imagen.base64"]
    preset = dataclasses.replace(task.preset("quick"), model=model, levels=LEVELS)
    equal_task = dataclasses.replace(task, presets={"equal": preset})
    out = settings.out / "pixels"
    data = DataOptions(examples=trained.get("examples", DataOptions().examples), data_dir=settings.data_dir)
    run_options = RunOptions(steps, trained["batch"], seed=trained.get("seed", 0), evaluate_every=500, save_every=500)
    optimizer = OptimizerOptions(trained.get("optimizer"), trained.get("learning-rate"))
    given = diffusion.Settings(out, preset="equal", run=run_options, dataset=data, optimization=optimizer)
    finished = (out / "model" / "model.safetensors").is_file()
    if not finished:
        train.main("imagen.base64", equal_task, given)


def autoencoder_of(latent: Path, decoder: TrainedAutoencoder) -> dict[str, Any]:
    """Parameters and FLOPs of the autoencoder, and of its training if its run is still there."""
    model = AutoencoderModel(decoder.config, decoder.side, adversary=None)
    result: dict[str, Any] = {"parameters": count_of(model)}
    source = Path(json.loads((latent / latent_runs.NAME).read_text())["source"])
    if (source / settings_file.NAME).is_file():
        options = options_of(source)
        result["images"] = options["steps"] * options["batch"]
        result["flops"] = result["images"] * flops_of(model)
    return result


ROWS = {
    "parameters": lambda s: f"{s['parameters'] / 1e6:.2f} M",
    "training images": lambda s: f"{s['images']:,}",
    "training FLOPs": lambda s: f"{s['flops'] / 1e12:.1f} T",
    **SCORES,
}


def table(scores: dict[str, Any]) -> str:
    """Both systems side by side, in Markdown, and a line about the autoencoder."""
    own = scores["autoencoder"]
    line = f"The autoencoder has {own['parameters'] / 1e6:.2f} M parameters"
    if "flops" in own:
        line += f"; its training on {own['images']:,} images took {own['flops'] / 1e12:.1f} TFLOP more"
    return f"{columns({name: scores[name] for name in ('latent', 'pixel')}, ROWS)}\n\n{line}."


if __name__ == "__main__":
    run(Command(main, Settings(), "latent and pixel diffusion of equal size and training"))

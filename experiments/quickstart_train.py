"""Train the cascade from scratch, including T5, in minutes: `python -m experiments.quickstart --train`.

Uses the functions of `experiments.train` with settings for 2 CPU cores. Every stage resumes when it is run again, and
writes sample grids.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import train
from experiments.exports import imagen as export
from experiments.options.cores import use_cores
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions, TrainSettings
from experiments.table import TASKS
from experiments.tasks import diffusion, t5
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.weights.imagen import STAGES
from jaxdiff.weights.stages import load_model, save_model


@dataclasses.dataclass(frozen=True)
class T5Training:
    """Training of T5."""

    t5_steps: int = 800
    """Updates of T5."""
    t5_batch: int = 64
    """Captions per update of T5."""


@dataclasses.dataclass(frozen=True)
class BaseTraining:
    """Training of the base model."""

    examples: int = 20_000
    """Images at 64 pixels; T5 is trained on their captions."""
    base_preset: str = "quick"
    """Preset of the base model: `quick` learns colours in minutes; `tiny`, the shipped one, learns shapes in hours."""
    base_steps: int = 2050
    """Updates of the base model."""
    base_batch: int = 32
    """Images per update of the base model."""
    base_learning_rate: float = 3e-3
    """Peak learning rate of the base model (Muon)."""
    base_ema_decay: float = 0.99
    """EMA decay of the base model."""
    base_logsnr: tuple[float, float] | None = (-7.0, -2.0)
    """Log-SNRs where the base model is trained most: there the noise shows objects but not their colours, which only
    the caption determines. None: the preset's."""
    base_logsnr_fraction: float = 0.5
    """Fraction of the base model's training in that range; with more, its images stay blurred and noisy."""
    base_snr_power: float | None = 0.1
    """Power of the SNR that weights the base model's x0 error; 0: equal weights. None: the preset's."""


@dataclasses.dataclass(frozen=True)
class SuperResolutionTraining:
    """Training of both super-resolution stages."""

    examples_256: int = 2_000
    """Training images of 64→256."""
    examples_1024: int = 240
    """Training images of 256→1024."""
    sr256_steps: int = 400
    """Updates of 64→256."""
    sr1024_steps: int = 0
    """Updates of 256→1024, which starts from the parameters of 64→256. It is the same network for the same task, and a
    few more minutes on the nearly empty crops of large images make it worse."""
    sr_batch: int = 16
    """Crops per update of super-resolution."""
    sr_crop: int = 128
    """Side of the crops in pixels."""
    sr_learning_rate: float = 2e-3
    """Peak learning rate of super-resolution (Muon)."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of --train. With the defaults it takes 25 minutes on 2 CPU cores: about 3 for T5, 16 for the base, 4 for
    64→256, the rest for rasterising data, compiling and the final grid."""

    t5: T5Training = T5Training()
    base: BaseTraining = BaseTraining()
    super_resolution: SuperResolutionTraining = SuperResolutionTraining()
    sample_every: int = 200
    """Updates between sample grids."""
    save_every: int = 100
    """Updates between checkpoints."""
    psnr_images: int = 8
    """True images for the PSNR at the end; a quarter as many at 1024; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the generators; use bfloat16 on accelerators."""
    workers: int = 0
    """Processes that decode images; 0: threads only, which suffice for a CPU."""
    stored: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type of the stored parameters of the generators."""


def train_cascade(settings: Training, out: Path, seed: int = 0) -> Path:
    """Train T5, the base and both super-resolution stages below `out`. Returns the folder of the finished cascade."""
    batches = settings.t5.t5_batch, settings.base.base_batch, settings.super_resolution.sr_batch
    use_cores(*batches)
    _train("t5", _t5(settings, out, seed))
    _train("imagen.base64", _base(settings, out, seed))
    _train("imagen.sr256", _sr256(settings, out, seed))
    if settings.super_resolution.sr1024_steps:
        _train("imagen.sr1024", _sr1024(settings, out, seed))
    else:
        learned = load_model(out / "sr256" / "model")
        stage = TASKS["imagen.sr1024"].preset("tiny").model
        save_model(TrainedModel(stage, learned.params, learned.sampling), out / "sr1024" / "model")
    folders = {name: (out / name / "model",) for name in STAGES}
    text = str(out / "t5" / "encoder")
    export.main(export.Settings(**folders, text=text, out=out / "weights", dtype=settings.stored))
    return out / "weights"


def _train(name: str, settings: TrainSettings) -> None:
    train.main(name, TASKS[name], settings)


def _t5(settings: Training, out: Path, seed: int) -> t5.Settings:
    chosen = settings.t5
    return t5.Settings(
        out / "t5",
        run=RunOptions(
            chosen.t5_steps,
            chosen.t5_batch,
            ema_decay=0.99,
            seed=seed,
            evaluate_every=0,
            save_every=settings.save_every,
        ),
        dataset=_data(settings, out, settings.base.examples),
        optimization=OptimizerOptions(learning_rate=2e-3),
    )


def _base(settings: Training, out: Path, seed: int) -> diffusion.Settings:
    base = settings.base
    return diffusion.Settings(
        out / "base64",
        base.base_preset,
        run=_run(settings, base.base_steps, base.base_batch, base.base_ema_decay, seed),
        dataset=_data(settings, out, base.examples),
        optimization=OptimizerOptions("muon", base.base_learning_rate, warmup=30),
        text_encoder=_text(out),
        diffusion=diffusion.DiffusionOptions(
            logsnr=base.base_logsnr,
            logsnr_fraction=base.base_logsnr_fraction,
            snr_power=base.base_snr_power,
        ),
        compute=diffusion.UNetCompute(settings.dtype),
    )


def _sr256(settings: Training, out: Path, seed: int) -> diffusion.Settings:
    chosen = settings.super_resolution
    return diffusion.Settings(
        out / "sr256",
        run=_run(settings, chosen.sr256_steps, chosen.sr_batch, 0.98, seed),
        dataset=_data(settings, out, chosen.examples_256),
        optimization=OptimizerOptions("muon", chosen.sr_learning_rate, warmup=20),
        text_encoder=_text(out),
        diffusion=diffusion.DiffusionOptions(crop=chosen.sr_crop),
        compute=diffusion.UNetCompute(settings.dtype),
    )


def _sr1024(settings: Training, out: Path, seed: int) -> diffusion.Settings:
    chosen, lower = settings.super_resolution, _sr256(settings, out, seed)
    run = _run(settings, chosen.sr1024_steps, chosen.sr_batch, 0.98, seed)
    return dataclasses.replace(
        lower,
        out=out / "sr1024",
        run=dataclasses.replace(run, init=out / "sr256" / "model"),
        dataset=_data(settings, out, chosen.examples_1024),
    )


def _run(settings: Training, steps: int, batch: int, ema_decay: float, seed: int) -> RunOptions:
    return RunOptions(
        steps,
        batch,
        ema_decay=ema_decay,
        seed=seed,
        sample_every=settings.sample_every,
        evaluate_every=0,
        save_every=settings.save_every,
    )


def _data(settings: Training, out: Path, examples: int) -> DataOptions:
    return DataOptions(examples=examples, held_out=1, workers=settings.workers, data_dir=out / "data")


def _text(out: Path) -> TextOptions:
    return TextOptions(str(out / "t5" / "encoder"))

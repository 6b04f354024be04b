"""The whole cascade from scratch, T5 included, in minutes: `python -m experiments.quickstart --train`.

The same functions as `experiments.text.pretrain` and `experiments.imagen.train`, with settings small enough for 2 CPU
cores. Every stage resumes when it is run again, and sample grids are written as it goes.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.cores import use_cores
from experiments.imagen import assemble, presets, train
from experiments.text.pretrain import Pretraining, pretrain
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.weights.imagen import STAGES, load_model, save_model


@dataclasses.dataclass(frozen=True)
class Training:
    """What --train does. The defaults share its 25 minutes on 2 CPU cores: about 3 for T5, 16 for the base, 4 for
    64→256, the rest for drawing data, compiling and the final sheet."""

    examples: int = 20_000
    """Pictures at 64 pixels, whose captions T5 reads too."""
    examples_256: int = 2_000
    """Pictures to train 64→256 with."""
    examples_1024: int = 240
    """Pictures to train 256→1024 with."""
    t5_steps: int = 800
    """Updates of T5."""
    t5_batch: int = 64
    """Captions per update of T5."""
    base_preset: str = "quick"
    """Size of the base model: one that learns colours in minutes; `tiny`, the shipped one, learns forms in hours."""
    base_steps: int = 2050
    """Updates of the base model."""
    base_batch: int = 32
    """Pictures per update of the base model."""
    base_learning_rate: float = 3e-3
    """Of the base model, at its peak (Muon)."""
    base_ema_decay: float = 0.99
    """Of the base model's averaged parameters."""
    base_logsnr: tuple[float, float] | None = (-7.0, -2.0)
    """Log-SNRs where the base model trains most: there an object can be seen, but not yet its colour, and only the
    caption says it. None: wherever the preset trains."""
    base_logsnr_fraction: float = 0.5
    """Fraction of the base model's training there; with more, what it draws stays blurred and noisy."""
    base_snr_power: float | None = 0.1
    """Power of the SNR that weights its error; 0: no noise level counts for more. None: the preset's weights."""
    sr256_steps: int = 400
    """Updates of 64→256."""
    sr1024_steps: int = 0
    """Updates of 256→1024, which starts from what 64→256 has learned: the same network for the same task, where a few
    minutes more on the nearly empty crops of large pictures do harm."""
    sr_batch: int = 16
    """Crops per update of super-resolution."""
    sr_crop: int = 128
    """Their side in pixels."""
    sr_learning_rate: float = 2e-3
    """Of super-resolution, at its peak (Muon)."""
    sample_every: int = 200
    """Updates between sample grids."""
    save_every: int = 100
    """Updates between checkpoints."""
    psnr_pictures: int = 8
    """True pictures for the PSNR at the end; a quarter as many at 1024; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the generators compute in; bfloat16 on accelerators."""
    workers: int = 0
    """Processes that decode pictures; 0: threads alone, which keep up with a CPU."""
    stored: Literal["float32", "float16", "bfloat16"] = "float16"
    """What the finished generators' parameters are stored in."""


def train_cascade(settings: Training, out: Path, seed: int = 0) -> Path:
    """Trains T5, the base and both super-resolution stages below `out`; the folder of the finished cascade."""
    use_cores(settings.t5_batch, settings.base_batch, settings.sr_batch)
    data, text = out / "data", out / "t5"
    common = {"seed": seed, "save_every": settings.save_every, "data_dir": data}
    pretrain(
        Pretraining(
            data="shapes",
            out=text,
            steps=settings.t5_steps,
            batch=settings.t5_batch,
            examples=settings.examples,
            held_out=1,
            **common,
        )
    )
    common |= {"text": str(text / "encoder"), "held_out": 1, "sample_every": settings.sample_every}
    common |= {"dtype": settings.dtype, "workers": settings.workers}
    base = train.Run(
        stage="base64",
        preset=settings.base_preset,
        out=out / "base64",
        steps=settings.base_steps,
        batch=settings.base_batch,
        optimizer="muon",
        learning_rate=settings.base_learning_rate,
        ema_decay=settings.base_ema_decay,
        logsnr=settings.base_logsnr,
        logsnr_fraction=settings.base_logsnr_fraction,
        snr_power=settings.base_snr_power,
        warmup=30,
        examples=settings.examples,
        **common,
    )
    train.main(base)
    enlarging = {
        "batch": settings.sr_batch,
        "crop": settings.sr_crop,
        "optimizer": "muon",
        "learning_rate": settings.sr_learning_rate,
        "ema_decay": 0.98,
        "warmup": 20,
        **common,
    }
    sr256, sr1024 = out / "sr256", out / "sr1024"
    train.main(
        train.Run(stage="sr256", out=sr256, steps=settings.sr256_steps, examples=settings.examples_256, **enlarging)
    )
    if settings.sr1024_steps:
        enlarging |= {"init": sr256 / "model", "examples": settings.examples_1024}
        train.main(train.Run(stage="sr1024", out=sr1024, steps=settings.sr1024_steps, **enlarging))
    else:
        learned = load_model(sr256 / "model")
        stage = presets.stage("sr1024", "tiny")
        save_model(TrainedModel(stage, learned.params, learned.sampling), sr1024 / "model")
    stages = {name: (out / name / "model",) for name in STAGES}
    assemble.main(assemble.Settings(text=text / "encoder", out=out / "weights", dtype=settings.stored, **stages))
    return out / "weights"

"""Train one stage of an Imagen cascade.

    python -m experiments.imagen.train --stage base64 --text runs/t5/encoder --data shapes --out runs/base64
    python -m experiments.imagen.train --stage sr256 --data shapes --out runs/sr256
    python -m experiments.imagen.train --stage sr1024 --data shapes --out runs/sr1024 --init runs/sr256/model

Run again with the same folder, it goes on from its last checkpoint. The folder gets checkpoints/, metrics.jsonl,
tensorboard/, loss.png, samples/ (a grid now and then) and at the end model/, which `experiments.imagen.sample` reads as
part of a cascade. Costs of the shipped models are in jaxdiff/weights/tiny/README.md.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.cli import run
from experiments.imagen import pictures, presets
from jaxdiff.data import sources
from jaxdiff.data.embeddings import Embeddings, fingerprint, open_embeddings, store_embeddings
from jaxdiff.data.example import Example, Source
from jaxdiff.data.pipeline import Reading, images
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.schedules import Focused, Schedule
from jaxdiff.systems.cascade import Model
from jaxdiff.systems.imagen import Sampling, Stage, draw, null_text
from jaxdiff.text.t5 import TextEmbedding, TextEncoder, encode
from jaxdiff.training.checkpoints import load_ema
from jaxdiff.training.loop import Diverged, TrainConfig, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon, OptimizerConfig
from jaxdiff.weights.imagen import SHIPPED, load_params, save_model
from jaxdiff.weights.t5 import load_text_encoder

OPTIMIZERS = {"adam": AdamW(b2=0.99), "adafactor": Adafactor(), "muon": Muon()}


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one training run."""

    stage: Literal["base64", "sr256", "sr1024"]
    """Which stage."""
    out: Path
    """Folder of the run."""
    preset: str = "tiny"
    """Its size: tiny | 300m | 500m | 2b for base64, tiny | paper for the others."""
    data: str = "shapes"
    """shapes | emoji | folder:PATH | tfds:NAME | records:PATH"""
    text: str = str(SHIPPED / "text")
    """The frozen text encoder: a directory or hub id in the transformers layout; the shipped tiny one by default."""
    embeddings: Path | None = None
    """A folder that experiments.data.embed wrote; without it the embeddings are stored below DATA_DIR."""
    init: Path | None = None
    """Start from the parameters of this model (the model/ of another run with the same network), to fine-tune them."""
    logsnr: tuple[float, float] | None = None
    """Train at log-SNRs spread evenly over this range alone; left out: where the preset trains. A stage that draws well
    but does not do what its captions say learns it faster where that is decided: -5.5 to 0 for forms at 64 pixels."""
    steps: int = 5000
    """Updates."""
    batch: int = 32
    """Pictures per update, of all devices together."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, to save memory."""
    crop: int | None = None
    """Side of super-resolution's training crops in pixels; 0: whole pictures; left out: a quarter of the picture."""
    optimizer: Literal["adam", "adafactor", "muon"] = "adam"
    """Adam and Adafactor are the paper's; Muon learns more from each picture where pictures are dear."""
    learning_rate: float = 1e-3
    """At its peak."""
    warmup: int = 200
    """Updates from 0 to the peak; afterwards the rate falls to 0 along a cosine."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are what is kept."""
    seed: int = 0
    """Of the initial parameters, the order of the data and the noise."""
    log_every: int = 50
    """Steps between lines of metrics."""
    sample_every: int = 500
    """Steps between grids in samples/; 0: none."""
    save_every: int = 500
    """Steps between checkpoints."""
    examples: int = 20_000
    """How many pictures of shapes to draw."""
    held_out: int = 1_000
    """How many held-out ones to draw beside them."""
    limit: int = 0
    """Train on so many examples only, evenly spread over the set, to see whether they can be learned; 0: on all."""
    strict: bool = False
    """A picture that cannot be read or lacks its caption is an error, not a warning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters and optimizer stay float32. bfloat16 on accelerators."""
    remat: bool = False
    """Compute each block again in the backward pass, to save memory."""
    fsdp: int = 1
    """Devices that share each parameter."""
    workers: int = 0
    """Processes that decode pictures; 0: threads alone."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Run) -> None:
    """Train one stage of an Imagen cascade and write its averaged parameters to OUT/model."""
    stage = presets.stage(settings.stage, settings.preset)
    unet = dataclasses.replace(stage.unet, dtype=settings.dtype, remat=settings.remat)
    stage = dataclasses.replace(stage, unet=unet)
    if settings.logsnr is not None:
        stage = dataclasses.replace(stage, schedule=focused(stage.schedule, *settings.logsnr))
    sampling = presets.sampling(settings.stage, settings.preset)
    encoder = load_text_encoder(settings.text, stage.text_length) if stage.unet.reads_text else None
    if encoder is not None:
        check_width(stage, encoder)
    source = open_source(settings, stage)
    embeddings = None if encoder is None else embeddings_of(settings, source, encoder)
    config = TrainConfig(
        optimizer=OptimizerConfig(
            kind=OPTIMIZERS[settings.optimizer],
            learning_rate=settings.learning_rate,
            warmup=min(settings.warmup, settings.steps - 1),
            total=settings.steps,
        ),
        steps=settings.steps,
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
        log_every=settings.log_every,
        sample_every=settings.sample_every,
        save_every=settings.save_every,
        seed=settings.seed,
    )
    train(
        stage,
        batches(settings, stage, source, embeddings),
        config,
        settings.out,
        mesh=make_mesh(fsdp=settings.fsdp),
        initial=None if settings.init is None else load_params(stage, settings.init / "model.safetensors"),
        sample_hook=_Samples(stage, sampling, source, encoder, settings.out / "samples"),
        description=settings.stage,
    )
    save_model(Model(stage, load_ema(settings.out / "checkpoints"), sampling), settings.out / "model")
    print(f"{settings.out / 'model'}: the averaged parameters of step {settings.steps}")


def focused(schedule: Schedule, low: float, high: float) -> Focused:
    """The schedule trained in another range than its own."""
    return Focused(schedule.schedule if isinstance(schedule, Focused) else schedule, low, high)


def open_source(settings: Run, stage: Stage, split: str = "train") -> Source:
    """The pictures, at the stage's resolution where the set is drawn."""
    spec = sources.parse(settings.data)
    if isinstance(spec, sources.Shapes):
        spec = sources.Shapes(settings.examples, settings.held_out)
    source = sources.open(spec, stage.resolution, split, settings.data_dir)
    return _Spread(source, settings.limit) if 0 < settings.limit < len(source) else source


def embeddings_of(settings: Run, source: Source, encoder: TextEncoder) -> Embeddings:
    """The stored embeddings of the source's captions, computed now where they are not there yet."""
    made_by = fingerprint(encoder)
    if settings.embeddings is not None:
        return open_embeddings(settings.embeddings, made_by)
    name = "".join(c if c.isalnum() else "-" for c in settings.data)
    path = settings.data_dir / "embeddings" / f"{name}-{len(source)}-{made_by}"
    if (path / "embeddings.json").is_file():
        try:
            return open_embeddings(path, made_by)
        except ValueError:  # begun and not finished: go on
            pass
    captions = (source[i]["caption"] for i in tqdm(range(len(source)), desc="embed captions", unit="caption"))
    return store_embeddings(captions, lambda texts: encode(encoder, texts), path, encoder=made_by)


def batches(settings: Run, stage: Stage, source: Source, embeddings: Embeddings | None):
    """This process's share of the batches; super-resolution on crops of a quarter of the picture's side by default."""
    crop = None
    if stage.low_resolution is not None:
        crop = stage.resolution // 4 if settings.crop is None else settings.crop or None
    return images(
        source,
        stage.resolution,
        settings.batch // jax.process_count(),
        low_resolution=stage.low_resolution,
        crop=crop,
        seed=settings.seed,
        embeddings=embeddings,
        caption_optional=stage.low_resolution is not None,
        strict=settings.strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reading=Reading(workers=settings.workers),
    )


def check_width(stage: Stage, encoder: TextEncoder) -> None:
    if encoder.config.d_model != stage.unet.text_width:
        given, read = encoder.config.d_model, stage.unet.text_width
        raise ValueError(f"the text encoder gives embeddings of width {given}, the stage reads {read}")


@dataclasses.dataclass(frozen=True)
class _Spread:
    """So many examples of a source, evenly spread over it."""

    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return self.source[index * len(self.source) // self.count]


class _Samples:
    """Called by the loop now and then: a grid of the same few captions, or of the same low-resolution pictures."""

    COUNT = 8

    def __init__(self, stage: Stage, sampling: Sampling, source: Source, encoder: TextEncoder | None, folder: Path):
        self._stage, self._sampling, self._folder = stage, sampling, folder
        self._captions, self._text, self._low_res = [], null_text(stage, self.COUNT), None
        if encoder is not None:
            self._captions = [source[i]["caption"] or "" for i in _spread(len(source), self.COUNT)]
            self._text = TextEmbedding(*(np.asarray(a) for a in encode(encoder, self._captions)))
        if stage.low_resolution is not None:
            crop = min(stage.resolution, 256)
            found = images(
                source, stage.resolution, self.COUNT, low_resolution=stage.low_resolution, crop=crop, shuffle=False
            )
            self._low_res = jnp.asarray(next(found)["low_res"])

    def __call__(self, step: int, params: dict) -> None:
        stage = self._stage
        keys = noise.sample_keys(jax.random.key(0), jnp.arange(self.COUNT))
        side = stage.resolution if self._low_res is None else self._low_res.shape[1] * stage.factor
        null = null_text(stage, self.COUNT)
        drawn = np.asarray(draw(stage, params, self._sampling, self._text, null, keys, (side, side), self._low_res))
        shown, captions = list(drawn), self._captions or [f"drawn at step {step}"] * self.COUNT
        if self._low_res is not None:
            shown, captions = [*np.asarray(self._low_res), *drawn], ["input"] * self.COUNT + list(captions)
        sheet = pictures.grid(shown, captions, 256 if self._low_res is not None else 128, self.COUNT // 2)
        pictures.write(self._folder / f"{step:07d}.png", sheet)
        tqdm.write(f"samples: {self._folder / f'{step:07d}.png'}")


def _spread(length: int, count: int) -> Iterator[int]:
    return (i * length // count for i in range(count))


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

"""The models of the curves: text encoders of several sizes and base models conditioned on them, trained if missing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import train as training
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.table import TASKS
from experiments.tasks import t5
from jaxdiff.data import sources
from jaxdiff.data.embeddings import Embeddings, store_embeddings
from jaxdiff.data.example import Source, captions
from jaxdiff.data.pipeline import Batches, DataConfig, image_batches
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.t5 import T5Encoder
from jaxdiff.systems import imagen_tiny
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import TrainConfig, train
from jaxdiff.training.optimizer import Muon, OptimizerConfig
from jaxdiff.weights.clip import load_text_encoder as load_clip
from jaxdiff.weights.stages import load_model, save_model
from jaxdiff.weights.t5 import load_text_encoder

SIZES = ("micro", "tiny", "mini", "midi")
"""T5s that are pre-trained here; `untrained` is the largest one with random parameters."""
LENGTH = 24
"""Tokens per caption, as in the presets of the base models."""
ENLARGING = {32: imagen_tiny.SR_64_TINY, 64: imagen_tiny.SR_256_TINY}
"""Super-resolution by the base's resolution."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Training settings, the same for all models."""

    resolution: int = 32
    """Side of the images in pixels; 64 uses the presets of base64."""
    steps: int = 3600
    """Updates of each base model."""
    batch: int = 32
    """Images per update."""
    learning_rate: float = 2e-3
    """Peak learning rate of base models and T5s (Muon)."""
    t5_steps: int = 500
    """Updates of each T5."""
    t5_batch: int = 32
    """Captions and other texts per update of T5."""
    vocab: int = 2048
    """Vocabulary size of the tokenizer that all T5s share."""
    examples: int = 20_000
    """Training images of shapes."""
    held_out: int = 1_000
    """Held-out images of shapes."""
    sr_steps: int = 600
    """Updates of super-resolution, for the figure `augmentation`."""
    save_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self):
        if self.resolution not in ENLARGING:
            raise ValueError(f"resolution {self.resolution}: must be one of {', '.join(map(str, ENLARGING))}")
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} {value}: must be positive")


def text_of(
    name: str, out: Path, settings: Training, clip_weights: str, texts: Path | None, data_dir: Path
) -> TextEncoder:
    """The encoder of a name: a size of SIZES (pre-trained if missing), `untrained`, `clip`, or a directory or hub id of
    a T5."""
    if name == "clip":
        return dataclasses.replace(load_clip(clip_weights), padding_is_read=False, max_length=LENGTH)
    if name == "untrained":
        return _untrained(_own(SIZES[-1], out, settings, texts, data_dir))
    if name in SIZES:
        return _own(name, out, settings, texts, data_dir)
    return load_text_encoder(name, LENGTH)


def _own(name: str, out: Path, settings: Training, texts: Path | None, data_dir: Path) -> T5TextEncoder:
    """A T5 pre-trained here; the smallest one trains the shared tokenizer."""
    folder = out / "t5" / name
    if not (folder / "encoder" / "model.safetensors").is_file():
        tokenizer = "trained"
        if name != SIZES[0]:
            _own(SIZES[0], out, settings, texts, data_dir)
            tokenizer = str(out / "t5" / SIZES[0] / "encoder")
        of_t5 = t5.Settings(
            folder,
            name,
            run=RunOptions(settings.t5_steps, settings.t5_batch, ema_decay=0.99, save_every=200),
            dataset=DataOptions(examples=settings.examples, held_out=settings.held_out, data_dir=data_dir),
            optimization=OptimizerOptions("muon", settings.learning_rate),
            t5=t5.T5Options(texts, tokenizer, settings.vocab, length=32),
        )
        training.main("t5", TASKS["t5"], of_t5)
    return load_text_encoder(folder / "encoder", LENGTH)


def _untrained(encoder: T5TextEncoder) -> T5TextEncoder:
    ids = jnp.zeros((1, 2), jnp.int32)
    params = T5Encoder(encoder.config).init(jax.random.key(0), ids, ids > 0)["params"]
    return dataclasses.replace(encoder, params=params)


def stage_of(unet: str, width: int, settings: Training) -> DiffusionModel:
    """The preset of a size for text embeddings of this width."""
    return preset_of(unet, settings).reading(LENGTH, width)


def preset_of(unet: str, settings: Training) -> DiffusionModel:
    """The preset of a size. ValueError listing the presets."""
    presets = TASKS[f"imagen.base{settings.resolution}"].presets
    if unet not in presets:
        raise ValueError(f"U-Net {unet}: choose from {', '.join(presets)}")
    return presets[unet].model


def model_of(
    unet: str, text: TextEncoder, seed: int, folder: Path, settings: Training, source: Source, data_dir: Path
) -> TrainedModel:
    """The base model of a size for this encoder, trained if missing."""
    if not (folder / "model" / "stage.json").is_file():
        stage = stage_of(unet, text.width, settings)
        embeddings = _embedded(text, source, data_dir)
        stream = image_batches(source, DataConfig(settings.resolution, settings.batch, seed=seed), embeddings)
        contents = {"examples": len(source), "batch": settings.batch, "text": embeddings.encoder}
        _train(stage, stream, folder, settings, settings.steps, seed, contents, SamplingConfig(DPMSolverPP2M()))
    return load_model(folder / "model")


def enlarger(models: Path, settings: Training, spec: sources.Shapes, data_dir: Path) -> TrainedModel:
    """Super-resolution for all noise levels on its input, trained without text, if missing."""
    stage = ENLARGING[settings.resolution]
    stage = dataclasses.replace(stage, conditioners=(dataclasses.replace(stage.low_res, max_level=1.0),))
    folder = models / f"sr{stage.side}"
    if not (folder / "model" / "stage.json").is_file():
        source = sources.open(spec, stage.side, "train", data_dir)
        crop = min(stage.side, 64)
        stream = image_batches(source, DataConfig(stage.side, 16, low_resolution=settings.resolution, crop=crop))
        contents = {"examples": len(source), "crop": crop}
        _train(stage, stream, folder, settings, settings.sr_steps, 0, contents, imagen_tiny.SAMPLING_SR_TINY)
    return load_model(folder / "model")


def _train(
    stage: DiffusionModel,
    stream: Batches,
    folder: Path,
    settings: Training,
    steps: int,
    seed: int,
    contents: dict,
    sampling: SamplingConfig,
) -> None:
    rate = OptimizerConfig(kind=Muon(), learning_rate=settings.learning_rate, warmup=min(50, steps - 1), total=steps)
    config = TrainConfig(
        optimizer=rate,
        steps=steps,
        ema_decay=0.995,
        log_every=100,
        save_every=settings.save_every,
        seed=seed,
        description=folder.name,
    )
    with locked(folder):
        state = train(stage, stream, config, folder, data=contents)
        save_model(TrainedModel(stage, jax.tree.map(np.asarray, state.ema), sampling), folder / "model")


def _embedded(text: TextEncoder, source: Source, data_dir: Path) -> Embeddings:
    fingerprint = text.fingerprint
    path = data_dir / "embeddings" / f"curves-{len(source)}-{fingerprint[:24]}"
    with tqdm(total=len(source), desc="embed captions", unit="caption") as bar:
        return store_embeddings(captions(source), text.encode, path, encoder=fingerprint, progress=bar.update)

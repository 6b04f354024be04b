"""The systems that `experiments.recipes.rainbow` trains: for each, its runs in their order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.tasks import autoencoder, clip, dalle, diffusion, latents, t5, unclip
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.data.rainbow import SIDE

TEXT_BATCH = 64


@dataclass(frozen=True)
class TrainingOptions:
    """Training settings."""

    preset: str = "tiny"
    """Size of the generator: `tiny`, or of imagen micro | small | medium."""
    text_steps: int = 600
    """Updates of T5 or CLIP on the training data."""
    decoder_steps: int = 4000
    """Updates of the autoencoder or the prior."""
    steps: int = 4000
    """Updates of the diffusion model or the transformer."""
    batch: int = 32
    """Images per update."""
    learning_rate: float = 2e-3
    """Peak learning rate (Muon)."""


class Run(NamedTuple):
    """A run of `experiments.train`: its task and settings. side: of the images, if not the preset's. sampled: whether
    sampling loads it."""

    task: str
    settings: Any
    side: int | None = None
    sampled: bool = False


class Training(NamedTuple):
    """Where and on what a system is trained."""

    out: Path
    data: DataOptions
    options: TrainingOptions
    seed: int

    def of(self, settings: Any, name: str, steps: int) -> Any:
        """The settings of a task, changed to train it here."""
        return replace(
            settings,
            out=self.out / name,
            run=RunOptions(steps, self.options.batch, ema_decay=0.995, seed=self.seed),
            dataset=self.data,
            optimization=OptimizerOptions("muon", self.options.learning_rate, warmup=min(50, steps - 1)),
        )


def imagen(training: Training) -> list[Run]:
    """T5 and a pixel diffusion model."""
    text = _text(training)
    settings = diffusion.Settings(preset=training.options.preset, text_encoder=_encoder(text))
    return [text, Run("imagen.base32", training.of(settings, "base32", training.options.steps), sampled=True)]


def stable_diffusion(training: Training) -> list[Run]:
    """T5, an autoencoder of stride 4, and a diffusion model of its latents."""
    text = _text(training)
    options = autoencoder.AutoencoderOptions(side=SIDE)
    settings = autoencoder.Settings(preset="tiny-f4", autoencoder=options)
    first = Run("sd.autoencoder", training.of(settings, "autoencoder", training.options.decoder_steps))
    latent = latents.LatentOptions(str(first.settings.out))
    unet = latents.LatentSettings(preset=training.options.preset, text_encoder=_encoder(text), latent=latent)
    return [text, first, Run("sd.unet", training.of(unet, "unet", training.options.steps), sampled=True)]


def dalle_1(training: Training) -> list[Run]:
    """A VQ autoencoder of stride 2, and a transformer of text and its codes."""
    settings = autoencoder.Settings(preset="tiny-vq-f2", autoencoder=autoencoder.AutoencoderOptions(side=SIDE))
    first = Run("sd.autoencoder", training.of(settings, "codes", training.options.decoder_steps))
    codes = dalle.TransformerOptions(codes=str(first.settings.out))
    transformer = dalle.Settings(preset=training.options.preset, transformer=codes)
    last = Run("dalle.transformer", training.of(transformer, "transformer", training.options.steps), sampled=True)
    return [first, last]


def dalle_2(training: Training) -> list[Run]:
    """CLIP, a prior of its image embeddings, and their decoder."""
    options = training.options
    of_clip = clip.Settings(clip=clip.CLIPOptions(resolution=SIDE))
    first = Run("clip", training.of(of_clip, "clip", options.text_steps))
    on_clip = unclip.CLIPOptions(str(first.settings.out / "model"))
    prior = unclip.UnCLIPSettings(preset="tiny", clip=on_clip)
    decoder = unclip.UnCLIPSettings(preset=options.preset, clip=on_clip)
    second = Run("unclip.prior", training.of(prior, "prior", options.decoder_steps), sampled=True)
    return [first, second, Run("unclip.decoder", training.of(decoder, "decoder", options.steps), SIDE, sampled=True)]


SYSTEMS: dict[str, Callable[[Training], list[Run]]] = {
    "imagen": imagen,
    "sd": stable_diffusion,
    "dalle": dalle_1,
    "unclip": dalle_2,
}


def _text(training: Training) -> Run:
    settings = t5.Settings(
        training.out / "t5",
        run=RunOptions(training.options.text_steps, TEXT_BATCH, ema_decay=0.99, save_every=200),
        dataset=training.data,
        optimization=OptimizerOptions(learning_rate=2e-3),
    )
    return Run("t5", settings)


def _encoder(text: Run) -> TextOptions:
    return TextOptions(str(text.settings.out / "encoder"))

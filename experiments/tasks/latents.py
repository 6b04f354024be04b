"""Training a latent diffusion model: a U-Net in the latents of a frozen autoencoder.

    python -m experiments.train sd.autoencoder --data shapes --out runs/autoencoder
    python -m experiments.train sd.unet --data shapes --autoencoder runs/autoencoder --out runs/unet
    python -m experiments.sample "a large red circle" --weights runs/unet

All images are encoded once and stored below --data-dir; with `--latents computed` each batch is encoded in the training
step instead, for data that do not fit on the disk or change from epoch to epoch.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.tasks.diffusion import DiffusionTask, Settings
from experiments.tasks.spaces import Space
from experiments.tasks.streams import stream
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.latents import LatentBatches, stored_latents
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.latent import LatentTraining, encoded, on_autoencoder
from jaxdiff.training import multihost
from jaxdiff.training.distributed import once
from jaxdiff.weights import latent_runs


@dataclass(frozen=True)
class LatentOptions:
    """The autoencoder."""

    autoencoder: str = ""
    """Run of sd.autoencoder; or a folder or hub id of an autoencoder in diffusers' layout."""
    latents: Literal["stored", "computed"] = "stored"
    """Encode all images once and store them, or each batch in the training step."""


@dataclass(frozen=True)
class LatentSettings(Settings):
    """Train a latent diffusion model."""

    latent: LatentOptions = LatentOptions()


@dataclass(frozen=True)
class LatentTask(DiffusionTask):
    """A latent diffusion model."""

    # Small images in a network with many parameters: with 16 examples, one device with both cores takes 0.6 times as
    # long as two (2 cores of an AMD EPYC, jax 0.10.1, 2026-11-27).
    least_on_a_core: ClassVar[int] = 64
    settings: LatentSettings = LatentSettings()

    def space(self, settings: LatentSettings, model: DiffusionModel) -> "Latents":
        if not settings.latent.autoencoder:
            raise ValueError(
                "--autoencoder is missing: name the run of one (python -m experiments.train sd.autoencoder) or a "
                "folder in diffusers' layout"
            )
        if settings.diffusion.buckets or settings.diffusion.crop:
            raise ValueError("--buckets and --crop are for models of images: latents are of whole images")
        trained = latent_runs.load_autoencoder(settings.latent.autoencoder)
        return Latents(on_autoencoder(model, trained), trained, settings.latent)


@dataclass(frozen=True)
class Latents(Space):
    """The latents of an autoencoder."""

    model: DiffusionModel
    autoencoder: TrainedAutoencoder
    options: LatentOptions

    @property
    def side(self) -> int:
        return self.model.side * self.autoencoder.factor

    @property
    def stored(self) -> bool:
        return self.options.latents == "stored"

    @property
    def frozen(self) -> Any:
        return () if self.stored else jax.tree.map(np.asarray, self.autoencoder.params)

    @property
    def data(self) -> dict[str, Any]:
        return {"autoencoder": self.fingerprint, "latents": self.options.latents}

    @cached_property
    def fingerprint(self) -> str:
        return latent_runs.fingerprint_of(self.autoencoder)

    def decode(self, latents: jax.Array) -> jax.Array:
        return jnp.clip(self.autoencoder.decoded(latents), -1.0, 1.0)

    def trainable(self, model: DiffusionModel) -> DiffusionModel | LatentTraining:
        return model if self.stored else LatentTraining(model, self.autoencoder.config, self.autoencoder.scale)

    def record(self, run: Path) -> None:
        latent_runs.save_source(run, latent_runs.AutoencoderSource(self.options.autoencoder, self.fingerprint))

    def batches(self, settings: Settings, source: Source, embeddings: Embeddings | None, **order: bool) -> Any:
        images = stream(settings, source, self.side, embeddings, captions=self.stored, **order)
        if not self.stored:
            return images
        data_dir = settings.dataset.data_dir
        return LatentBatches(images, once(data_dir, lambda: self.encoded_once(source, data_dir / "latents")))

    def encoded_once(self, source: Source, folder: Path) -> np.ndarray:
        """The stored latents of a source (`data.latents`)."""
        trained = self.autoencoder
        encode = jax.jit(partial(encoded, trained.config, trained.scale, trained.params))
        with tqdm(total=len(source), desc="encode images", unit="image", disable=multihost.index() > 0) as bar:
            return stored_latents(source, self.side, encode, folder, self.fingerprint, bar.update)

"""How well an autoencoder reconstructs held-out images: PSNR, SSIM, use of the codebook, Fréchet distance.

    python -m experiments.evaluate reconstruction --autoencoder runs/autoencoder --json runs/reconstruction.json
    python -m experiments.evaluate reconstruction --autoencoder FOLDER --data folder:photos --side 256 --inception FILE

The Fréchet distance between images and their reconstructions is measured with each given network and named after it
(FD-shapes; FID for Inception, "rFID" in the papers). PSNR is of 8-bit images.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.evaluations.psnr import psnr
from experiments.evaluations.scores import report
from experiments.options.metric_networks import MetricNetworks, loaded
from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file
from jaxdiff.data import images, sources
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.evaluation.features import Extractor, all_features
from jaxdiff.evaluation.fid import distance
from jaxdiff.evaluation.ssim import ssim
from jaxdiff.evaluation.statistics import add, empty
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.nets.autoencoder import VQBottleneck, nearest
from jaxdiff.weights.latent_runs import load_autoencoder


@dataclasses.dataclass(frozen=True)
class Settings:
    """Autoencoder and images."""

    autoencoder: str = ""
    """Run of sd.autoencoder, or a folder or hub id of an autoencoder in diffusers' layout."""
    data: str = "shapes"
    """The images: shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH"""
    side: int | None = None
    """Side of the images in pixels; default: that of the autoencoder's training."""
    n: int = 512
    """Number of images, evenly spread over the held-out ones of `shapes`, or over all of other datasets."""
    batch: int = 16
    """Batch size of the autoencoder."""
    json: Path | None = None
    """Write the scores to this file."""
    networks: MetricNetworks = MetricNetworks()
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """PSNR, SSIM and Fréchet distance of an autoencoder's reconstructions."""
    if not settings.autoencoder:
        raise ValueError("--autoencoder is missing: name a run of sd.autoencoder, or a folder in diffusers' layout")
    if settings.n < 1 or settings.batch < 1:
        raise ValueError(f"--n {settings.n}, --batch {settings.batch}: both must be at least 1")
    if settings.json is not None:
        usable_file(settings.json)
    networks = loaded(settings.networks)
    trained = load_autoencoder(settings.autoencoder)
    side = trained.side if settings.side is None else settings.side
    trained.check((side, side))
    spec = sources.parse(settings.data)
    source = sources.open(spec, side, "held_out" if isinstance(spec, sources.Shapes) else "train", settings.data_dir)
    source = spread(source, min(settings.n, len(source)))
    batches = image_batches(source, DataConfig(side, settings.batch, shuffle=False, repeat=False))
    with tqdm(total=len(source), desc="reconstruct", unit="image") as bar:
        true, again, used = zip(*_reconstructed(trained, (batch["image"] for batch in batches), bar.update))
    scores = scores_of(np.concatenate(true), np.concatenate(again))
    if isinstance(trained.config.bottleneck, VQBottleneck):
        scores["codes_used"] = len(set().union(*used)) / trained.config.bottleneck.codes
    for extractor in networks.extractors:
        scores |= _frechet(extractor, np.concatenate(true), np.concatenate(again))
    made_by = {"autoencoder": settings.autoencoder, "data": settings.data, "n": len(source), "side": side}
    report(scores, made_by, settings.json)


def scores_of(true: np.ndarray, again: np.ndarray) -> dict[str, float]:
    """Means over pairs of images, in [-1, 1]."""
    pairs = zip(images.to_uint8(true), images.to_uint8(again))
    return {
        "psnr": float(np.mean([psnr(first, second) for first, second in pairs])),
        "ssim": float(ssim(true, again).mean()),
        "l1": float(np.abs(true - again).mean()),
    }


def _reconstructed(
    trained: TrainedAutoencoder, batches: Iterator[np.ndarray], progress
) -> Iterator[tuple[np.ndarray, np.ndarray, set[int]]]:
    """Images, their reconstructions, and the codes that are used."""
    size = None
    for image in batches:
        size = size or len(image)
        padded = np.pad(image, ((0, size - len(image)), (0, 0), (0, 0), (0, 0)))
        latents = trained.encode(jnp.asarray(padded))
        again = np.clip(np.asarray(trained.decoded(latents)), -1.0, 1.0)[: len(image)]
        codes: set[int] = set()
        if isinstance(trained.config.bottleneck, VQBottleneck):
            indices = nearest(latents[: len(image)] / trained.scale, trained.params["codebook"])
            codes = set(np.unique(np.asarray(indices)).tolist())
        progress(len(image))
        yield image, again, codes


def _frechet(extractor: Extractor, true: np.ndarray, again: np.ndarray) -> dict[str, float]:
    """The Fréchet distance of a network's features; none, with one printed line, for too few images."""
    if len(true) <= extractor.width:
        print(f"no Fréchet distance of {extractor.name}: {len(true)} images for {extractor.width} features")
        return {}
    first, second = (
        add(empty(extractor.width), all_features(extractor, images.to_uint8(each))) for each in (true, again)
    )
    return {f"frechet_{extractor.name}": distance(first, second)}

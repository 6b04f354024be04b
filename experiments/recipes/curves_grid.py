"""The grid of the curves: a cell is a setting, a seed and a guidance weight, sampled and measured once."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.options.metric_networks import Networks
from experiments.options.names import thresholding
from experiments.recipes.curves_models import Training, enlarger, model_of, text_of
from experiments.recipes.curves_plot import Point
from jaxdiff.core import json_files
from jaxdiff.core.files import usable, write_json
from jaxdiff.data import grids, sources
from jaxdiff.data.images import to_uint8
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.evaluation import fid
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.features import Extractor, pooled_text
from jaxdiff.evaluation.image_sets import ImageSet, SourceImages
from jaxdiff.evaluation.metrics import Observed
from jaxdiff.evaluation.observe import observe
from jaxdiff.evaluation.resize import Fit
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline, SampleOptions, with_boxes
from jaxdiff.text.precomputed import embed_captions
from jaxdiff.weights.imagen import trained


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Sampling settings of each cell."""

    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Guidance weights, one point each."""
    interval: tuple[float, float] = (-20.0, -1.0)
    """Log-SNRs with guidance; at higher ones, guidance of small models only damages edges and colours."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds: each setting is trained and sampled once per seed; figures show mean and range."""
    n: int = 512
    """Held-out captions to sample."""
    sampling_steps: int = 12
    """Steps of the sampler (DPM-Solver++ 2M)."""
    sample_batch: int = 64
    """Batch size of sampling."""

    def __post_init__(self):
        for name in ("guidance", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} names none")
        for name, least in (("n", 2), ("sampling_steps", 1), ("sample_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}")
        for weight in self.guidance:
            Guidance(weight, interval=self.interval)


class Setting(NamedTuple):
    """The fixed settings of a curve. aug: the noise level on super-resolution's input; None: the base only."""

    encoder: str
    unet: str
    thresholding: str = "dynamic"
    aug: float | None = None

    def __str__(self) -> str:
        enlarged = "" if self.aug is None else f"-a{self.aug:g}"
        return f"{self.encoder.replace('/', '--')}-{self.unet}-{self.thresholding}{enlarged}"


@dataclasses.dataclass(frozen=True)
class Places:
    """Paths: the folder of the grid, prepared data, T5's further texts, the CLIP whose text tower can be an encoder."""

    out: Path
    data_dir: Path
    texts: Path | None
    clip: str


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Cells as OUT/cells/<setting>-s<seed>-w<weight>.json, with their first images as PNG.

    ValueError if a cell or the models in OUT have other settings, for more captions than are held out, and for too few
    for a Fréchet distance."""

    sampled: Sampled
    training: Training
    places: Places
    networks: Networks

    def __post_init__(self):
        n, width = self.sampled.n, self.networks.classifier.width
        if n > self.training.held_out:
            raise ValueError(f"n {n}: there are {self.training.held_out} held-out captions")
        if n <= width:
            raise ValueError(f"n {n}: the Fréchet distance of {width} features wants more images")
        file = self.places.out / "training.json"
        if file.is_file():
            _same(file, json_files.read_object(file), self._trained_with)
        write_json(file, self._trained_with)

    def fill(self, setting: Setting) -> None:
        """Compute the missing cells of a setting; missing models are trained."""
        for seed in self.sampled.seeds:
            missing = [weight for weight in self.sampled.guidance if self._kept(setting, seed, weight) is None]
            if not missing:
                continue
            model = self._model(setting, seed)
            for weight in tqdm(missing, desc=f"sample {setting} s{seed}", unit="weight"):
                images = self._images(model, seed, weight)
                distance, cosine = self._measured(f"{setting}-s{seed}-w{weight:g}", images)
                cell = {"weight": weight, "seed": seed, "fd": distance, "cosine": cosine}
                grids.write(self._file(setting, seed, weight).with_suffix(".png"), _square(images))
                write_json(self._file(setting, seed, weight), {**cell, "made_by": self._provenance(setting)})
                tqdm.write(f"{setting} s{seed} w{weight:g}: FD {distance:.3f}, cosine {cosine:.4f}")

    def points(self, setting: Setting, weight: float) -> list[Point]:
        """One point per seed."""
        cells = [self._kept(setting, seed, weight) for seed in self.sampled.seeds]
        return [Point(cell["weight"], cell["seed"], cell["cosine"], cell["fd"]) for cell in cells if cell is not None]

    def shown(self, setting: Setting, weight: float) -> Image.Image:
        """The first images of a cell with the first seed, as one image."""
        with Image.open(self._file(setting, self.sampled.seeds[0], weight).with_suffix(".png")) as image:
            return image.convert("RGB")

    @functools.cached_property
    def _trained_with(self) -> dict:
        """The provenance of models: training settings, and a digest of T5's further texts."""
        texts = self.places.texts
        digest = None if texts is None else hashlib.sha256(texts.read_bytes()).hexdigest()[:12]
        return {**dataclasses.asdict(self.training), "texts": digest}

    def _file(self, setting: Setting, seed: int, weight: float) -> Path:
        return usable(self.places.out / "cells") / f"{setting}-s{seed}-w{weight:g}.json"

    def _kept(self, setting: Setting, seed: int, weight: float) -> dict | None:
        file = self._file(setting, seed, weight)
        if not file.is_file():
            return None
        cell = json_files.read_object(file)
        _same(file, cell.get("made_by") or {}, self._provenance(setting))
        return cell

    def _provenance(self, setting: Setting) -> dict:
        """The provenance of a cell besides its seed and weight, in JSON types."""
        sampled = {name: getattr(self.sampled, name) for name in ("n", "sampling_steps")}
        networks = f"{self.networks.classifier}, {self.networks.clip}"
        sampled |= {"interval": list(self.sampled.interval), "networks": networks}
        return {**setting._asdict(), **sampled, **self._trained_with}

    @functools.cached_property
    def _spec(self) -> sources.Shapes:
        return sources.Shapes(self.training.examples, self.training.held_out)

    def _held_out(self, side: int) -> SourceImages:
        return SourceImages("shapes/held_out", sources.open(self._spec, side, "held_out", self.places.data_dir), 0)

    @functools.cached_property
    def _captions(self) -> list[str]:
        true = self._held_out(self.training.resolution)
        return [true.caption(i) for i in range(self.sampled.n)]

    @functools.cached_property
    def _texts(self) -> np.ndarray:
        return pooled_text(self.networks.text, self._captions)

    @functools.cached_property
    def _true(self) -> Callable[[int], Observed]:
        """The classifier's features of the true images, by their side."""
        return functools.cache(lambda side: self._look(self._held_out(side), self.networks.classifier)[0])

    def _model(self, setting: Setting, seed: int) -> Pipeline:
        """The base model with the embedded captions, and super-resolution if the setting has its level."""
        places = self.places
        text = text_of(setting.encoder, places.out, self.training, places.clip, places.texts, places.data_dir)
        folder = places.out / "models" / f"{setting.encoder.replace('/', '--')}-{setting.unet}-s{seed}"
        source = sources.open(self._spec, self.training.resolution, "train", places.data_dir)
        base = model_of(setting.unet, text, seed, folder, self.training, source, places.data_dir)
        threshold = thresholding(setting.thresholding)
        sampling = SamplingConfig(DPMSolverPP2M(), self.sampled.sampling_steps, thresholding=threshold)
        decoders = ()
        if setting.aug is not None:
            larger = enlarger(places.out / "models", self.training, self._spec, places.data_dir)
            level = dataclasses.replace(larger.sampling, aug_level=setting.aug)
            decoders = (dataclasses.replace(larger, sampling=level),)
        captions = embed_captions(text, self._captions)
        return imagen(captions, dataclasses.replace(base, sampling=sampling), *decoders)

    def _images(self, model: Pipeline, seed: int, weight: float) -> np.ndarray:
        """uint8 images of all captions; a caption has the same noise for all weights."""
        # As an array the weight is traced, even if it is 1, so one program serves all weights.
        guidance = Guidance(jnp.asarray(weight, jnp.float32), interval=self.sampled.interval)
        base, *larger = trained(model)
        base = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, guidance=guidance))
        options = SampleOptions(seed=seed, batch=self.sampled.sample_batch)
        batches = with_boxes(model, [base, *larger]).batches(self._captions, options)
        return np.concatenate([to_uint8(batch.products[-1]) for batch in batches])

    def _measured(self, name: str, images: np.ndarray) -> tuple[float, float]:
        """The classifier's Fréchet distance and CLIP's mean cosine."""
        by_class, by_clip = self._look(_InMemory(name, images), self.networks.classifier, self.networks.clip)
        distance = fid.distance(by_class.statistics, self._true(images.shape[1]).statistics)
        return distance, clip_score(self._texts, by_clip.features).cosine

    def _look(self, shown: ImageSet, *extractors: Extractor) -> list[Observed]:
        seen = observe(shown, extractors, self.places.out / "seen")
        return [seen[str(each)] for each in extractors]


def _same(file: Path, have: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if have.get(name) != value:
            raise ValueError(
                f"{file}: made with {name} {have.get(name)}, not {value}; name another --out, or delete it"
            )


def _square(images: np.ndarray) -> Image.Image:
    """The first four images (n h w 3, uint8) in a 2×2 grid; fewer are repeated."""
    four = np.resize(images[:4], (4, *images.shape[1:]))
    return Image.fromarray(np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)]))


@dataclasses.dataclass(frozen=True, eq=False)
class _InMemory:
    """An image set in memory."""

    name: str
    images: np.ndarray
    format: str = "none"
    fit = Fit.SQUEEZE

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def caption(self, index: int) -> None:
        return None

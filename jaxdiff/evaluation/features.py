"""Feature extraction: any frozen network, in batches, on one device or over a mesh."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxdiff.core.settings import canonical
from jaxdiff.core.trees import digest_of
from jaxdiff.evaluation.resize import Resize, resized
from jaxdiff.models.clip import normalised
from jaxdiff.nets.classifier import Classifier, ClassifierConfig
from jaxdiff.nets.clip import CLIP, CLIPConfig, TowerOutput
from jaxdiff.nets.inception import SIDE, TAPS, WIDTH, Inception, InceptionOutputs
from jaxdiff.text.encoder import TextEncoder


@dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network, identified by `name` and the digest of its weights and settings.

    see: (params, images (b s s 3) from 0 to 255) → a dict of arrays (b …) that contains `features`; compiled once. Its
    `repr` identifies its settings.
    """

    name: str
    params: Any
    side: int
    see: Callable[[Any, Float[Array, "b s s 3"]], dict[str, Array]]
    resize: Resize = Resize.CLEAN

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(digest_of(self.params).encode() + canonical(self.see)).hexdigest()[:12]

    @functools.cached_property
    def width(self) -> int:
        """The number of features."""
        image = jax.ShapeDtypeStruct((1, self.side, self.side, 3), jnp.float32)
        return jax.eval_shape(self.see, self.params, image)["features"].shape[1]

    def __str__(self) -> str:
        return f"{self.name} {self.digest}"


INCEPTION = "inception-2015-12-05"


def inception(params: dict, resize: Resize = Resize.CLEAN, dims: int = WIDTH) -> Extractor:
    """FID's network: features and the logits of 1008 classes. With `Resize.PYTORCH` its input is 2 x / 255 - 1, as in
    pytorch-fid; otherwise (x - 128) / 128, as in the original graph, clean-fid and torch-fidelity.

    dims: 2048 for FID; 64, 192 or 768 for features of earlier layers, averaged over positions, which need fewer images
    (a distance with another name). ValueError for other values."""
    if dims not in TAPS:
        raise ValueError(f"dims {dims}: Inception has features of {', '.join(map(str, TAPS))}")
    name = INCEPTION if dims == WIDTH else f"{INCEPTION}-{dims}"
    return Extractor(name, params, SIDE, _SeeInception(dims, resize is Resize.PYTORCH), resize)


def clip_image(config: CLIPConfig, params: dict, name: str = "clip") -> Extractor:
    """CLIP's image tower: its embeddings, not normalised."""
    assert config.image is not None  # it comes with its parameters
    alone = replace(config, text=None)
    return Extractor(name, {"image": params["image"]}, config.image.resolution, _SeeCLIP(alone))


def classifier(name: str, config: ClassifierConfig, params: dict) -> Extractor:
    """A classifier of this project: its features, and the logits of the joint classes of its first two attributes."""
    return Extractor(f"classifier-{name}", params, config.side, _SeeClassifier(config))


def extract(
    extractor: Extractor,
    images: Iterable[np.ndarray],
    batch: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs of the network for the images (uint8, h w 3), one batch at a time, in order.

    All batches are padded to one size, a multiple of the mesh's devices, so the output for an image does not depend on
    the others.
    """
    devices = 1 if mesh is None else mesh.size
    batch = -(-batch // devices) * devices
    params, place = extractor.params, jnp.asarray
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    for part in _batches(images, batch):
        shrunk = np.stack([resized(image, extractor.side, extractor.resize) for image in part])
        filled = np.pad(shrunk, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
        seen = _see(extractor.see, params, place(filled))
        yield {name: np.asarray(value)[: len(part)] for name, value in seen.items()}


def all_features(
    extractor: Extractor, images: Iterable[np.ndarray], batch: int = 64, mesh: Mesh | None = None
) -> Float[np.ndarray, "n d"]:
    """The features of all images."""
    batches = [seen["features"] for seen in extract(extractor, images, batch, mesh)]
    if not batches:
        raise ValueError("no images")
    return np.concatenate(batches)


@functools.partial(jax.jit, static_argnums=0)
def _see(see: Callable, params: Any, images: Array) -> dict[str, Array]:
    with jax.default_matmul_precision("highest"):  # accelerators would round to 8 or 11 bits
        return see(params, images)


@dataclass(frozen=True)
class _SeeInception:
    dims: int
    symmetric: bool

    def __call__(self, params: dict, images: Array) -> dict[str, Array]:
        scaled = images / 127.5 - 1 if self.symmetric else (images - 128) / 128
        seen = cast(InceptionOutputs, Inception().apply({"params": params}, scaled))
        return {"features": seen.features if self.dims == WIDTH else seen.early[self.dims], "logits": seen.logits}


@dataclass(frozen=True)
class _SeeCLIP:
    config: CLIPConfig

    def __call__(self, params: dict, images: Array) -> dict[str, Array]:
        scaled = normalised(images / 127.5 - 1)
        seen = cast(TowerOutput, CLIP(self.config).apply({"params": params}, scaled, method="embed_image"))
        assert seen.embedding is not None  # without a projection there is nothing to compare
        return {"features": seen.embedding}


@dataclass(frozen=True)
class _SeeClassifier:
    config: ClassifierConfig

    def __call__(self, params: dict, images: Array) -> dict[str, Array]:
        features, logits = Classifier(self.config).apply({"params": params}, images / 127.5 - 1)
        first, second, *_ = (jax.nn.log_softmax(logits[name]) for name in self.config.names)
        return {"features": features, "logits": (first[:, :, None] + second[:, None]).reshape(len(features), -1)}


def _batches(images: Iterable[np.ndarray], count: int) -> Iterator[Sequence[np.ndarray]]:
    part: list[np.ndarray] = []
    for image in images:
        part.append(image)
        if len(part) == count:
            yield part
            part = []
    if part:
        yield part


def pooled_text(encoder: TextEncoder, captions: Sequence[str]) -> np.ndarray:
    """The pooled embeddings of captions (b e), at the same full precision as `extract`."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(encoder.encode(captions).pooled)

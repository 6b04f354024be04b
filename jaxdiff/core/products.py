"""Types of the products that pass between the boxes of a system: intermediate products and images.

A product is an array with a leading batch axis. Its specification leaves height and width free.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageSpec:
    """Images (b h w channels), float32 in [-1, 1]. Heights and widths are multiples of `stride`."""

    channels: int = 3
    stride: int = 1

    def __str__(self) -> str:
        return f"images of {self.channels} channels"


@dataclass(frozen=True)
class LatentSpec:
    """An autoencoder's latents (b h w channels), float32, scaled to about unit variance. A latent represents
    `stride`×`stride` pixels."""

    channels: int = 4
    stride: int = 8

    def __str__(self) -> str:
        return f"latents of {self.channels} channels"


@dataclass(frozen=True)
class TokenSpec:
    """A grid of codes (b h w), int32 in [0, classes). A code represents `stride`×`stride` pixels."""

    classes: int = 8192
    stride: int = 8

    def __str__(self) -> str:
        return f"codes of {self.classes} classes"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Embeddings (b 1 1 width), float32: grids of one position, so that models of grids are models of embeddings.

    norm: the Euclidean length of every embedding, for models of normalized ones: √width gives their values a mean
    square of 1. None: as the encoder gives them.
    """

    width: int = 768
    norm: float | None = None

    def __post_init__(self):
        if self.norm is not None and not self.norm > 0:
            raise ValueError(f"embeddings of length {self.norm}: the length must be above 0")

    @property
    def channels(self) -> int:
        return self.width

    @property
    def stride(self) -> int:
        return 1

    def normalized(self, embedding: Any) -> Any:
        """An array (… width) scaled to these lengths; unchanged without `norm`. Zeros stay zeros: they are the null
        condition of models."""
        if self.norm is None:
            return embedding
        length = (embedding**2).sum(-1, keepdims=True) ** 0.5
        return embedding * (self.norm / (length + (length == 0)))

    def __str__(self) -> str:
        return f"embeddings of width {self.width}" + ("" if self.norm is None else f" and length {self.norm:.4g}")


ProductSpec = ImageSpec | LatentSpec | TokenSpec | EmbeddingSpec


def same_kind(produced: ProductSpec, consumed: ProductSpec) -> bool:
    """Whether a box can consume another's product. Strides are ignored; they are checked with the sides."""
    strideless = [{**vars(spec), "stride": 0} for spec in (produced, consumed)]
    return type(produced) is type(consumed) and strideless[0] == strideless[1]


def check_product(spec: ProductSpec, array: Any, what: str = "the product") -> None:
    """ValueError unless the axes and channels of a batch match `spec`; values are not checked."""
    axes, last = (3, None) if isinstance(spec, TokenSpec) else (4, spec.channels)
    fits = array.ndim == axes and last in (None, array.shape[-1])
    if not fits or (isinstance(spec, EmbeddingSpec) and array.shape[1:3] != (1, 1)):
        raise ValueError(f"{what} has the shape {'×'.join(map(str, array.shape))}, which is not a batch of {spec}")

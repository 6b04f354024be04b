"""A prior of standardized embeddings, with the statistics that make them CLIP's, as a box of a pipeline."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.core.products import EmbeddingSpec, ImageSpec, LatentSpec
from jaxdiff.models.boxes import Generator
from jaxdiff.models.sampling import SampleRequest, TrainedModel


@dataclass(frozen=True, eq=False)
class StandardizedPrior(Generator):
    """A prior (arXiv 2204.06125, 2.2) that was trained on embeddings with mean 0 and deviation 1 in each number, as
    Karlo's and Kandinsky's. mean, deviation: those of CLIP's embeddings."""

    prior: TrainedModel
    mean: Float[Array, " e"]
    deviation: Float[Array, " e"]

    def __post_init__(self):
        width = self.prior.model.product.channels
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if values.shape != (width,):
                raise ValueError(f"the {name} of {values.shape[-1]} numbers is not one of embeddings of width {width}")

    def generate(self, request: SampleRequest) -> Float[Array, "b 1 1 e"]:
        """Embeddings as CLIP gives them, not normalized. ValueError as from `TrainedModel.decode`."""
        return self.restored(self.prior.generate(request))

    def restored(self, embeddings: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """CLIP's embeddings of standardized ones."""
        return self.mean.astype(jnp.float32) + self.deviation.astype(jnp.float32) * embeddings

    def standardized(self, embeddings: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """The inverse of `restored`: what the prior is trained on."""
        return (embeddings - self.mean.astype(jnp.float32)) / self.deviation.astype(jnp.float32)

    @property
    def produces(self) -> ImageSpec | LatentSpec | EmbeddingSpec:
        return self.prior.produces

    @property
    def side(self) -> int:
        return self.prior.side

    @property
    def steps(self) -> int:
        return self.prior.steps

    @property
    def reads(self) -> tuple[int | None, int | None] | None:
        return self.prior.reads

    @property
    def reads_padding(self) -> bool:
        return self.prior.reads_padding

    @property
    def reads_empty(self) -> bool:
        return self.prior.reads_empty

    def batch_size(self, wanted: int) -> int:
        return self.prior.batch_size(wanted)

    def check(self, size: tuple[int, int]) -> None:
        self.prior.check(size)

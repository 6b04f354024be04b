"""A VQ autoencoder as a decoder of codes: DALL·E 1's alternative to a dVAE."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.core.products import ImageSpec, TokenSpec, check_product
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.boxes import Decoder
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.nets.autoencoder import VQBottleneck, quantize


@dataclass(frozen=True, eq=False)
class VQCodes(Decoder):
    """An autoencoder with a codebook; its codes are the numbers of the entries. ValueError for a KL autoencoder.

    unit: the network reads and gives images in [0, 1], as for dalle-mini, whose codes are those of such images; outside
    of this box images are in [-1, 1] in any case.
    """

    autoencoder: TrainedAutoencoder
    unit: bool = False

    def __post_init__(self):
        if not isinstance(self.autoencoder.config.bottleneck, VQBottleneck):
            raise ValueError("a KL autoencoder has no codes: a transformer of codes needs a dVAE or a VQ autoencoder")

    @property
    def params(self) -> dict:
        """The autoencoder's."""
        return self.autoencoder.params

    @property
    def produces(self) -> ImageSpec:
        return self.autoencoder.produces

    @property
    def consumes(self) -> TokenSpec:
        bottleneck = self.autoencoder.config.bottleneck
        assert isinstance(bottleneck, VQBottleneck)  # see __post_init__
        return TokenSpec(bottleneck.codes, self.autoencoder.factor)

    @property
    def side(self) -> int:
        return self.autoencoder.side

    @property
    def factor(self) -> int:
        return self.autoencoder.factor

    def check(self, size: tuple[int, int]) -> None:
        self.autoencoder.check(size)

    def decode(self, product: Int[Array, "b h w"], request: SampleRequest) -> Float[Array, "b h2 w2 c"]:
        """Codes → images in [-1, 1]."""
        check_product(self.consumes, product, "the codes")
        image = self.autoencoder.decode(self._latents(product), request)
        return jnp.clip(2.0 * image - 1.0, -1.0, 1.0) if self.unit else image

    def decoded(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 c"]:
        """`decode` without a request, not clipped."""
        image = self.autoencoder.decoded(self._latents(codes))
        return 2.0 * image - 1.0 if self.unit else image

    def encode(self, image: Float[Array, "b h w c"]) -> Int[Array, "b h2 w2"]:
        """Images in [-1, 1] → the nearest codes."""
        latents = self.autoencoder.encode((image + 1.0) / 2.0 if self.unit else image) / self.autoencoder.scale
        return quantize(latents, self.autoencoder.params["codebook"])[1].astype(jnp.int32)

    def _latents(self, codes: Array) -> Array:
        return self.autoencoder.scale * self.autoencoder.params["codebook"][codes]

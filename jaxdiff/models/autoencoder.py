"""A trained autoencoder as a box of a pipeline: decodes latents to images, and encodes images to latents.

Training is in `models/autoencoder_training.py`, tiles are in `models/autoencoder_tiles.py`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.core.products import ImageSpec, LatentSpec, check_product
from jaxdiff.diffusion import noise
from jaxdiff.models import autoencoder_tiles
from jaxdiff.models.autoencoder_tiles import SeamlessTiles
from jaxdiff.models.boxes import Decoder, check_stride
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck, gaussian, quantize


@dataclass(frozen=True, eq=False)
class TrainedAutoencoder(Decoder):
    """An autoencoder with parameters: the decoder of latent diffusion, which can also encode.

    scale: latents are codes times this, so that they have about unit variance. upcast: compute in float32, whatever
    the compute type of `config`. side: of its default square images. tiles: how images larger than a tile are
    processed; None processes every image at once. quantized: VQ decodes the nearest codes; off, the latents as they are
    (Kandinsky).
    """

    config: AutoencoderConfig
    params: dict
    scale: float = 0.18215
    upcast: bool = False
    side: int = 512
    tiles: Tiles | SeamlessTiles | None = None
    quantized: bool = True

    def __post_init__(self):
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, not {self.scale}")
        if self.tiles is not None:
            autoencoder_tiles.check_tiles(self.config, self.tiles)

    @property
    def produces(self) -> ImageSpec:
        return ImageSpec(self.config.image_channels, self.config.stride)

    @property
    def consumes(self) -> LatentSpec:
        return LatentSpec(self.config.code_channels, self.config.stride)

    @property
    def factor(self) -> int:
        return self.config.stride

    def check(self, size: tuple[int, int]) -> None:
        """ValueError unless height and width are multiples of the stride."""
        check_stride(size, self.config.stride, "the autoencoder")

    def decode(self, product: Float[Array, "b h w c"], request: SampleRequest) -> Float[Array, "b h2 w2 c2"]:
        """Latents → images, clipped to [-1, 1]. VQ: with the nearest codes, if `quantized`. ValueError for another size
        than the request's, or as from `check`."""
        self.check(request.size)
        check_product(self.consumes, product, "the latents")
        size = product.shape[1] * self.factor, product.shape[2] * self.factor
        if size != tuple(request.size):
            have, want = ("×".join(map(str, sides)) for sides in (size, request.size))
            raise ValueError(f"these latents are those of {have} pixels, not of {want}")
        image = jnp.clip(self.decoded(product), -1.0, 1.0)
        if request.progress is not None:
            jax.block_until_ready(image)
            request.progress(1)
        return image

    def decoded(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """`decode` without a request, not clipped."""
        code = latents.astype(jnp.float32) / self.scale
        if self.quantized and isinstance(self.config.bottleneck, VQBottleneck):
            code = _quantized(code, self.params["codebook"])
        return self._finite("decode", autoencoder_tiles.decode, code)

    def encode(
        self, image: Float[Array, "b h w c"], keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Images in [-1, 1] → latents: the mean of each code, or with `keys` (one per image) a sample.

        VQ has no distribution: the codes before quantization, in both cases. ValueError as from `check`.
        """
        self.check((image.shape[1], image.shape[2]))
        check_product(self.produces, image, "the image")
        output = self._finite("encode", autoencoder_tiles.encode, image.astype(jnp.float32))
        if isinstance(self.config.bottleneck, VQBottleneck):
            return self.scale * output
        mean, logvar = gaussian(output)
        if keys is None:
            return self.scale * mean
        return self.scale * (mean + jnp.exp(0.5 * logvar) * noise.normal_like(keys, mean.shape[1:]))

    def _finite(self, what: str, run: Callable[..., Array], x: Array) -> Array:
        """The network's output; in float32 if that in half precision has values that are not finite."""
        float32 = replace(self.config, dtype="float32")
        config = float32 if self.upcast else self.config
        output = run(config, self.params, x, self.tiles)
        if config == float32 or jnp.isfinite(output).all() or not jnp.isfinite(x).all():
            return output
        warnings.warn(
            f"the autoencoder's {what} in {config.dtype} gave values that are not finite: it is repeated in float32; "
            "set upcast to compute in float32 at once",
            stacklevel=4,
        )
        return run(float32, self.params, x, self.tiles)


_quantized = jax.jit(lambda code, codebook: quantize(code, codebook)[0])

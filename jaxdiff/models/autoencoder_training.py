"""Training of an autoencoder of images (arXiv 2112.10752, G): reconstruction, a weak bottleneck, and a discriminator.

The reconstruction loss is the absolute error. The bottleneck's loss is the KL divergence to a standard normal, with a
tiny weight, or that of the codebook. After a number of steps, a patch discriminator is trained in the same step with an
optimizer of its own, and the autoencoder is also trained to pass for real images (VQGAN, arXiv 2012.09841, 3.2).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion import noise
from jaxdiff.models import codebook
from jaxdiff.models.adversary import Adversary, LastLayer
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.codebook import Averages, EMACodebook, GradientCodebook
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets import discriminator
from jaxdiff.nets.autoencoder import AutoencoderConfig, KLBottleneck, gaussian, quantize


@dataclass(frozen=True)
class AutoencoderModel:
    """Settings of an autoencoder in training. The defaults are those of latent diffusion's KL-f8.

    side: of the training images. kl_weight: of the KL divergence, summed over an image's codes and divided by its
    number of values; with the paper's sums over pixels it is the same weight. codebook: how that of VQ is trained.
    adversary: None trains without a discriminator.

    Parameters: `autoencoder`, with an optimizer of this label, and `discriminator`. An `EMACodebook` is in `extra`.
    """

    network: AutoencoderConfig = AutoencoderConfig()
    side: int = 256
    kl_weight: float = 1e-6
    codebook: GradientCodebook | EMACodebook = GradientCodebook()
    adversary: Adversary | None = Adversary()

    def __post_init__(self):
        if self.side < 1 or self.side % self.network.stride:
            raise ValueError(f"a side of {self.side} pixels is not a multiple of the stride {self.network.stride}")
        if self.adversary is not None and self.side < self.adversary.discriminator.least_side:
            least = self.adversary.discriminator.least_side
            raise ValueError(f"images of {self.side} pixels have no patch for the discriminator: {least} are needed")

    @property
    def averaged(self) -> EMACodebook | None:
        """The rule of a codebook that is not a parameter."""
        vq = not isinstance(self.network.bottleneck, KLBottleneck)
        return self.codebook if vq and isinstance(self.codebook, EMACodebook) else None

    def init(self, key: Key[Array, ""]) -> tuple[dict, Any]:
        """Initial float32 parameters, and the codebook with its averages as `extra`, or ()."""
        first, second = jax.random.split(key)
        params = {"autoencoder": nets.init(self.network, first)}
        extra: Any = ()
        if self.averaged is not None:
            extra = codebook.initial(params["autoencoder"].pop("codebook"))._asdict()
        if self.adversary is not None:
            channels = self.network.image_channels
            params["discriminator"] = discriminator.init(self.adversary.discriminator, second, channels)
        return params, extra

    def loss(
        self, params: dict, extra: Any, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], Any]]:
        """The sum of all losses, averaged over the batch. batch: image (b h w c), in [-1, 1].

        Metrics: `reconstruction` (the absolute error), `psnr` in dB, `kl` per code or `commitment` (the squared
        distance to the codebook) and `codes_used` (the fraction of the codebook in this batch), and those of
        `Adversary.losses`.
        """
        image = batch["image"].astype(jnp.float32)
        sample_key, restart_key = jax.random.split(key)
        keys = noise.sample_keys(sample_key, jnp.arange(len(image)))
        result = self._reconstructed(params["autoencoder"], extra, image, keys)
        scores = _scores(image, result)
        loss = (scores["reconstruction"] + result.penalty).mean()
        metrics = {name: value.mean() for name, value in scores.items()}
        if result.indices is not None:
            metrics["codes_used"] = (codebook.usage_of(result.indices, len(result.codebook)) > 0).mean()
            if self.averaged is not None:
                averages = Averages(**extra)
                averages = codebook.updated(self.averaged, averages, result.code, result.indices, restart_key)
                extra = averages._asdict()
        if self.adversary is not None:
            losses = self.adversary.losses(params["discriminator"], image, result.image, result.last, step)
            loss += losses["adversarial_weight"] * losses["adversarial"] + losses["discriminator"]
            metrics |= losses
        return loss, (metrics, extra)

    def held_out_losses(
        self, params: dict, extra: Any, frozen: tuple, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """The absolute error (`held_out_loss`) and the other scores of single held-out images, of the mean codes.

        numbers (b): of the images, or −1 for padding rows. Returns sums over images and their counts.
        """
        image = batch["image"].astype(jnp.float32)
        scores = _scores(image, self._reconstructed(params["autoencoder"], extra, image, None))
        counted = numbers >= 0
        named = {"held_out_loss": scores.pop("reconstruction")} | {f"held_out_{name}": scores[name] for name in scores}
        count = counted.astype(jnp.float32).sum()
        return {name: (jnp.where(counted, value, 0.0).sum(), count) for name, value in named.items()}

    def labels(self, params: dict) -> dict:
        return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}

    def cast(self, params: dict) -> dict:
        """Cast the kernels to the networks' compute types, as their layers would."""
        dtypes = {"autoencoder": self.network.dtype}
        if self.adversary is not None:
            dtypes["discriminator"] = self.adversary.discriminator.dtype

        def cast(path: Any, leaf: Array) -> Array:
            name = path[-1].key
            return leaf.astype(dtypes[path[0].key]) if name == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, side, side, self.network.image_channels)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def trained(self, params: dict, extra: Any) -> TrainedAutoencoder:
        """The autoencoder without its discriminator, with scale 1 (see `latent_scale`)."""
        params = params["autoencoder"] | ({} if self.averaged is None else {"codebook": extra["codebook"]})
        return TrainedAutoencoder(replace(self.network, remat=False), params, 1.0, side=self.side)

    def _reconstructed(
        self, params: dict, extra: Any, image: Float[Array, "b h w c"], keys: Key[Array, " b"] | None
    ) -> "_Result":
        """The image of sampled codes, or without keys of mean codes."""
        module, variables = self.network.module(), {"params": params}
        code = cast(Array, module.apply(variables, image, method="encode"))
        if isinstance(self.network.bottleneck, KLBottleneck):
            bottleneck = self._sampled(code, math.prod(image.shape[1:]), keys)
        else:
            bottleneck = self._quantized(code, params["codebook"] if self.averaged is None else extra["codebook"])
        decoded, state = module.apply(variables, bottleneck.code, method="decode", mutable=["intermediates"])
        head = params["decoder"]["head"]
        last = LastLayer(state["intermediates"]["decoder"]["head_input"][0], head["kernel"], head["bias"])
        return _Result(decoded, code, *bottleneck[1:], jax.lax.stop_gradient(last))

    def _sampled(self, moments: Array, values: int, keys: Array | None) -> "_Bottleneck":
        """KL. values: of an image."""
        mean, logvar = gaussian(moments)
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3))
        code = mean if keys is None else mean + jnp.exp(0.5 * logvar) * noise.normal_like(keys, mean.shape[1:])
        return _Bottleneck(code, self.kl_weight * kl / values, {"kl": kl / math.prod(mean.shape[1:3])})

    def _quantized(self, code: Array, entries: Array) -> "_Bottleneck":
        """VQ. The gradient of the image passes straight through to the encoder."""
        nearest, indices = quantize(code, entries)
        distance = ((jax.lax.stop_gradient(nearest) - code) ** 2).mean((1, 2, 3))
        penalty = self.codebook.commitment * distance
        if self.averaged is None:
            penalty += ((nearest - jax.lax.stop_gradient(code)) ** 2).mean((1, 2, 3))
        straight = code + jax.lax.stop_gradient(nearest - code)
        return _Bottleneck(straight, penalty, {"commitment": distance}, indices, entries)


class _Bottleneck(NamedTuple):
    """Codes for the decoder, and the loss and metrics of each image; for VQ the indices, and the codebook."""

    code: Array
    penalty: Array
    metrics: dict[str, Array]
    indices: Array | None = None
    codebook: Any = ()


class _Result(NamedTuple):
    """A reconstruction. code: the encoder's output. The others as in `_Bottleneck`."""

    image: Array
    code: Array
    penalty: Array
    metrics: dict[str, Array]
    indices: Array | None
    codebook: Any
    last: LastLayer


def latent_scale(
    autoencoder: TrainedAutoencoder, batches: Iterable[Float[Array, "b h w c"]], key: Key[Array, ""]
) -> float:
    """1 / the standard deviation of the codes of these images, sampled (arXiv 2112.10752, G): the `scale` with which
    latents have unit variance. ValueError without images, or if all codes are equal."""
    count, total, squares = 0, 0.0, 0.0
    unscaled, images = replace(autoencoder, scale=1.0), 0
    for batch in batches:
        keys = noise.sample_keys(key, jnp.arange(images, images + len(batch)))
        codes = np.asarray(unscaled.encode(jnp.asarray(batch), keys), np.float64)
        count, total, squares = count + codes.size, total + codes.sum(), squares + (codes**2).sum()
        images += len(batch)
    if not count:
        raise ValueError("the scale of latents needs at least one image")
    variance = squares / count - (total / count) ** 2
    if not variance > 0:
        raise ValueError(f"the variance of the codes is {variance}: the autoencoder is not trained")
    return float(variance**-0.5)


def _scores(image: Array, result: _Result) -> dict[str, Array]:
    """The scores of each image."""
    error = jnp.abs(image - result.image).mean((1, 2, 3))
    return {"reconstruction": error, "psnr": psnr(image, result.image)} | result.metrics


def psnr(image: Float[Array, "b h w c"], other: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """In dB, of the other image clipped to [-1, 1]. The peak is the range of the images, 2."""
    squares = ((image - jnp.clip(other, -1.0, 1.0)) ** 2).mean((1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(squares, 1e-10))

"""Training of a discrete VAE (DALL·E 1, arXiv 2102.12092, 2.1 and A.2), and the trained one as a box of a pipeline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.core.products import ImageSpec, TokenSpec, check_product
from jaxdiff.diffusion import noise
from jaxdiff.models.autoencoder_training import psnr
from jaxdiff.models.boxes import Decoder, check_stride
from jaxdiff.models.codebook import usage_of
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets import dvae
from jaxdiff.nets.dvae import DVAEConfig


@dataclass(frozen=True)
class Annealed:
    """A value that moves from `start` to `end` within `steps` steps along half a cosine, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"annealing needs at least one step, not {self.steps}")

    def at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        done = jnp.clip(step / self.steps, 0.0, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + jnp.cos(math.pi * done))


@dataclass(frozen=True)
class DVAEModel(SingleOptimizer):
    """Settings of a dVAE in training; the defaults are the paper's (A.2).

    side: of the training images. temperature: of the relaxed codes (Gumbel-softmax). kl_weight: β, of the KL divergence
    from the uniform distribution over the codebook; both terms of the bound are divided by the number of an image's
    values. least_scale: the smallest scale b of the likelihood. Without one, exactly repeated values, such as those of
    a plain background, have an unbounded likelihood, and all others hardly count.
    """

    network: DVAEConfig = DVAEConfig()
    side: int = 256
    temperature: Annealed = Annealed(1.0, 1.0 / 16.0, 150_000)
    kl_weight: Annealed = Annealed(0.0, 6.6, 5_000)
    least_scale: float = 0.0

    def __post_init__(self):
        if self.side < 1 or self.side % self.network.stride:
            raise ValueError(f"a side of {self.side} pixels is not a multiple of the stride {self.network.stride}")
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise ValueError(f"a temperature must be above 0, not {self.temperature}")
        if self.least_scale < 0:
            raise ValueError(f"least_scale {self.least_scale}: must be at least 0")

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        side = self.network.stride
        image = jnp.zeros((1, side, side, self.network.image_channels))
        return self.network.module().init(key, image)["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """The negative evidence lower bound of relaxed codes, per value, averaged over the batch. batch: image
        (b h w c), in [-1, 1].

        Metrics: `reconstruction` (the negative log-likelihood per value), `kl` (nats per code), `psnr` in dB of the
        relaxed reconstructions, `codes_used` (the fraction of the codebook among the likeliest codes of this batch),
        `temperature`.
        """
        image, module = batch["image"].astype(jnp.float32), self.network.module()
        keys = noise.sample_keys(key, jnp.arange(len(image)))
        logits = cast(Array, module.apply({"params": params}, dvae.to_unit(image), method="encode"))
        temperature = self.temperature.at(step)
        codes = gumbel_softmax(logits, keys, temperature)
        stats = cast(Array, module.apply({"params": params}, codes, method="decode"))
        likelihood = -dvae.logit_laplace(stats, image, self.least_scale).mean((1, 2, 3))
        divergence = kl_from_uniform(logits)
        loss = likelihood + self.kl_weight.at(step) * divergence.sum((1, 2)) / math.prod(image.shape[1:])
        used = (usage_of(logits.argmax(-1), self.network.codes) > 0).mean()
        metrics = {
            "reconstruction": likelihood.mean(),
            "kl": divergence.mean(),
            "psnr": psnr(image, dvae.reconstruction(stats)).mean(),
            "codes_used": used,
            "temperature": temperature,
        }
        return loss.mean(), (metrics, extra)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """`held_out_loss`, the mean absolute error of held-out images reconstructed from their likeliest codes, and
        `held_out_psnr`. numbers (b): of the images, or −1 for padding rows. Returns sums and counts."""
        image, module = batch["image"].astype(jnp.float32), self.network.module()
        logits = cast(Array, module.apply({"params": params}, dvae.to_unit(image), method="encode"))
        stats = cast(Array, module.apply({"params": params}, logits.argmax(-1), method="decode_indices"))
        again, counted = dvae.reconstruction(stats), numbers >= 0
        scores = {"held_out_loss": jnp.abs(image - again).mean((1, 2, 3)), "held_out_psnr": psnr(image, again)}
        count = counted.astype(jnp.float32).sum()
        return {name: (jnp.where(counted, value, 0.0).sum(), count) for name, value in scores.items()}

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, side, side, self.network.image_channels)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def trained(self, params: dict, extra: Any = ()) -> "TrainedDVAE":
        return TrainedDVAE(replace(self.network, remat=False), params, self.side)


def gumbel_softmax(
    logits: Float[Array, "b h w k"], keys: Key[Array, " b"], temperature: Float[Array, ""] | float
) -> Float[Array, "b h w k"]:
    """Relaxed one-hot samples of categorical distributions (arXiv 1611.01144, 1611.00712), one key per image."""
    return jax.nn.softmax((logits + noise.gumbel(keys, logits.shape[1:])) / temperature)


def kl_from_uniform(logits: Float[Array, "*s k"]) -> Float[Array, "*s"]:
    """The KL divergence of categorical distributions from the uniform one, in nats."""
    log_probs = jax.nn.log_softmax(logits)
    return math.log(logits.shape[-1]) + (jnp.exp(log_probs) * log_probs).sum(-1)


@dataclass(frozen=True, eq=False)
class TrainedDVAE(Decoder):
    """A dVAE with parameters: decodes a grid of codes to an image, and encodes images to their likeliest codes. side:
    of its default square images."""

    config: DVAEConfig
    params: dict
    side: int = 256

    @property
    def produces(self) -> ImageSpec:
        return ImageSpec(self.config.image_channels, self.config.stride)

    @property
    def consumes(self) -> TokenSpec:
        return TokenSpec(self.config.codes, self.config.stride)

    @property
    def factor(self) -> int:
        return self.config.stride

    def check(self, size: tuple[int, int]) -> None:
        """ValueError unless height and width are multiples of the stride."""
        check_stride(size, self.config.stride, "the dVAE")

    def decode(self, product: Int[Array, "b h w"], request: SampleRequest) -> Float[Array, "b h2 w2 c"]:
        """Codes → images in [-1, 1]."""
        check_product(self.consumes, product, "the codes")
        image = self.decoded(product)
        if request.progress is not None:
            jax.block_until_ready(image)
            request.progress(1)
        return image

    def decoded(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 c"]:
        """`decode` without a request."""
        return _decoded(self.config, self.params, codes)

    def encode(self, image: Float[Array, "b h w c"]) -> Int[Array, "b h2 w2"]:
        """Images in [-1, 1] → the likeliest codes. ValueError as from `check`."""
        self.check((image.shape[1], image.shape[2]))
        check_product(self.produces, image, "the image")
        return _encoded(self.config, self.params, image)


@partial(jax.jit, static_argnums=0)
def _decoded(config: DVAEConfig, params: dict, codes: Array) -> Array:
    return dvae.reconstruction(cast(Array, config.module().apply({"params": params}, codes, method="decode_indices")))


@partial(jax.jit, static_argnums=0)
def _encoded(config: DVAEConfig, params: dict, image: Array) -> Array:
    logits = config.module().apply({"params": params}, dvae.to_unit(image.astype(jnp.float32)), method="encode")
    return cast(Array, logits).argmax(-1).astype(jnp.int32)

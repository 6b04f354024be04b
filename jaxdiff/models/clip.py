"""CLIP training from scratch (arXiv 2103.00020).

The loss compares every caption of the global batch with every image. Each device keeps its own rows and gathers the
embeddings of all others, which are small. Logits are computed and reduced in chunks of columns, and recomputed in the
backward pass, so that no device holds the full batch × batch matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.clip import CLIP, CLIPConfig, TowerOutput, l2_normalize

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the channels in [0, 1], as in all published models."""

NEAR = 1e-4
"""Cosines that differ by less count as equal: a matrix product and a sum round differently."""


@dataclass(frozen=True)
class ContrastiveLoss:
    """CLIP's loss (Figure 3): the cross-entropy of matching captions to images in the batch, in both directions.
    scale: the initial inverse temperature."""

    scale: float = 1 / 0.07

    def __call__(self, text: Array, image: Array, scale: Array, bias: Array | None, columns: "_Columns") -> "_Compared":
        ours = scale * (text * image).sum(-1)
        of_text, most = columns.logsumexp(scale * text, image)
        of_image, _ = columns.logsumexp(scale * image, text)
        return _Compared((of_text + of_image - 2 * ours).mean() / 2, ours > most + NEAR * scale)


@dataclass(frozen=True)
class SigmoidLoss:
    """SigLIP's loss (arXiv 2303.15343, 3.2): binary classification of every pair, summed over pairs and divided by the
    batch size. scale, bias: initial values for the logits; nearly all pairs are negative."""

    scale: float = 10.0
    bias: float = -10.0

    def __call__(self, text: Array, image: Array, scale: Array, bias: Array | None, columns: "_Columns") -> "_Compared":
        assert bias is not None  # `CLIPTraining.init` creates it
        ours = scale * (text * image).sum(-1) + bias
        apart, most = columns.softplus(scale * text, image, bias)
        return _Compared((apart - ours).mean(), ours > most + bias + NEAR * scale)


@dataclass(frozen=True)
class CLIPTraining(SingleOptimizer):
    """Training of both towers, the temperature and, for the sigmoid loss, its bias.

    chunk: columns of logits computed at a time. max_scale: maximum of the inverse temperature (2.5).
    axes: the mesh axes over which the batch is sharded.
    """

    config: CLIPConfig = CLIPConfig()
    compare: ContrastiveLoss | SigmoidLoss = ContrastiveLoss()
    chunk: int = 1024
    max_scale: float = 100.0
    axes: tuple[str, ...] = ()

    def __post_init__(self):
        if None in (self.config.text, self.config.image):
            raise ValueError("training a CLIP needs two towers")
        if self.chunk < 1 or self.max_scale <= 0:
            raise ValueError(f"chunk {self.chunk}, max_scale {self.max_scale}: both must be positive")

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        """Parameters of `nets.clip.CLIP` and, with the sigmoid loss, `logit_bias`; no extra."""
        assert self.config.image is not None  # see __post_init__
        side = self.config.image.resolution
        params = CLIP(self.config).init(key, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, side, side, 3)))["params"]
        params["logit_scale"] = jnp.full((), np.log(self.compare.scale), jnp.float32)
        if isinstance(self.compare, SigmoidLoss):
            params["logit_bias"] = jnp.full((), self.compare.bias, jnp.float32)
        return params, ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """The loss over the batch: captions ids (b n) and their images image (b h w 3) in [-1, 1].

        Metrics: `accuracy`, the fraction of captions whose image is nearer than all others in the batch; `scale`. `key`
        is unused.
        """
        network, variables = CLIP(self.config), {"params": clip_params(params)}
        text = cast(TowerOutput, network.apply(variables, batch["ids"], method="embed_text")).embedding
        seen = normalised(batch["image"].astype(jnp.float32))
        image = cast(TowerOutput, network.apply(variables, seen, method="embed_image")).embedding
        assert text is not None and image is not None  # two towers have a projection
        text, image = l2_normalize(text), l2_normalize(image)
        scale = jnp.exp(clipped(params["logit_scale"], float(np.log(self.max_scale))))
        loss, first = self.compare(text, image, scale, params.get("logit_bias"), _Columns(self.chunk, self.axes))
        return loss, ({"loss": loss, "accuracy": first.astype(jnp.float32).mean(), "scale": scale}, extra)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch of captions and images of that side."""
        assert self.config.text is not None  # see __post_init__
        return {
            "ids": jax.ShapeDtypeStruct((batch_size, self.config.text.length), jnp.int32),
            "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
        }


class _Compared(NamedTuple):
    """The loss, and for each caption whether its own image is nearer than all others."""

    loss: Float[Array, ""]
    first: Array


@dataclass(frozen=True)
class _Columns:
    """Reductions over the columns of the logits, `chunk` columns at a time; each device has its own rows."""

    chunk: int
    axes: tuple[str, ...]

    def logsumexp(self, rows: Float[Array, "b e"], others: Float[Array, "b e"]) -> tuple[Array, Array]:
        """log Σ exp of each row's logits, and the largest logit of its negative pairs; both (b)."""

        def add(total, logits):
            most, total = total
            new = jax.lax.stop_gradient(jnp.maximum(most, logits.max(1)))
            return new, total * jnp.exp(most - new) + jnp.exp(logits - new[:, None]).sum(1)

        (most, total), nearest = self._scan(add, (-jnp.inf, 0.0), rows, others)
        return most + jnp.log(total), nearest

    def softplus(self, rows: Float[Array, "b e"], others: Float[Array, "b e"], bias: Array) -> tuple[Array, Array]:
        """Σ log(1 + exp(logit + bias)) of each row, and the largest logit of its negative pairs; both (b)."""
        return self._scan(lambda total, logits: total + jax.nn.softplus(logits + bias).sum(1), 0.0, rows, others)

    def _scan(self, add: Callable, total: Any, rows: Array, others: Array) -> tuple[Any, Array]:
        """Fold `add` over the chunks of logits, starting from `total` (a number per row). Also returns the largest
        logit of each row's negative pairs."""
        everywhere = _placed(others, PartitionSpec(), self.axes)
        chunk = min(self.chunk, len(others))
        chunks = jnp.pad(everywhere, ((0, -len(others) % chunk), (0, 0))).reshape(-1, chunk, others.shape[1])
        numbers = jnp.arange(chunks.shape[0] * chunk).reshape(-1, chunk)
        each = jnp.arange(len(rows))[:, None]

        @jax.checkpoint
        def body(carry, part):
            total, nearest = carry
            columns, number = part
            # Accelerators round products to 8 or 11 bits by default, and logits reach 100.
            logits = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
            logits = jnp.where(number < len(others), logits, -jnp.inf)
            apart = jax.lax.stop_gradient(jnp.where(number == each, -jnp.inf, logits).max(1))
            return (add(total, logits), jnp.maximum(nearest, apart)), None

        def of_rows(value: float) -> Array:
            return _placed(jnp.full(len(rows), value, rows.dtype), PartitionSpec(self.axes or None), self.axes)

        carry = jax.tree.map(of_rows, (total, -jnp.inf))
        return jax.lax.scan(body, carry, (chunks, numbers))[0]


def _placed(x: Array, spec: PartitionSpec, axes: tuple[str, ...]) -> Array:
    return jax.lax.with_sharding_constraint(x, spec) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped(log_scale: Float[Array, ""], most: float) -> Float[Array, ""]:
    """min(log_scale, most). At or beyond `most`, only gradients that decrease log_scale are passed on; a plain minimum
    passes none, so a value beyond the limit would never return."""
    return jnp.minimum(log_scale, most)


def _clipped_forward(log_scale, most):
    return clipped(log_scale, most), log_scale


def _clipped_backward(most, log_scale, gradient):
    return (jnp.where((log_scale >= most) & (gradient < 0), 0.0, gradient),)


clipped.defvjp(_clipped_forward, _clipped_backward)


def normalised(image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Normalise an image in [-1, 1] for the image tower."""
    return ((image + 1) / 2 - jnp.array(MEAN)) / jnp.array(STD)


def clip_params(params: dict) -> dict:
    """The parameters of `nets.clip.CLIP`, without the bias of the sigmoid loss."""
    return {name: value for name, value in params.items() if name != "logit_bias"}


def finished(stage: CLIPTraining, params: dict) -> dict:
    """CLIP's parameters after training, on the host, with the temperature clipped."""
    kept = clip_params(params)
    return kept | {"logit_scale": np.minimum(np.asarray(kept["logit_scale"]), np.float32(np.log(stage.max_scale)))}

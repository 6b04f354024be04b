"""Autoregressive models of codes: training, and sampling as a box of a pipeline.

One model for two networks: DALL·E 1's transformer over text and codes (arXiv 2102.12092, 2.2 and B), and the
encoder–decoder of dalle-mini. Both give logits of complete sequences (`__call__`), and sample with a cache: `prefill`
reads the text, `step` one code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdiff.core.products import TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.boxes import Generator
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.models.token_sampling import TokenSampling, drawn
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.autoregressive import AutoregressiveConfig, Logits
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.text.encoder import TextEmbedding

CodesNetwork = AutoregressiveConfig | EncoderDecoderConfig


@dataclass(frozen=True)
class AutoregressiveModel(SingleOptimizer):
    """Settings of a model of text and codes. The defaults are DALL·E 1's.

    product: the codes. text_weight: of the text's cross-entropy in the loss; that of the codes has the rest (B.1: 1/8
    and 7/8); 0 for a network that predicts no text. dropout: fraction of captions that are left out in training, so
    that the text can be guided. null: the token ids in place of a caption that is left out; none: padding alone.
    """

    network: CodesNetwork = AutoregressiveConfig()
    product: TokenSpec = TokenSpec()
    text_weight: float = 1 / 8
    dropout: float = 0.1
    null: tuple[int, ...] = ()

    def __post_init__(self):
        if self.network.codes != self.product.classes:
            raise ValueError(f"a transformer of {self.network.codes} codes for {self.product}")
        if not 0 <= self.text_weight < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"text_weight and dropout lie in [0, 1), not {self.text_weight} and {self.dropout}")
        if self.text_weight and not self.network.predicts_text:
            raise ValueError(f"text_weight must be 0, not {self.text_weight}: this network predicts no text")
        if len(self.null) > self.network.text_length or not all(0 <= each < self.network.vocab for each in self.null):
            raise ValueError(f"null {self.null}: up to {self.network.text_length} ids below {self.network.vocab}")

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        spec = self.batch_spec(1, self.network.columns)
        inputs = (jnp.zeros(spec[name].shape, spec[name].dtype) for name in ("ids", "text_mask", "image"))
        plain = replace(self.network, execution=replace(self.network.execution, scan=False))
        return plain.module().init(key, *inputs)["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """The weighted mean cross-entropy in nats per token; padding is not predicted.

        batch: ids and text_mask (b t), the caption; image (b r c), its codes. Metrics: `text_loss` if the network
        predicts text, `code_loss`, and `code_accuracy`, the fraction of codes that are the likeliest.
        """
        keys = noise.sample_keys(key, jnp.arange(len(batch["ids"])))
        kept = (noise.uniform(keys) >= self.dropout)[:, None]
        given, null = _Text(batch["ids"], batch["text_mask"]), _null(self, len(keys))
        dropped = _Text(*(jnp.where(kept, *both) for both in zip(given, null)))
        text, codes, right = self._errors(params, dropped, batch["image"])
        metrics = {"code_loss": codes.mean(), "code_accuracy": right.mean()}
        if text is None:
            return codes.mean(), (metrics, extra)
        loss = self.text_weight * text + (1.0 - self.text_weight) * codes.mean()
        return loss, ({"text_loss": text} | metrics, extra)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """`held_out_loss`, the codes' cross-entropy, and `held_out_code_accuracy`; sums over examples and counts.
        numbers (b): of the examples, or −1 for padding rows."""
        _, codes, right = self._errors(params, _Text(batch["ids"], batch["text_mask"]), batch["image"])
        counted = numbers >= 0
        scores = {"held_out_loss": codes.mean((1, 2)), "held_out_code_accuracy": right.mean((1, 2))}
        count = counted.astype(jnp.float32).sum()
        return {name: (jnp.where(counted, value, 0.0).sum(), count) for name, value in scores.items()}

    def cast(self, params: dict) -> dict:
        """Cast the kernels to the network's compute type, as its layers would."""
        dtype = self.network.execution.dtype

        def cast(path: Any, leaf: Array) -> Array:
            return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch; the grid is that of the network, whatever the side."""
        network = self.network
        return {
            "ids": jax.ShapeDtypeStruct((batch_size, network.text_length), jnp.int32),
            "text_mask": jax.ShapeDtypeStruct((batch_size, network.text_length), jnp.bool_),
            "image": jax.ShapeDtypeStruct((batch_size, network.rows, network.columns), jnp.int32),
        }

    def _errors(self, params: dict, text: "_Text", codes: Int[Array, "b r c"]) -> tuple[Array | None, Array, Array]:
        """The text's mean cross-entropy, None if it is not predicted; for each code its cross-entropy, and whether it
        is the likeliest (b r c)."""
        logits = cast(Logits, self.network.module().apply({"params": params}, *text, codes))
        each = optax.softmax_cross_entropy_with_integer_labels(logits.codes, codes.reshape(len(codes), -1))
        right = logits.codes.argmax(-1) == codes.reshape(len(codes), -1)
        scores = each.reshape(codes.shape), right.reshape(codes.shape).astype(jnp.float32)
        if logits.text is None:
            return None, *scores
        errors = optax.softmax_cross_entropy_with_integer_labels(logits.text, text.ids)
        return jnp.where(text.mask, errors, 0.0).sum() / jnp.maximum(text.mask.sum(), 1), *scores


@dataclass(frozen=True, eq=False)
class TrainedAutoregressive(Generator):
    """A transformer with parameters: samples a grid of codes from a caption's token ids. sharding: of the samples over
    the ambient mesh."""

    model: AutoregressiveModel
    params: dict
    sampling: TokenSampling = field(default_factory=TokenSampling)
    text_fingerprint: str | None = None
    sharding: ActivationSharding = ActivationSharding()

    @property
    def produces(self) -> TokenSpec:
        return self.model.product

    @property
    def side(self) -> int:
        return self.model.network.columns

    @property
    def steps(self) -> int:
        return self.model.network.rows

    @property
    def reads(self) -> tuple[int, int]:
        """It reads ids; its text encoder has no states."""
        return self.model.network.text_length, 0

    @property
    def takes_init(self) -> bool:
        return True

    def batch_size(self, wanted: int) -> int:
        """`wanted` rounded up to a multiple of the number of devices over which batches are sharded."""
        return self.sharding.padded(wanted)

    def check(self, size: tuple[int, int]) -> None:
        """ValueError for another grid than that of the training: positions are learned."""
        network = self.model.network
        if tuple(size) != (network.rows, network.columns):
            have, want = (f"{rows}×{columns}" for rows, columns in (size, (network.rows, network.columns)))
            raise ValueError(f"this transformer samples {want} codes, not {have}")

    def generate(self, request: SampleRequest) -> Int[Array, "b r c"]:
        """Codes, row by row. With an initial product, the codes outside of its mask are kept: a mask of the lower rows
        completes an image. ValueError as from `check`, if the text has no ids, or for an initial product without a
        mask, of which nothing would remain."""
        self.check(request.size)
        known, network = _known(request), self.model.network
        text = _text(self.model, request.text, len(request.keys))
        guided = float(self.sampling.guidance) != 1.0
        plain = replace(network, execution=replace(network.execution, remat="none", scan=False))
        if guided:
            negative = _text(self.model, request.negative, len(request.keys))
            text = _Text(*(jnp.concatenate(both) for both in zip(text, negative)))
        text, keys, known = jax.tree.map(self.sharding.samples, (text, request.keys, known))
        state = _begun(plain, self.params, text)
        codes = self.sharding.samples(jnp.zeros((len(keys), network.rows * network.columns), jnp.int32))
        chunk = network.rows if request.progress is None else 1
        given = _Given(self.params, self.sampling, keys, known)
        for row in range(0, network.rows, chunk):
            first, last = row * network.columns, min(row + chunk, network.rows) * network.columns
            codes, state = _sampled(plain, guided, given, first, last, codes, state)
            if request.progress is not None:
                jax.block_until_ready(codes)
                request.progress(row + 1)
        return codes.reshape(-1, network.rows, network.columns)


class _State(NamedTuple):
    """The logits of the next code, and the cache; with guidance of both branches, the conditional one first."""

    logits: Float[Array, "b k"]
    cache: Any


class _Known(NamedTuple):
    codes: Int[Array, "b m"]
    kept: Bool[Array, "b m"]


def _known(request: SampleRequest) -> _Known | None:
    """The given codes, and where they are kept."""
    init = request.init
    if init is None:
        return None
    if init.mask is None:
        raise ValueError("a transformer of codes completes images: give a mask of what is sampled beside the image")
    count = len(request.keys)
    return _Known(init.value.reshape(count, -1).astype(jnp.int32), init.mask.reshape(count, -1) < 0.5)


class _Text(NamedTuple):
    ids: Int[Array, "b t"]
    mask: Bool[Array, "b t"]


def _text(model: AutoregressiveModel, text: TextEmbedding | None, count: int) -> _Text:
    """The text's ids; without text, those of `null`."""
    if text is None:
        return _null(model, count)
    if text.ids is None:
        raise ValueError("this transformer reads token ids, and its text encoder gives none")
    return _Text(text.ids, text.mask)


def _null(model: AutoregressiveModel, count: int) -> _Text:
    """The ids of `null` and padding."""
    places, given = jnp.arange(model.network.text_length), len(model.null)
    ids = jnp.zeros(places.shape, jnp.int32).at[:given].set(jnp.asarray(model.null, jnp.int32))
    return _Text(*(jnp.broadcast_to(each, (count, *places.shape)) for each in (ids, places < given)))


@partial(jax.jit, static_argnums=0)
def _begun(network: CodesNetwork, params: dict, text: _Text) -> _State:
    return _State(*cast(tuple, network.module().apply({"params": params}, *text, method="prefill")))


class _Given(NamedTuple):
    """What all steps share."""

    params: dict
    sampling: TokenSampling
    keys: Key[Array, " b"]
    known: _Known | None


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _sampled(
    network: CodesNetwork,
    guided: bool,
    given: _Given,
    first: Array,
    last: Array,
    codes: Array,
    state: _State,
) -> tuple[Array, _State]:
    """Codes number `first` to `last` − 1, which are written into `codes`, and the state after them."""

    def body(number: Array, carry: tuple[Array, _State]) -> tuple[Array, _State]:
        codes, (logits, cache) = carry
        if guided:
            conditional, unconditional = jnp.split(logits, 2)
            logits = given.sampling.guidance * conditional + (1.0 - given.sampling.guidance) * unconditional
        code = drawn(logits, noise.fold(given.keys, number), given.sampling)
        if given.known is not None:
            code = jnp.where(given.known.kept[:, number], given.known.codes[:, number], code)
        both = jnp.concatenate([code, code]) if guided else code
        following = network.module().apply({"params": given.params}, both, number, cache, method="step")
        return codes.at[:, number].set(code), _State(*cast(tuple, following))

    return jax.lax.fori_loop(first, last, body, (codes, state))

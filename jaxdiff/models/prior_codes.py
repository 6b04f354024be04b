"""The autoregressive prior of DALL·E 2 (arXiv 2204.06125, 2.2): a CLIP image embedding as a sequence of codes.

An embedding is projected on its principal components, the largest first, and each is divided into buckets. Before them
comes the bucket of the dot product with the caption's embedding: a high one asks for an image that fits its caption.
A transformer of text and codes (`models/autoregressive.py`) predicts this sequence after a prefix of two parts: the
caption's token ids, and the codes of its embedding, as ids that follow those of the words. The published prior reads
that embedding as a vector instead.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdiff.core.products import EmbeddingSpec, TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.boxes import Generator
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.start import InitProduct
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.text.encoder import TextEmbedding


class EmbeddingCodes(NamedTuple):
    """How embeddings are coded. components: of length 1, by decreasing variance. low, high: the range of each
    component, which its buckets divide evenly. dots: the fraction of the training pairs in each bucket of the dot
    product; their number is that of all buckets. dot_low, dot_high: its range."""

    mean: Float[Array, " e"]
    components: Float[Array, "d e"]
    low: Float[Array, " d"]
    high: Float[Array, " d"]
    dots: Float[Array, " k"]
    dot_low: Float[Array, ""]
    dot_high: Float[Array, ""]

    @property
    def buckets(self) -> int:
        return len(self.dots)


def fit(
    image: Float[Array, "n e"], text: Float[Array, "n e"], components: int = 319, buckets: int = 1024
) -> EmbeddingCodes:
    """The codes of a training set, from the embeddings of its images and captions; the defaults are the paper's.

    The paper does not say how it divides a component: here evenly, from the smallest to the largest value. ValueError
    for more components than embeddings or dimensions, or fewer than two buckets.
    """
    if not 1 <= components <= min(image.shape) or buckets < 2:
        raise ValueError(f"{components} components in {buckets} buckets of {image.shape[0]}×{image.shape[1]} values")
    mean, directions = principal_components(image, components)
    values = jnp.matmul(image - mean, directions.T, precision="highest")
    dots = (image * text).sum(-1)
    low, high = dots.min(), dots.max()
    counts = jnp.zeros(buckets).at[_bucket(dots, low, high, buckets)].add(1.0 / len(dots))
    return EmbeddingCodes(mean, directions, values.min(0), values.max(0), counts, low, high)


def principal_components(x: Float[Array, "n e"], count: int) -> tuple[Float[Array, " e"], Float[Array, "d e"]]:
    """The mean, and the directions of the largest variance, by decreasing variance. The largest entry of each is
    positive."""
    mean = x.mean(0)
    covariance = jnp.matmul((x - mean).T, x - mean, precision="highest") / len(x)
    directions = jnp.linalg.eigh(covariance)[1].T[::-1][:count]
    largest = jnp.take_along_axis(directions, jnp.abs(directions).argmax(1, keepdims=True), axis=1)
    return mean, directions * jnp.sign(largest)


def encode(codes: EmbeddingCodes, embedding: Float[Array, "b e"]) -> Int[Array, "b d"]:
    """The bucket of each component; values beyond the range are in the outer buckets."""
    values = jnp.matmul(embedding - codes.mean, codes.components.T, precision="highest")
    return _bucket(values, codes.low, codes.high, codes.buckets)


def decode(codes: EmbeddingCodes, buckets: Int[Array, "b d"]) -> Float[Array, "b e"]:
    """The embedding at the centres of the buckets."""
    values = codes.low + (buckets + 0.5) * (codes.high - codes.low) / codes.buckets
    return codes.mean + jnp.matmul(values, codes.components, precision="highest")


def encode_dot(codes: EmbeddingCodes, image: Float[Array, "b e"], text: Float[Array, "b e"]) -> Int[Array, " b"]:
    """The bucket of the dot product."""
    return _bucket((image * text).sum(-1), codes.dot_low, codes.dot_high, codes.buckets)


def high_dots(codes: EmbeddingCodes, keys: Key[Array, " b"]) -> Int[Array, " b"]:
    """Buckets of the dot product, drawn from the upper half of the training pairs, one for each key."""
    above = jnp.cumsum(codes.dots[::-1])[::-1]  # the fraction of pairs in this bucket and above
    upper = jnp.minimum(codes.dots, jnp.maximum(0.5 - (above - codes.dots), 0.0))
    return jnp.argmax(jnp.log(upper) + noise.gumbel(keys, upper.shape), axis=-1).astype(jnp.int32)


def prefix(
    codes: EmbeddingCodes,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    text: Float[Array, "b e"],
    vocab: int,
) -> tuple[Int[Array, "b t2"], Bool[Array, "b t2"]]:
    """The ids before the codes and their mask: the caption's, below `vocab`, and the codes of its embedding, from
    `vocab` on. A caption without tokens is the null text, and has no embedding either."""
    more = vocab + encode(codes, text)
    written = jnp.broadcast_to(mask.any(1, keepdims=True), more.shape)
    return jnp.concatenate([ids, more], axis=1), jnp.concatenate([mask, written], axis=1)


def training_batch(
    codes: EmbeddingCodes, ids: Int[Array, "b t"], mask: Bool[Array, "b t"], image: Array, text: Array, vocab: int
) -> dict[str, Array]:
    """A batch of `AutoregressiveModel.loss`, from captions and the embeddings (b e) of images and captions."""
    before, seen = prefix(codes, ids, mask, text, vocab)
    sequence = jnp.concatenate([encode_dot(codes, image, text)[:, None], encode(codes, image)], axis=1)
    return {"ids": before, "text_mask": seen, "image": sequence[:, None]}


def coded(
    model: AutoregressiveModel, text_length: int, vocab: int, components: int, buckets: int
) -> AutoregressiveModel:
    """The model with the sizes for captions of `text_length` tokens out of `vocab`, and for embeddings of so many
    components."""
    network = replace(
        model.network,
        vocab=vocab + buckets,
        text_length=text_length + components,
        codes=buckets,
        rows=1,
        columns=1 + components,
    )
    return replace(model, network=network, product=TokenSpec(buckets, 1))


@dataclass(frozen=True, eq=False)
class TrainedPriorCodes(Generator):
    """A transformer of such sequences: samples image embeddings from captions.

    embeddings: those that are coded, of images and captions; scaled to its length, if it has one.
    text_length, text_width: of the text encoder's states, which are not read; its token ids and pooled embedding are.
    ValueError unless the transformer's sizes are those of the codes.
    """

    transformer: TrainedAutoregressive
    codes: EmbeddingCodes
    embeddings: EmbeddingSpec
    text_length: int = 77
    text_width: int = 768

    def __post_init__(self):
        network, count = self.transformer.model.network, len(self.codes.components)
        have = network.text_length, network.rows, network.columns, network.codes
        want = self.text_length + count, 1, 1 + count, self.codes.buckets
        if have != want:
            raise ValueError(f"a transformer of {have} text tokens, rows, columns and codes: these codes need {want}")
        if self.embeddings.width != self.codes.components.shape[1]:
            raise ValueError(f"codes of embeddings of width {self.codes.components.shape[1]}, not {self.embeddings}")

    @property
    def params(self) -> dict:
        """The transformer's."""
        return self.transformer.params

    @property
    def produces(self) -> EmbeddingSpec:
        return self.embeddings

    @property
    def side(self) -> int:
        return 1

    @property
    def sampling(self) -> TokenSampling:
        return self.transformer.sampling

    @property
    def reads(self) -> tuple[int, int]:
        return self.text_length, self.text_width

    def batch_size(self, wanted: int) -> int:
        return self.transformer.batch_size(wanted)

    def check(self, size: tuple[int, int]) -> None:
        if tuple(size) != (1, 1):
            raise ValueError(f"a prior samples embeddings, which have the size 1×1, not {size[0]}×{size[1]}")

    def generate(self, request: SampleRequest) -> Float[Array, "b 1 1 e"]:
        """Image embeddings, with dot products from the upper half. ValueError as from `check`, or if the text encoder
        gives no ids or no pooled embedding."""
        self.check(request.size)
        network = self.transformer.model.network
        first = high_dots(self.codes, noise.fold(request.keys, network.columns))
        known = jnp.zeros((len(first), 1, network.columns), jnp.int32).at[:, 0, 0].set(first)
        sampled = jnp.ones((*known.shape, 1)).at[:, 0, 0].set(0.0)
        text, negative = (self._prefix(each) for each in (request.text, request.negative))
        inner = replace(
            request,
            size=(1, network.columns),
            text=text,
            negative=negative,
            init=InitProduct(known, mask=sampled),
        )
        sequence = self.transformer.generate(inner)
        return self.embeddings.normalized(decode(self.codes, sequence[:, 0, 1:]))[:, None, None]

    def _prefix(self, text: TextEmbedding | None) -> TextEmbedding | None:
        if text is None:
            return None
        if text.ids is None or text.pooled is None:
            raise ValueError("this prior reads token ids and a pooled embedding, and its text encoder gives not both")
        vocab = self.transformer.model.network.vocab - self.codes.buckets
        ids, mask = prefix(self.codes, text.ids, text.mask, self.embeddings.normalized(text.pooled), vocab)
        return TextEmbedding(jnp.zeros((*ids.shape, 0)), mask, None, ids)


def _bucket(values: Array, low: Array, high: Array, buckets: int) -> Array:
    """Which of the even divisions of a range holds each value; a range of one value has one."""
    share = (values - low) / jnp.where(high > low, high - low, 1.0)
    return jnp.clip(jnp.floor(share * buckets), 0, buckets - 1).astype(jnp.int32)

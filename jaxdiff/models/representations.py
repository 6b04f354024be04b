"""Conditioners of what an image shows, beside its caption: a class, an embedding of an image, a semantic map.

Each is dropped in training, which makes guidance possible. In sampling they read `SampleRequest.given`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.conditioner import Branches, SampleInputs, Shapes, check_dropout, entry
from jaxdiff.nets.conditioning import Conditioning


@dataclass(frozen=True)
class ClassConditioner:
    """One of `classes`, as a vector. The network's first layer on it is a table of embeddings, with an entry for no
    class."""

    classes: int
    dropout: float = 0.1

    def __post_init__(self):
        check_dropout(self.dropout, "classes")
        if self.classes < 1:
            raise ValueError(f"{self.classes} classes: at least 1")

    entry = "label"

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        return {self.entry: jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        return self._seen(jnp.zeros(1, jnp.int32))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads label (b), in 0 … classes − 1."""
        label = entry(batch, self.entry, jnp.int32)
        return self._seen(jnp.where(_kept(keys, 5, self.dropout), label, self.classes))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        null = self._seen(jnp.full(keys.shape[0], self.classes, jnp.int32))
        return Branches(self._seen(inputs.given[self.entry]) if self.entry in inputs.given else null, null)

    def check(self, value: Any, count: int, size: tuple[int, int]) -> None:
        """ValueError unless these are `count` classes."""
        _check_shape(self.entry, value, (count,))
        _check_entries(self.entry, value, self.classes)

    def _seen(self, label: Int[Array, " b"]) -> Conditioning:
        return Conditioning(vector=jax.nn.one_hot(label, self.classes + 1))


class Form(enum.Enum):
    """How a network reads an embedding: added to the time embedding, or as tokens that it attends to."""

    VECTOR = "vector"
    TOKENS = "tokens"


@dataclass(frozen=True)
class EmbeddingConditioner:
    """An embedding of an image, such as CLIP's, or several (of its patches, or of several images).

    width: of an embedding; as tokens, that of the text encoder's, if the model reads text. length: their number, for
    tokens. Without an embedding the network reads zeros, as tokens masked ones. norm: the length of the embeddings that
    it reads (`EmbeddingSpec.norm`); they are not scaled here, but where they come from.
    """

    width: int
    length: int = 1
    form: Form = Form.VECTOR
    dropout: float = 0.1
    norm: float | None = None

    def __post_init__(self):
        check_dropout(self.dropout, "embeddings")
        if self.width < 1 or self.length < 1:
            raise ValueError(f"{self.length} embeddings of width {self.width}: both at least 1")
        if self.form is Form.VECTOR and self.length != 1:
            raise ValueError(f"{self.length} embeddings as a vector: only one can be added; read them as tokens")

    entry = "image_embedding"

    @property
    def product(self) -> EmbeddingSpec:
        """The type of the embeddings."""
        return EmbeddingSpec(self.width, self.norm)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's entry."""
        return (self.width,) if self.form is Form.VECTOR else (self.length, self.width)

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        return {self.entry: jax.ShapeDtypeStruct((batch_size, *self.shape), jnp.float32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        return self._seen(jnp.zeros((1, *self.shape)), jnp.ones(1, bool))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads image_embedding: (b d), as tokens (b n d)."""
        return self._seen(entry(batch, self.entry), _kept(keys, 6, self.dropout))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        count = keys.shape[0]
        zeros, kept = jnp.zeros((count, *self.shape)), self.entry in inputs.given
        given = self._seen(jnp.asarray(inputs.given.get(self.entry, zeros), jnp.float32), jnp.full(count, kept))
        return Branches(given, self._seen(zeros, jnp.zeros(count, bool)))

    def check(self, value: Any, count: int, size: tuple[int, int]) -> None:
        """ValueError unless these are the embeddings of `count` images."""
        _check_shape(self.entry, value, (count, *self.shape))

    def _seen(self, embedding: Float[Array, "b *d"], kept: Bool[Array, " b"]) -> Conditioning:
        seen = jnp.where(kept.reshape(-1, *(1 for _ in self.shape)), embedding, 0.0)
        if self.form is Form.VECTOR:
            return Conditioning(vector=seen)
        return Conditioning(tokens=seen, token_mask=jnp.broadcast_to(kept[:, None], seen.shape[:2]))


@dataclass(frozen=True)
class SemanticMapConditioner:
    """A map of the class of each pixel, beside the network's input (arXiv 2112.10752, 4.3.2).

    stride: pixels of the map per pixel or latent of the input. detail: along each axis, values per pixel of the input:
    with 1, a latent sees which part of it each class covers; with `stride`, it sees every pixel of the map. The network
    has a channel for each class and value, and one that says whether there is a map.
    """

    classes: int
    stride: int = 8
    detail: int = 1
    dropout: float = 0.1

    def __post_init__(self):
        check_dropout(self.dropout, "maps")
        if self.classes < 1:
            raise ValueError(f"{self.classes} classes: at least 1")
        if self.detail < 1 or self.stride % self.detail:
            raise ValueError(f"detail {self.detail}: must divide the stride {self.stride}")

    entry = "semantic_map"

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        pixels = self.stride * side
        return {self.entry: jax.ShapeDtypeStruct((batch_size, pixels, pixels), jnp.int32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        height, width = self.pixels(size)
        return self._seen(jnp.zeros((1, height, width), jnp.int32), jnp.ones(1, bool))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads semantic_map (b H W), in 0 … classes − 1, H and W: `stride` times the size."""
        values = entry(batch, self.entry, jnp.int32)
        _check_shape(self.entry, values, (keys.shape[0], *self.pixels(size)))
        return self._seen(values, _kept(keys, 7, self.dropout))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        count = keys.shape[0]
        zeros, kept = jnp.zeros((count, *self.pixels(size)), jnp.int32), self.entry in inputs.given
        given = self._seen(inputs.given.get(self.entry, zeros), jnp.full(count, kept))
        return Branches(given, self._seen(zeros, jnp.zeros(count, bool)))

    def check(self, value: Any, count: int, size: tuple[int, int]) -> None:
        """ValueError unless these are the maps of `count` images of this size."""
        _check_shape(self.entry, value, (count, *self.pixels(size)))
        _check_entries(self.entry, value, self.classes)

    def pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the map for an input of this size."""
        return self.stride * size[0], self.stride * size[1]

    def _seen(self, values: Int[Array, "b h w"], kept: Bool[Array, " b"]) -> Conditioning:
        (b, height, width), cell = values.shape, self.stride // self.detail
        one_hot = jax.nn.one_hot(values, self.classes)
        shares = one_hot.reshape(b, height // cell, cell, width // cell, cell, self.classes).mean((2, 4))
        rows, columns = height // self.stride, width // self.stride
        cells = shares.reshape(b, rows, self.detail, columns, self.detail, self.classes).transpose(0, 1, 3, 2, 4, 5)
        channels = jnp.concatenate([cells.reshape(b, rows, columns, -1), jnp.ones((b, rows, columns, 1))], axis=-1)
        return Conditioning(concat=jnp.where(kept[:, None, None, None], channels, 0.0))


Representation = ClassConditioner | EmbeddingConditioner | SemanticMapConditioner
"""Conditioners with a null condition, which read `SampleRequest.given`."""


def _kept(keys: Key[Array, " b"], number: int, dropout: float) -> Bool[Array, " b"]:
    """Which examples keep their condition. number: of the random numbers, for each conditioner its own."""
    return noise.uniform(noise.fold(keys, number)) >= dropout


def _check_shape(name: str, value: Any, wanted: tuple[int, ...]) -> None:
    if tuple(value.shape) != wanted:
        have, want = ("×".join(map(str, shape)) or "a number" for shape in (value.shape, wanted))
        raise ValueError(f"{name} has the shape {have}, not {want}")


def _check_entries(name: str, value: Any, classes: int) -> None:
    """ValueError unless these are classes; those of traced values are not known."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} is {value.dtype}: classes are whole numbers")
    if isinstance(value, jax.core.Tracer):
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name} has the class {low if low < 0 else high}: there are {classes}, from 0")

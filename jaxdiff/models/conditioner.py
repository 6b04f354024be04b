"""The protocol of conditioners, and what they have in common (`conditioners.py`, `representations.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.nets.conditioning import Conditioning, Hint
from jaxdiff.text.encoder import TextEmbedding

Shapes = dict[str, jax.ShapeDtypeStruct]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """Conditions of a batch of samples.

    text: the embedded prompts (b n d); None: no text. negative: text of the unconditional branch; None: the null text.
    low_res: (b h w c). aug_level: its noise level in [0, 1]. mask, masked: of inpainting, see `MaskConditioner`.
    hints: one for each ControlNet. guess: for each, whether only the conditional branch gets it. given: of the other
    conditioners, by the names of their entries in a training batch; without one, both branches get its null condition.
    """

    text: TextEmbedding | None = None
    negative: TextEmbedding | None = None
    low_res: Float[Array, "b h2 w2 c2"] | None = None
    aug_level: Float[Array, ""] | float = 0.0
    mask: Float[Array, "b h w 1"] | None = None
    masked: Float[Array, "b h w c"] | None = None
    hints: tuple[Hint, ...] = ()
    given: Mapping[str, Array] = field(default_factory=dict)
    guess: tuple[bool, ...] = field(default=(), metadata={"static": True})


class Branches(NamedTuple):
    """The conditionings of the two branches of guidance."""

    conditional: Conditioning
    unconditional: Conditioning


@runtime_checkable
class Conditioner(Protocol):
    """A frozen dataclass of settings. Sizes are (height, width) of the network's input."""

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        """The entries of training batches that it reads, for square images of that side."""
        ...

    def example(self, size: tuple[int, int]) -> Conditioning:
        """A batch of one, to initialize the network: which fields of `Conditioning` are present, and their shapes."""
        ...

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning: ...

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches: ...


_AXIS = {"tokens": 1, "token_mask": 1, "vector": -1, "concat": -1}


def joined(conditionings: list[Conditioning]) -> Conditioning:
    """Concatenate conditionings: tokens along the sequence, channels and vectors along the last axis.

    ValueError if more than one sets a noise level, residuals or an interval.
    """
    fields: dict[str, Any] = {}
    for name in Conditioning._fields:
        values = [getattr(each, name) for each in conditionings if getattr(each, name) is not None]
        if len(values) > 1 and name not in _AXIS:
            raise ValueError(f"{len(values)} conditioners set {name}, a network takes one")
        fields[name] = None if not values else values[0] if len(values) == 1 else jnp.concatenate(values, _AXIS[name])
    return Conditioning(**fields)


def entry(batch: Mapping[str, Any], name: str, dtype: Any = jnp.float32) -> Array:
    """An entry of a training batch; ValueError if it is missing."""
    if name not in batch:
        raise ValueError(f"a batch of this model needs {name}")
    return jnp.asarray(batch[name], dtype)


def check_dropout(dropout: float, what: str) -> None:
    """ValueError unless it is a fraction. what: of what, in the message."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout}: must be a fraction of the {what}, between 0 and 1")

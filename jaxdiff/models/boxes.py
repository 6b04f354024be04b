"""The protocols of a pipeline's boxes: a generator and decoders.

A new box is a subclass of `Generator` or `Decoder`, and so inherits the defaults of `Box`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array

from jaxdiff.core.products import ProductSpec
from jaxdiff.models.conditioners import HintConditioner
from jaxdiff.models.sampling import SampleRequest


@runtime_checkable
class Box(Protocol):
    """The common interface of generators and decoders.

    side: side of its default square products. consumes: the input product of a decoder; None for a generator. factor:
    ratio of the sides of a decoder's output to its input. steps: number of steps that it reports.
    reads: length and width of its text embeddings; None if it reads no text. reads_padding: whether it reads the text
    encoder's outputs for padding and for the empty caption. reads_empty: whether it reads those for the empty caption
    when there is no negative prompt. takes_init: whether it can start from an initial product.
    reads_mask: whether it reads the mask of inpainting, and the product of the image without the masked pixels.
    reads_hints: which hints its ControlNets read; None if it has none. conditions: names of the conditions beside the
    text that it reads from `SampleRequest.given`.
    """

    @property
    def produces(self) -> ProductSpec: ...

    @property
    def side(self) -> int: ...

    @property
    def consumes(self) -> ProductSpec | None:
        return None

    @property
    def factor(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        return 1

    @property
    def reads(self) -> tuple[int | None, int | None] | None:
        return None

    @property
    def reads_padding(self) -> bool:
        return False

    @property
    def reads_empty(self) -> bool:
        return self.reads_padding

    @property
    def takes_init(self) -> bool:
        return False

    @property
    def reads_mask(self) -> bool:
        return False

    @property
    def reads_hints(self) -> HintConditioner | None:
        return None

    @property
    def conditions(self) -> tuple[str, ...]:
        return ()

    def batch_size(self, wanted: int) -> int:
        """The smallest supported batch size of at least `wanted`."""
        return wanted

    def check(self, size: tuple[int, int]) -> None:
        """ValueError, before anything runs, if it cannot produce this height and width."""


def check_stride(size: tuple[int, int], stride: int, what: str) -> None:
    """ValueError unless height and width are multiples of the stride. what: the network, in the message."""
    for side in size:
        if side < 1 or side % stride:
            raise ValueError(f"a side of {side} pixels is not a multiple of {what}'s stride {stride}")


@runtime_checkable
class Generator(Box, Protocol):
    """Produces a product from text. Subclasses inherit the defaults of `Box`."""

    def generate(self, request: SampleRequest) -> Array: ...


@runtime_checkable
class Decoder(Box, Protocol):
    """Decodes a product, towards the image; it may also read the text."""

    def decode(self, product: Array, request: SampleRequest) -> Array: ...


@runtime_checkable
class Encoding(Protocol):
    """A decoder that can also encode, so that the boxes before it can start from an image."""

    def encode(self, image: Array) -> Array: ...

"""The boxes of a system between its text encoder and the image: a generator, and decoders.

A new box is a class that names `Generator` or `Decoder` as its base, and so has the defaults of `Box`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array

from jaxdiff.core.products import ProductSpec
from jaxdiff.models.sampling import SampleRequest


@runtime_checkable
class Box(Protocol):
    """What generators and decoders have in common.

    side: of the square products that it is made for. consumes: what a decoder decodes; None for a generator. factor:
    how many times a decoder's product is as high and wide as what it consumes. steps: of which it reports progress.
    reads: length and width of the text embeddings that it reads; None where it reads none. reads_padding: it reads what
    the text encoder gives for padding and for the empty caption.
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

    def batch_size(self, wanted: int) -> int:
        """The smallest batch of at least `wanted` that it takes."""
        return wanted

    def check(self, size: tuple[int, int]) -> None:
        """ValueError where it cannot produce this height and width, before anything runs."""


@runtime_checkable
class Generator(Box, Protocol):
    """From text to a product. A class that names it as its base has the defaults of `Box`."""

    def generate(self, request: SampleRequest) -> Array: ...


@runtime_checkable
class Decoder(Box, Protocol):
    """From a product to one that is nearer to the image; it may read the text too."""

    def decode(self, product: Array, request: SampleRequest) -> Array: ...


@runtime_checkable
class Encoding(Protocol):
    """A decoder that knows the way back: with it, what comes before can begin with an image."""

    def encode(self, image: Array) -> Array: ...

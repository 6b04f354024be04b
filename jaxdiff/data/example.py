"""What every source of captioned pictures holds, and what a source is."""

from collections.abc import Iterator
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np


class Example(TypedDict):
    """What a source holds: an encoded picture (or uint8 array), its caption (None: missing) and a name for messages."""

    image: bytes | np.ndarray
    caption: str | None
    name: str


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of examples. It must pickle when worker processes are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def captions(source: Source) -> Iterator[str | None]:
    """The captions of a source, in order; that of a file that cannot be read is missing, as it is in training."""
    for index in range(len(source)):
        try:
            yield source[index]["caption"]
        except OSError:
            yield None

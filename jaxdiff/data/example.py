"""What every source of captioned pictures holds, and what a source is."""

import dataclasses
from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Captions(Sequence):
    """The captions of a source, in order; that of a file that cannot be read is missing, as it is in training."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str | None:
        if not 0 <= index < len(self):
            raise IndexError(f"caption {index} of {len(self)}")
        try:
            return self.source[index]["caption"]
        except OSError:
            return None


def captions(source: Source) -> Captions:
    """The captions of a source, read when they are asked for."""
    return Captions(source)

"""What every source of captioned images holds, and what a source is."""

import dataclasses
import warnings
from collections.abc import Sequence
from io import BufferedIOBase
from typing import NotRequired, Protocol, TypedDict, overload, runtime_checkable

import numpy as np

from jaxdiff.data.captions import Cleaned, clean
from jaxdiff.data.orders import Blocks


class Example(TypedDict):
    """What a source holds: an encoded image (or uint8 array), its caption (None: missing) and a name for messages.

    caption_fault: what was replaced in the caption, because no text can hold it; missing or None: nothing.
    """

    image: bytes | np.ndarray
    caption: str | None
    name: str
    caption_fault: NotRequired[str | None]


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of examples. It must pickle when worker processes are asked for.

    It may also have `open_image(index)` (see `open_image`), `blocks` (`orders.Blocks`), and `fingerprint()`: a text
    that changes with its files, by which what was read from them is kept (None: nothing to go by).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_image(source: Source, index: int) -> BufferedIOBase | bytes | np.ndarray:
    """What an example's header is read from: where the source can, its open file, of which the caller reads as little
    as it needs and closes it; otherwise the image. OSError where it cannot be opened."""
    opened = getattr(source, "open_image", None)
    return source[index]["image"] if opened is None else opened(index)


def blocks_of(source: Source) -> Blocks | None:
    """How the examples of a source are read together, where they are."""
    return getattr(source, "blocks", None)


def fingerprint_of(source: Source) -> str | None:
    """What changes with the files of a source, where it has something to go by."""
    fingerprint = getattr(source, "fingerprint", None)
    return None if fingerprint is None else fingerprint()


@dataclasses.dataclass(frozen=True)
class Captions(Sequence[str | None]):
    """The captions of a source, in order; that of a file that cannot be read is missing, as it is in training. Warns of
    those in which characters were replaced."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, index: int) -> str | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...

    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"caption {index} of {len(self)}")
        try:
            return caption_of(self.source[index])
        except OSError:
            return None


def caption_of(example: Example) -> str | None:
    """The caption. Warns where characters were replaced in it, and names the example."""
    text, fault = cleaned(example["caption"], example.get("caption_fault"))
    if fault is not None:
        warnings.warn(f"{example['name']}: {fault}", stacklevel=2)
    return text


def cleaned(caption: str | None, fault: str | None) -> Cleaned:
    """An example's caption and what was replaced in it, whether or not its source has cleaned it."""
    text, replaced = clean(caption)
    return Cleaned(text, fault or replaced)


def captions(source: Source) -> Captions:
    """The captions of a source, read when they are asked for."""
    return Captions(source)

"""The example format and the interface of a source of captioned images."""

import dataclasses
import warnings
from collections.abc import Sequence
from io import BufferedIOBase
from typing import NotRequired, Protocol, TypedDict, overload, runtime_checkable

import numpy as np

from jaxdiff.data.captions import Cleaned, clean
from jaxdiff.data.orders import Blocks


class Example(TypedDict):
    """An encoded image (or uint8 array), its caption (None: missing) and a name for messages.

    caption_fault: a description of characters replaced in the caption; missing or None: none.
    """

    image: bytes | np.ndarray
    caption: str | None
    name: str
    caption_fault: NotRequired[str | None]


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of examples. It must be picklable for worker processes.

    Optional members: `open_image(index)` (see `open_image`), `blocks` (`orders.Blocks`), and `fingerprint()`, a text
    that changes with its files and is the key of cached metadata (None: not cacheable).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_image(source: Source, index: int) -> BufferedIOBase | bytes | np.ndarray:
    """The input for reading an image header: an open file if the source supports it, which the caller closes; otherwise
    the image. OSError if it cannot be opened."""
    opened = getattr(source, "open_image", None)
    return source[index]["image"] if opened is None else opened(index)


def blocks_of(source: Source) -> Blocks | None:
    """The blocks in which a source reads its examples; None if it reads them one by one."""
    return getattr(source, "blocks", None)


def fingerprint_of(source: Source) -> str | None:
    """A text that changes with the files of a source; None if it has none."""
    fingerprint = getattr(source, "fingerprint", None)
    return None if fingerprint is None else fingerprint()


@dataclasses.dataclass(frozen=True)
class Captions(Sequence[str | None]):
    """The captions of a source, in order. An unreadable file counts as a missing caption, as in training. Warns of
    captions in which characters were replaced."""

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
    """The caption. Warns, naming the example, if characters were replaced in it."""
    text, fault = cleaned(example["caption"], example.get("caption_fault"))
    if fault is not None:
        warnings.warn(f"{example['name']}: {fault}", stacklevel=2)
    return text


def cleaned(caption: str | None, fault: str | None) -> Cleaned:
    """An example's cleaned caption and its fault, whether or not the source has cleaned it."""
    text, replaced = clean(caption)
    return Cleaned(text, fault or replaced)


def captions(source: Source) -> Captions:
    """The captions of a source, read lazily."""
    return Captions(source)

"""An example on its way from an input to a record, and why one is left out."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why something is left out: a kind to count by, and the detail.

    harmless: a good input may hold it too (the class of an image beside its caption): counted, no error under strict.
    """

    kind: str
    detail: str = ""
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


# Name, the image's bytes or what is wrong, caption.
Raw = tuple[str, bytes | Fault, str | None]

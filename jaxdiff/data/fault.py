"""Raw examples during conversion, and the reasons for skipping one."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why something is skipped: a kind to count by, and the detail.

    harmless: valid inputs may contain it (such as a class file beside a caption): counted, but no error under strict.
    """

    kind: str
    detail: str = ""
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


# Name, the image's bytes or a fault, caption.
Raw = tuple[str, bytes | Fault, str | None]

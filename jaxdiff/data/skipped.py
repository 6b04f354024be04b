"""What a pipeline leaves out, counted and named."""

import threading
import warnings
from collections import Counter
from collections.abc import Sequence

REPLACED = "replaced"
"""Of an example: what was replaced in its caption, as a line; empty: nothing."""
REJECTS = "rejects"
"""Of an example that takes the place of others: for each of them name, kind and reason, as under `rejected`."""


class Skipped:
    """The examples left out since this iterator was made, each counted once: `reasons` holds how many of each kind.

    within: of how many places in order each example has one, where that is not as many as there are examples.
    replaced: captions in which characters were replaced; those examples are used.
    """

    _LINES = 10

    def __init__(self, examples: int, strict: bool, within: int | None = None):
        self._within = examples if within is None else within
        self.reasons: Counter[str] = Counter()
        self.replaced = 0
        self._strict, self._examples = strict, examples
        self._names: set[str] = set()
        self._in_a_row = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def __str__(self) -> str:
        """`3 (2 unreadable, 1 no caption)`"""
        return f"{self.count} ({', '.join(f'{count} {kind}' for kind, count in self.reasons.most_common())})"

    def keep(self, example: dict) -> bool:
        """False for a reject, after counting it. Raises ValueError when strict, or when nothing else is left."""
        for rejected in example.pop(REJECTS, ()):
            self._reject(*rejected)
        if "rejected" not in example:
            self._in_a_row = 0
            self._note(example[REPLACED])
            return True
        self._reject(*example["rejected"])
        return False

    def leave_out(self, faults: Sequence[tuple[str, str]]) -> None:
        """Counts images of which not even the header could be read, each a name and a reason. Raises ValueError when
        strict."""
        for name, reason in faults:
            self._reject(name, "unreadable", reason)
        self._in_a_row = 0  # others have a header

    def _reject(self, name: str, kind: str, reason: str) -> None:
        line = f"{name}: {reason}"
        if self._strict:
            raise ValueError(f"{line} (strict)")
        with self._lock:
            self._in_a_row += 1
            # Twice the source, as a usable example may come first in one order of it and last in the next: beyond, it
            # would never end.
            if self._in_a_row >= 2 * self._within:
                raise ValueError(f"not one of the {self._examples} examples is usable; the last: {line}")
            if name not in self._names:
                self._names.add(name)
                self.reasons[kind] += 1
                self._warn(f"skipped {line}", self.count)

    def summary(self, total: int) -> str:
        """What was left out of `total` examples, or replaced, for people; empty where nothing was."""
        skipped = [f"skipped {self} of {total} examples"] if self.count else []
        return "; ".join(skipped + ([f"characters replaced in {self.replaced} captions"] if self.replaced else []))

    def _note(self, fault: str) -> None:
        if fault and self._strict:
            raise ValueError(f"{fault} (strict)")
        with self._lock:
            if fault and fault not in self._names:
                self._names.add(fault)
                self.replaced += 1
                self._warn(fault, self.replaced)

    def _warn(self, line: str, number: int) -> None:
        if number <= self._LINES:
            rest = "; further ones are only counted" if number == self._LINES else ""
            warnings.warn(f"{line}{rest}", stacklevel=2)

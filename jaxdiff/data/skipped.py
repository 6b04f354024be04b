"""Counts and names the examples that a pipeline skips."""

import threading
import warnings
from collections import Counter
from collections.abc import Sequence

REPLACED = "replaced"
"""Key of an example: a line about replaced characters in its caption; empty: none."""
REJECTS = "rejects"
"""Key of a replacement example: name, kind and reason of each example it replaces, as under `rejected`."""


class Skipped:
    """The examples skipped by an iterator, each counted once, by kind in `reasons`.

    within: a number of consecutive positions that contains every example; default: the number of examples.
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
        """False for a reject, which is counted. Raises ValueError if strict, or if no example is usable."""
        for rejected in example.pop(REJECTS, ()):
            self._reject(*rejected)
        if "rejected" not in example:
            self._in_a_row = 0
            self._note(example[REPLACED])
            return True
        self._reject(*example["rejected"])
        return False

    def leave_out(self, faults: Sequence[tuple[str, str]]) -> None:
        """Count images with unreadable headers, each a name and a reason. Raises ValueError if strict."""
        for name, reason in faults:
            self._reject(name, "unreadable", reason)
        self._in_a_row = 0  # other images have a header

    def _reject(self, name: str, kind: str, reason: str) -> None:
        line = f"{name}: {reason}"
        if self._strict:
            raise ValueError(f"{line} (strict)")
        with self._lock:
            self._in_a_row += 1
            # Two epochs, because a usable example may come first in one epoch and last in the next. Beyond that the
            # search would never end.
            if self._in_a_row >= 2 * self._within:
                raise ValueError(f"not one of the {self._examples} examples is usable; the last: {line}")
            if name not in self._names:
                self._names.add(name)
                self.reasons[kind] += 1
                self._warn(f"skipped {line}", self.count)

    def summary(self, total: int) -> str:
        """A summary of the skipped examples and replaced characters of `total` examples; empty if there are none."""
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

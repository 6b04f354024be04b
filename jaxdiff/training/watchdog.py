"""Reports a run without progress: the process, what it waits for, and the stacks of its threads."""

import faulthandler
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jaxdiff.training import multihost

COMPILES = 6
"""Factor on the time limits during compilation."""
WRITES = 5.0
"""Time limit in seconds for writing a report."""


class Watchdog:
    """A watchdog thread as a context manager; call `doing` at the start of each activity.

    after: seconds in one activity after which a line and the stacks of all threads are written to standard error and
    to `folder`/stall-PROCESS.txt; again after twice as long, and so on. 0: never.
    exit_after: seconds after which this process and all others of the run end. 0: never.
    """

    def __init__(self, folder: Path, after: float, exit_after: float = 0.0) -> None:
        self._path = folder / f"stall-{multihost.index()}.txt"
        self._after, self._exit_after = after, exit_after
        self._changed = threading.Condition()
        self._what, self._patience, self._since = "starting", COMPILES, time.monotonic()
        self._reported = 0.0  # seconds at the last report of this stall
        self._open = after > 0 or exit_after > 0

    def __enter__(self) -> "Watchdog":
        if self._open:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._open:
            with self._changed:
                self._open = False
                self._changed.notify()
            self._thread.join()

    def doing(self, what: str, compiles: bool = False) -> None:
        """Start an activity. what: its description, as in `process 0 stalled for 600 s in step 1`."""
        with self._changed:
            if self._reported:
                tell(f"{multihost.name()} resumed after {time.monotonic() - self._since:.0f} s {self._what}")
            patience = COMPILES if compiles else 1
            if patience < self._patience:
                self._changed.notify()  # the thread's current wait is too long
            self._what, self._patience = what, patience
            self._since, self._reported = time.monotonic(), 0.0

    def _watch(self) -> None:
        while self._open:
            with self._changed:  # not held while reporting: a hanging folder must not stop the run
                now, due, end = time.monotonic() - self._since, self._due(), self._exit_after * self._patience
                over, what = bool(end) and now >= end, self._what
                if not over and not (due and now >= due):
                    self._changed.wait(max(0.01, min(moment for moment in (due, end) if moment) - now))
                    continue
                self._reported = due
            if over:
                self._end(f"{multihost.name()} ends, having stalled for {now:.0f} s {what}")
            self._report(f"{multihost.name()} stalled for {now:.0f} s {what}")

    def _due(self) -> float:
        """Seconds until the next report; 0: never."""
        return 2 * self._reported if self._reported else self._after * self._patience

    def _report(self, line: str) -> None:
        stacks = _stacks()
        tell(f"{line}; the stacks of its threads, also in {self._path}:\n{stacks}")
        # In a thread, because the folder's file system may be what hangs.
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n{stacks}\n"
        writing = threading.Thread(target=self._write, args=(text,), daemon=True)
        writing.start()
        writing.join(WRITES)
        if writing.is_alive():
            tell(f"{self._path} is still not written after {WRITES:.0f} s")

    def _write(self, text: str) -> None:
        try:
            with self._path.open("a") as file:
                file.write(text)
        except OSError as error:
            tell(f"{self._path} cannot be written: {error.strerror}")

    def _end(self, line: str) -> None:
        self._report(line)
        multihost.end(multihost.BROKEN_OFF, f"error: {line}")
        multihost.leave(multihost.BROKEN_OFF, f"error: {line}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()

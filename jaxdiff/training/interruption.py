"""Being told to stop: SIGTERM (which is also how platforms announce a preemption) and SIGINT.

One process notes the signal and stops after the step that runs, or at once where it only waits: for data, for a
checkpoint to be read, between the pieces of a sample. Several agree by jax's preemption protocol on the step after
which all of them stop, whichever was told; one that only waits goes on, since the others may be in a step that needs
it.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental import multihost_utils

from jaxdiff.training import multihost

_c_signal = ctypes.CDLL(None).signal
_c_signal.restype, _c_signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_noted: int | None = None  # jax's own handler of SIGTERM, once several processes have joined


def unheard() -> None:
    """To be called when processes have joined: until a loop asks for it, SIGTERM ends a process as it does elsewhere.

    jax, which would only note it, is not asked while captions are embedded or data is drawn, and its handler is none of
    Python's, so that only C can put it aside and back.
    """
    global _noted
    _noted = _c_signal(signal.SIGTERM, None)


class Preempted(SystemExit):
    """The run was told to stop (SIGTERM, SIGINT) and has saved; a script that lets it pass exits with 75."""

    def __init__(self, message: str) -> None:
        super().__init__(75)
        self.message = message


class InterruptRequested(BaseException):
    """Raised by a signal where `Interruption.at_once` allows it; no `except Exception` on its way stops it."""


class Interruption:
    """Inside, SIGTERM and SIGINT are noted in place of acted on; a second SIGINT interrupts as usual."""

    def __enter__(self) -> "Interruption":
        self.name = ""  # of the signal, once there was one
        self._asked = 0  # how often `reached` was called: the same on all processes
        self._at_once = False
        self._several = multihost.count() > 1
        mine = threading.current_thread() is threading.main_thread()
        # With several processes SIGTERM is jax's: it begins the agreement.
        handlers = {signal.SIGINT: self._forward} if self._several else {}
        if not self._several:
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if self._several and _noted is not None:
            _c_signal(signal.SIGTERM, _noted)
        self._before = {number: signal.signal(number, handlers[number]) for number in handlers} if mine else {}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._several and _noted is not None:
            _c_signal(signal.SIGTERM, None)

    def reached(self) -> str:
        """The signal's name where the run is to stop here, otherwise nothing. To be asked after each step, and between
        the parts of what takes long; of several processes by all in the same order."""
        self._asked += 1  # jax takes it for the number of a step
        if self._several and multihost_utils.reached_preemption_sync_point(self._asked):
            return self.name or "a signal to one of the processes"
        return "" if self._several else self.name

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises InterruptRequested in place of being noted only, in a run of one process."""
        self._at_once = not self._several
        try:
            if self._at_once and self.name:
                raise InterruptRequested
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: Any) -> None:
        self.name = signal.Signals(number).name
        self._once_only(number)
        if self._at_once:
            self._at_once = False
            raise InterruptRequested

    def _forward(self, number: int, _: Any) -> None:
        self.name = signal.Signals(number).name
        self._once_only(number)
        os.kill(os.getpid(), signal.SIGTERM)

    def _once_only(self, number: int) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

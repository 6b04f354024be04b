"""Handling of SIGTERM (also sent by platforms on preemption) and SIGINT.

A single process records the signal and stops after the current step, or at once if it only waits: for data, for a
checkpoint to be read, between the chunks of a sample. Several processes use jax's preemption protocol to agree on the
step after which all stop, whichever received the signal; a waiting process continues, because the others may be in a
step that needs it.
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
_noted: int | None = None  # jax's SIGTERM handler, after several processes have joined


def unheard() -> None:
    """Call after processes have joined: outside the training loop, SIGTERM ends a process as usual.

    jax's handler would only record the signal, and it is not checked while captions are embedded or data is prepared.
    It is a C handler, so only C can remove and restore it.
    """
    global _noted
    _noted = _c_signal(signal.SIGTERM, None)


class Preempted(SystemExit):
    """The run received SIGTERM or SIGINT and has saved; a script that does not catch it exits with 75."""

    def __init__(self, message: str) -> None:
        super().__init__(75)
        self.message = message


class InterruptRequested(BaseException):
    """Raised by a signal inside `Interruption.at_once`; not caught by `except Exception`."""


class Interruption:
    """Context manager that records SIGTERM and SIGINT; a second SIGINT interrupts as usual."""

    def __enter__(self) -> "Interruption":
        self.name = ""  # of the received signal
        self._asked = 0  # calls of `reached`: equal on all processes
        self._at_once = False
        self._several = multihost.count() > 1
        mine = threading.current_thread() is threading.main_thread()
        # With several processes jax handles SIGTERM: it starts its preemption protocol.
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
        """The signal's name if the run has to stop here, otherwise empty. Call it after each step and within long
        operations; all processes must call it in the same order."""
        self._asked += 1  # jax uses it as the step number
        if self._several and multihost_utils.reached_preemption_sync_point(self._asked):
            return self.name or "a signal to one of the processes"
        return "" if self._several else self.name

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, in a single-process run, a signal raises InterruptRequested immediately."""
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

"""Failure propagation: if one process of a run fails, all others exit within seconds.

Otherwise a process that raises would wait minutes for the others at jax's exit, while they wait for it in a collective
that it never enters. So the first failure is published under one key in the key-value store of jax's coordination
service, which a thread in every process polls. A process that dies silently is detected by jax's heartbeats, or by the
error of a broken collective.
"""

import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from jaxdiff.core.errors import ProcessLostError
from jaxdiff.core.jax_internals import coordination, global_state
from jaxdiff.core.messages import reason

CRASHED = 70
"""Exit code after a bug in jaxdiff."""
BROKEN_OFF = 71
"""Exit code if other processes are lost or the run hangs: restart it."""
IN_USE = 73
"""Exit code if another run holds the folder: do not restart before that run has ended."""

_FAILED = "jaxdiff/failed"
_EVERY = 1.0  # polling interval in seconds
_PATIENCE = 5.0  # seconds that an exiting process waits for the others to read its failure
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS)\b")
_OURS_PERHAPS = re.compile(r"UNKNOWN|INTERNAL")  # errors of XLA or a driver have these too
_CONNECTION = re.compile(r"connection|socket|peer|heartbeat|coordination|gloo|timed? ?out", re.IGNORECASE)
_ENDING = threading.Lock()  # ensures that one thread ends the process


class PeerLostError(ProcessLostError):
    """Other processes of the run are lost or cannot be found. Not an input error: restart the run.

    unsure: the cause may also be an error of this process, so its traceback is shown.
    """

    def __init__(self, message: str, unsure: bool = False) -> None:
        super().__init__(message)
        self.unsure = unsure


class FolderInUseError(RuntimeError):
    """Another run holds the folder, or has taken it over."""


def count() -> int:
    """Number of processes of the run; available before any device is used."""
    return global_state.num_processes if global_state.client is not None else 1


def index() -> int:
    """Index of this process."""
    return global_state.process_id if global_state.client is not None else 0


def name() -> str:
    return f"process {index()} ({socket.gethostname()})"


def barrier(what: str, seconds: float) -> None:
    """Wait for all processes."""
    if count() > 1:
        with together():
            coordination().wait_at_barrier(f"jaxdiff/{what}", int(1000 * seconds))


def exchange(what: str, value: str, seconds: float) -> dict[str, str]:
    """The values of all processes by process index."""
    client, folder = coordination(), f"jaxdiff/{what}/"
    with together():
        client.key_value_set(f"{folder}{index()}", value, allow_overwrite=True)
        barrier(f"{what} given", seconds)
        values = {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(folder)}
        barrier(f"{what} read", seconds)  # before the next value is set
    return values


@contextmanager
def together() -> Iterator[None]:
    """Turn jaxlib's ValueError and RuntimeError for lost processes into PeerLostError."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        status = next((line for line in map(_first_line, _chain(error)) if _STATUS.match(line)), None)
        if count() == 1 or status is None or isinstance(error, PeerLostError):
            raise
        if _OURS_PERHAPS.match(status) and not _CONNECTION.search(status):
            raise PeerLostError(f"another process is gone, or it is this: {status}", unsure=True) from error
        raise PeerLostError(f"another process is gone: {status}") from error


def watch() -> None:
    """Watch for failures of other processes in a thread; publish uncaught exceptions of this one."""
    threading.Thread(target=_watch, name="peers", daemon=True).start()
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, Exception):
            fail(error)
        before(kind, error, trace)

    sys.excepthook = hook


def outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a script for an error: 2 and a line for bad input, BROKEN_OFF and a line for lost
    processes, IN_USE and a line for another run's folder, otherwise CRASHED and the traceback."""
    if isinstance(error, FolderInUseError):
        return IN_USE, f"error: {_flat(error)}"
    if isinstance(error, ValueError | OSError):
        return 2, f"error: {_flat(error)}"
    if isinstance(error, PeerLostError):
        return BROKEN_OFF, (_traceback(error.__cause__) + "\n") * error.unsure + f"error: {_flat(error)}"
    if isinstance(error, ProcessLostError):
        return BROKEN_OFF, f"error: {_flat(error)}"
    return CRASHED, _traceback(error)


def end(code: int, text: str, patience: float = 0.0) -> None:
    """Print `text` on standard error and exit; all other processes exit with the same code. A no-op for a single
    process.

    If another process failed first, only that is reported, because it caused this failure. patience: seconds to wait
    for such a report.
    """
    if count() == 1:
        return
    deadline = time.monotonic() + patience
    while (failure := _failure()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if failure is None and _publish(code):
        leave(code, text)
    _follow(_failure() or {"code": code, "who": "another process"})


def fail(error: BaseException) -> None:
    """`end` with the outcome of an error; for PeerLostError, wait a moment for the report of the cause."""
    end(*outcome(error), 3 * _EVERY if isinstance(error, PeerLostError) else 0.0)


def end_soon(error: BaseException) -> None:
    """`fail` after a few seconds at the latest, because cleanup may wait forever for lost processes."""
    if isinstance(error, PeerLostError):
        fail(error)
    if count() > 1:
        timer = threading.Timer(_PATIENCE, fail, (error,))
        timer.daemon = True
        timer.start()


def leave(code: int, text: str) -> NoReturn:
    """Print `text`, give the others a moment to follow, and exit without further cleanup."""
    _ENDING.acquire()
    print(text, file=sys.stderr, flush=True)
    client = global_state.client
    if client is not None and count() > 1:
        with suppress(Exception):
            client.wait_at_barrier("jaxdiff/left", int(1000 * _PATIENCE))
        if index() == 0:
            time.sleep(_EVERY)  # the others still use its coordination service
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(code)


def lose_contact() -> NoReturn:
    """Exit at once with BROKEN_OFF. Called in a jax thread on lost processes, so it must not call jax."""
    if not _ENDING.acquire(blocking=False):
        time.sleep(3 * _PATIENCE)  # this process is already exiting with another code
    line = f"error: {name()}: another process is gone: it was killed, hangs or is out of reach; start again to go on\n"
    os.write(2, line.encode())
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(BROKEN_OFF)


def _watch() -> None:
    while global_state.client is not None:
        failure = _failure()
        if failure is not None and failure["process"] != index():
            _follow(failure)
        time.sleep(_EVERY)


def _follow(failure: dict[str, Any]) -> NoReturn:
    leave(failure["code"], f"{name()}: stopped, because {failure['who']} failed")


def _publish(code: int) -> bool:
    """Publish a failure; whether this process is the first to fail."""
    message = json.dumps({"process": index(), "who": name(), "code": code})
    try:
        coordination().key_value_set(_FAILED, message)
    except Exception:  # already published, or the service is gone with process 0
        return _failure() is None
    return True


def _failure() -> dict[str, Any] | None:
    """The published failure of the first process."""
    try:
        return json.loads(coordination().key_value_try_get(_FAILED))
    except Exception:  # nothing published, or the service is gone, which jax's heartbeats detect
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _traceback(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _flat(error: BaseException) -> str:
    return reason(error, most=4000)

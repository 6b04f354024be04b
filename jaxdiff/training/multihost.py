"""The processes of one run share its fate: where one fails, all others learn it within seconds, and end.

Without this, a process that raises waits minutes for the others at jax's exit, and they wait for it in a collective
that it never enters. So a failure is published in the key-value store of jax's coordination service, under one key that
the first to fail gets; every process has a thread that looks there. A process that dies silently is noticed by jax's
heartbeats, and where that breaks a collective, by the error of that collective.
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
"""Exit code of a process that a bug of ours ended."""
BROKEN_OFF = 71
"""Exit code where other processes are gone or nothing moves any more: worth starting again."""
IN_USE = 73
"""Exit code where another run has the folder: not to be started again before that one has ended."""

_FAILED = "jaxdiff/failed"
_EVERY = 1.0  # seconds between looks
_PATIENCE = 5.0  # seconds that a process which ends waits for the others to have seen why
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS)\b")
_OURS_PERHAPS = re.compile(r"UNKNOWN|INTERNAL")  # what breaks in XLA or a driver has these too
_CONNECTION = re.compile(r"connection|socket|peer|heartbeat|coordination|gloo|timed? ?out", re.IGNORECASE)
_ENDING = threading.Lock()  # of the threads that want to end this process, one does


class PeerLostError(ProcessLostError):
    """Other processes of the run are gone or cannot be found: no bad input, and worth starting again.

    unsure: what it came of may as well be an error of this process, and is shown.
    """

    def __init__(self, message: str, unsure: bool = False) -> None:
        super().__init__(message)
        self.unsure = unsure


class FolderInUseError(RuntimeError):
    """Another run writes to the folder, or has taken it over."""


def count() -> int:
    """Processes of the run, known before any device is used."""
    return global_state.num_processes if global_state.client is not None else 1


def index() -> int:
    """Which of them this is."""
    return global_state.process_id if global_state.client is not None else 0


def name() -> str:
    return f"process {index()} ({socket.gethostname()})"


def barrier(what: str, seconds: float) -> None:
    """Wait until every process is here."""
    if count() > 1:
        with together():
            coordination().wait_at_barrier(f"jaxdiff/{what}", int(1000 * seconds))


def exchange(what: str, value: str, seconds: float) -> dict[str, str]:
    """Everyone's value by the number of the process, once all have given theirs."""
    client, folder = coordination(), f"jaxdiff/{what}/"
    with together():
        client.key_value_set(f"{folder}{index()}", value, allow_overwrite=True)
        barrier(f"{what} given", seconds)
        values = {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(folder)}
        barrier(f"{what} read", seconds)  # nobody gives the next value before
    return values


@contextmanager
def together() -> Iterator[None]:
    """What fails inside because others are gone raises Lost; jaxlib raises ValueError and RuntimeError for it."""
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
    """Look out for others that fail, in a thread; an exception that nothing catches here is shown and published."""
    threading.Thread(target=_watch, name="peers", daemon=True).start()
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, Exception):
            fail(error)
        before(kind, error, trace)

    sys.excepthook = hook


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of a script that this error ends, and what it says: 2 and a line for bad input, BROKEN_OFF and a
    line where other processes are gone, IN_USE and a line for another run's folder, otherwise CRASHED and the traceback
    of a bug of ours."""
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
    """Say `text` on standard error, have all other processes end with the same code, and end. Returns, having done
    nothing, where there are no others.

    Where another failed first, this one only says so: its own failure came of that. `patience`: seconds to wait for a
    culprit to be known.
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
    """The same with what this error means; where it is that others are gone, the culprit gets a moment to be known."""
    end(*outcome(error), 3 * _EVERY if isinstance(error, PeerLostError) else 0.0)


def end_soon(error: BaseException) -> None:
    """The same, at the latest in some seconds: leaving may itself wait for others, and for ever where they are gone."""
    if isinstance(error, PeerLostError):
        fail(error)
    if count() > 1:
        timer = threading.Timer(_PATIENCE, fail, (error,))
        timer.daemon = True
        timer.start()


def leave(code: int, text: str) -> NoReturn:
    """Say `text`, wait a moment for the others to follow, and end at once: nothing else is waited for."""
    _ENDING.acquire()
    print(text, file=sys.stderr, flush=True)
    client = global_state.client
    if client is not None and count() > 1:
        with suppress(Exception):
            client.wait_at_barrier("jaxdiff/left", int(1000 * _PATIENCE))
        if index() == 0:
            time.sleep(_EVERY)  # its coordination service is what the others still talk to
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(code)


def lose_contact() -> NoReturn:
    """End at once with BROKEN_OFF. For a thread of jax that finds others gone: it must not call anything of jax."""
    if not _ENDING.acquire(blocking=False):
        time.sleep(3 * _PATIENCE)  # this process is ending already, with another code
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
    """Whether this process is the first to fail."""
    message = json.dumps({"process": index(), "who": name(), "code": code})
    try:
        coordination().key_value_set(_FAILED, message)
    except Exception:  # it is there already; or the service is gone, with process 0
        return _failure() is None
    return True


def _failure() -> dict[str, Any] | None:
    """What the first process to fail has published."""
    try:
        return json.loads(coordination().key_value_try_get(_FAILED))
    except Exception:  # nothing is there, or the service is gone: jax's heartbeats judge that
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

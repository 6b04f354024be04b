"""Exit with `multihost.BROKEN_OFF` if jax's coordination service detects lost processes.

By default jaxlib aborts the process: exit code 134 and a C++ stack trace, as for a bug. It accepts a callback, but
cannot convert its status into an argument of a Python callback (jaxlib 0.10.1 to 0.12.0) and throws std::bad_cast in a
thread without a handler. So the callback is set, for versions that can call it, and the C++ terminate handler is
replaced for this exception only. If the C++ runtime is not found, jaxlib aborts as before, and the scripts in
tpu_scripts/ treat 134 like 71.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from jaxdiff.core.jax_internals import jaxlib_module
from jaxdiff.training import multihost

_RUNTIMES = ("libstdc++.so.6", "libc++.so.1", "libc++abi.dylib")
_BAD_CAST = b"St8bad_cast"  # the mangled name of the type


@contextmanager
def ends_this_process() -> Iterator[None]:
    """Join other processes inside this block: it applies to the distributed client created inside."""
    make = jaxlib_module.get_distributed_runtime_client
    jaxlib_module.get_distributed_runtime_client = functools.partial(
        make, missed_heartbeat_callback=lambda *_: multihost.lose_contact()
    )
    try:
        runtime = _runtime()
        if runtime is not None:
            _default_handler(runtime)  # cached before it is replaced
            runtime._ZSt13set_terminatePFvvE(ctypes.cast(_terminate, ctypes.c_void_p))
        yield
    finally:
        jaxlib_module.get_distributed_runtime_client = make


@ctypes.CFUNCTYPE(None)
def _terminate() -> None:
    """Called by the C++ runtime in the thread of an uncaught exception."""
    runtime = _runtime()
    assert runtime is not None  # it called this function
    kind = runtime.__cxa_current_exception_type()
    # A type_info: the vtable pointer and the name pointer.
    name = ctypes.cast(kind, ctypes.POINTER(ctypes.c_char_p))[1] if kind else b""
    if name == _BAD_CAST:
        multihost.lose_contact()
    ctypes.CFUNCTYPE(None)(_default_handler(runtime))()


@functools.cache
def _runtime() -> ctypes.CDLL | None:
    """The C++ runtime that jaxlib uses."""
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name)
            runtime._ZSt13set_terminatePFvvE.argtypes = [ctypes.c_void_p]
            runtime._ZSt13get_terminatev.restype = ctypes.c_void_p
            runtime.__cxa_current_exception_type.restype = ctypes.c_void_p
        except (OSError, AttributeError):
            continue
        return runtime
    return None


@functools.cache
def _default_handler(runtime: ctypes.CDLL) -> int:
    return runtime._ZSt13get_terminatev()

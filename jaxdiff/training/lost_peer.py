"""Where jax's coordination service finds that other processes are gone, this one ends with `multihost.BROKEN_OFF`.

By itself jaxlib aborts the process then: exit code 134 and a stack of C++, as for a bug. It accepts a callback, but
cannot convert its own status into an argument for one that is written in Python (jaxlib 0.10.1 to 0.12.0): it throws
std::bad_cast in a thread that catches nothing. So the callback is given, for versions that can call it, and the C++
handler for exceptions that nothing catches is replaced, for this exception alone. Where the C++ runtime is not found,
jaxlib aborts as before, and the scripts in tpu_scripts/ take 134 as 71.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from jaxdiff.core.jax_internals import jaxlib_module
from jaxdiff.training import multihost

_RUNTIMES = ("libstdc++.so.6", "libc++.so.1", "libc++abi.dylib")
_BAD_CAST = b"St8bad_cast"  # the name that the ABI of C++ gives the type


@contextmanager
def ends_this_process() -> Iterator[None]:
    """To join other processes in: what is said above holds for the client that is made inside."""
    make = jaxlib_module.get_distributed_runtime_client
    jaxlib_module.get_distributed_runtime_client = functools.partial(
        make, missed_heartbeat_callback=lambda *_: multihost.lose_contact()
    )
    try:
        runtime = _runtime()
        if runtime is not None:
            _default_handler(runtime)  # asked for before it is replaced
            runtime._ZSt13set_terminatePFvvE(ctypes.cast(_terminate, ctypes.c_void_p))
        yield
    finally:
        jaxlib_module.get_distributed_runtime_client = make


@ctypes.CFUNCTYPE(None)
def _terminate() -> None:
    """Called by the C++ runtime, in the thread whose exception nothing has caught."""
    runtime = _runtime()
    assert runtime is not None  # it has called this
    kind = runtime.__cxa_current_exception_type()
    # A type_info: the address of its functions, and that of its name.
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

"""How a process ends whose jax finds that others are gone: with 71 and one line, and other aborts as ever."""

import signal
import subprocess
import sys

import pytest
from jax._src.lib import _jax

from jaxdiff.training import lost_peer, multihost

THROWS = """
import ctypes, sys
from jaxdiff.training import lost_peer
with lost_peer.ends_this_process():
    pass
getattr(ctypes.CDLL("libstdc++.so.6"), sys.argv[1])()
"""


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("_ZSt16__throw_bad_castv", 71, ""),
        ("_ZSt17__throw_bad_allocv", -signal.SIGABRT, "what():  std::bad_alloc"),
        ("abort", -signal.SIGABRT, ""),
    ],
)
def test_the_exception_of_a_lost_peer_alone_is_taken_for_one(function, code, words):
    done = subprocess.run([sys.executable, "-c", THROWS, function], capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    if code == 71:
        assert done.stderr.count("\n") == 1 and "another process is gone" in done.stderr
    else:
        assert words in done.stderr and "another process is gone" not in done.stderr


def test_a_jaxlib_that_can_call_back_is_answered(monkeypatch):
    made, ended = [], []
    monkeypatch.setattr(_jax, "get_distributed_runtime_client", lambda *_, **given: made.append(given))
    monkeypatch.setattr(multihost, "lose_contact", lambda: ended.append(1))
    with lost_peer.ends_this_process():
        _jax.get_distributed_runtime_client("address", 0, heartbeat_timeout=5)
    made[0]["missed_heartbeat_callback"]("UNAVAILABLE: a task is gone")
    assert ended == [1] and made[0]["heartbeat_timeout"] == 5
    _jax.get_distributed_runtime_client()
    assert made[1] == {}  # outside it is jax's own


def test_without_the_runtime_jaxlib_ends_the_process_as_before(monkeypatch):
    monkeypatch.setattr(lost_peer, "_RUNTIMES", ("libabsent.so.1",))
    lost_peer._runtime.cache_clear()
    try:
        with lost_peer.ends_this_process():
            assert lost_peer._runtime() is None
    finally:
        lost_peer._runtime.cache_clear()

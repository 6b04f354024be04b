"""Several real processes of one script, as on several hosts: joined over gloo, each with CPU devices of its own.

    with Processes([sys.executable, script, out], count=2) as processes:
        processes[1].send_signal(signal.SIGKILL)
        codes = processes.wait(60)  # whoever has not ended by then is killed, and TimeoutError raised

A script of the tests joins the others by calling `join()` before it uses a device; a command of ours gets `flags` for
that in place of the environment.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import forked

_VARIABLE = "TESTS_JOIN"  # "address count index", for `join`
ROOT = Path(__file__).parents[2]


class Processes:
    """`count` processes of `command`, on a free port of this machine; a context manager that leaves none running.

    devices: virtual CPU devices of each. flags: each command gets `--coordinator`, `--processes` and `--process` at its
    end, and not `join`'s environment variable. environment: further variables.
    """

    def __init__(
        self,
        command: Sequence[Any],
        count: int,
        *,
        devices: int = 1,
        flags: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = TemporaryDirectory()
        address = f"127.0.0.1:{free_port()}"
        self._children = []
        for index in range(count):
            own = {_VARIABLE: f"{address} {count} {index}"} if not flags else {}
            more = ["--coordinator", address, "--processes", count, "--process", index] if flags else []
            child = forked.start(
                [str(word) for word in [*command, *more]],
                cwd=ROOT,
                env=_environment(devices) | own | dict(environment or {}),
                out=self._file(index, "out"),
                err=self._file(index, "err"),
            )
            self._children.append(child)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: Any) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
        self._folder.cleanup()

    def __getitem__(self, index: int) -> "forked.Child | subprocess.Popen[bytes]":
        return self._children[index]

    def __len__(self) -> int:
        return len(self._children)

    def out(self, index: int) -> str:
        """What the process has written to standard output so far; nothing before it has opened its file."""
        path = self._file(index, "out")
        return path.read_text(errors="replace") if path.exists() else ""

    def err(self, index: int) -> str:
        """The same of standard error."""
        return self._file(index, "err").read_text(errors="replace")

    def wait(self, seconds: float) -> list[int]:
        """The exit codes, -9 for one killed. TimeoutError, with everyone's last words, where one has not ended."""
        deadline = time.monotonic() + seconds
        while any(child.poll() is None for child in self._children):
            if time.monotonic() > deadline:
                late = [index for index, child in enumerate(self._children) if child.poll() is None]
                said = self.words()
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"processes {late} have not ended after {seconds} s\n{said}")
            time.sleep(0.05)
        return [child.returncode for child in self._children]

    def until(self, condition: Any, seconds: float = 120) -> None:
        """Wait until `condition()` is true. AssertionError where a process ends before, or the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [index for index, child in enumerate(self._children) if child.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"ended: {ended}, waited in vain\n{self.words()}")
            time.sleep(0.05)

    def kill(self, which: int) -> None:
        """Send every process that still runs this signal; the first one last, whose end ends the others."""
        for child in reversed(self._children):
            if child.poll() is None:
                child.send_signal(which)

    def words(self) -> str:
        """The last that every process has said, for messages."""
        return "\n".join(
            f"--- process {index} {name}:\n{text[-3000:]}"
            for index in range(len(self))
            for name, text in (("out", self.out(index)), ("err", self.err(index)))
            if text
        )

    def _file(self, index: int, name: str) -> Path:
        return Path(self._folder.name) / f"{index}.{name}"


def join(heartbeat: int = 10) -> int:
    """Called by a script before it uses a device: join the processes that `Processes` started with it, if it did.

    Returns how many they are.
    """
    from jaxdiff.training.distributed import Cluster, start

    sys.modules.setdefault("torch", None)  # as in `forked`
    if _VARIABLE not in os.environ:
        return 1
    address, count, index = os.environ[_VARIABLE].split()
    return start(Cluster("auto", address, int(count), int(index), heartbeat=heartbeat))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(devices: int) -> dict[str, str]:
    """This process's, with CPU devices and collectives between processes, and our own code before any installed."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }

"""Python processes that begin with our libraries imported: forked from one process that has done nothing else.

    child = start([sys.executable, script, argument], cwd=folder, env=variables, out=file, err=file)

Imports are most of what a short process costs. All else is a process's own: its environment, devices, folder, streams,
signals, exit code, the interpreter's end. What is forked has no thread and no device yet; XLA reads its flags when it
makes a device. On Linux alone: elsewhere it is `subprocess`.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = ("jaxdiff.training.loop", "experiments.cli", "matplotlib.backends.backend_agg", "tensorboardX")
READ_LATER = ("XLA_FLAGS", "TESTS_JOIN", "PYTEST_CURRENT_TEST")
"""Variables in which the children of one parent may differ."""


def start(
    command: Sequence[str], cwd: Path, env: dict[str, str], out: Path, err: Path
) -> "subprocess.Popen[bytes] | Child":
    """Begin a Python command, `[sys.executable, script, ...]` or `[sys.executable, "-c", code, ...]`."""
    if sys.platform == "linux" and command[0] == sys.executable:
        key = _key(env)
        if key not in _parents:
            _parents[key] = _Parent(env)
        streams = [str(out), str(err)]
        return Child(_parents[key], {"command": command[1:], "cwd": str(cwd), "env": env, "streams": streams})
    with out.open("w") as stdout, err.open("w") as stderr:
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


class Child:
    """What tests use of `subprocess.Popen`."""

    def __init__(self, parent: "_Parent", request: dict[str, Any]) -> None:
        self._parent = parent
        self.returncode: int | None = None
        self.pid: int = parent.ask(request)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, which: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, which)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that imports and forks. It answers one line with one line, and ends with this process."""

    def __init__(self, env: dict[str, str]) -> None:
        env = env | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's threads would not be there after a fork
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._end)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _end(self) -> None:
        self._process.communicate()


_parents: dict[str, _Parent] = {}


def _key(env: dict[str, str]) -> str:
    return json.dumps({name: value for name, value in sorted(env.items()) if name not in READ_LATER})


def _serve() -> dict[str, Any] | None:
    """Fork whenever told to. Returns what to run, in each child, and None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def _run(request: dict[str, Any]) -> None:
    """Become what was asked for, as if the interpreter had just begun with it."""
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in request["streams"])]
    ):
        file = os.open(name, flags, 0o666)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    first, *sys.argv[1:] = request["command"]
    if first == "-c":
        code, *_ = sys.argv[1:]
        del sys.argv[1]
        sys.argv[0], sys.path[0] = "-c", ""
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv[0], sys.path[0] = first, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    sys.modules["torch"] = None  # type: ignore[assignment]  # TensorBoard's writer would import it, which takes seconds
    for _name in IMPORTED:
        __import__(_name)
    del sys.modules["torch"]
    assert len(os.listdir("/proc/self/task")) == 1, "a thread, which a fork would not have"
    if _request := _serve():
        _run(_request)

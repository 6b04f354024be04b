"""A cloud of folders: stand-ins for gcloud, git, sleep and tail, and workers that really run what they are told.

The stand-in for gcloud keeps its state in a folder. Each queued resource lives through the states that the test wrote
into `lives` (one line a creation, one word a look; the last one stays), until a file `taken` says that its machines are
gone; what the test writes into `then` becomes `taken` when a worker has told the code of a run. A worker is a folder,
home of the shell that runs the command of `ssh`; scp copies into it.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ENV = {
    "TPU_NAME": "pod",
    "TPU_ZONE": "us-east1-a",
    "TPU_TYPE": "v5litepod-8",
    "TPU_VERSION": "v2",
    "TPU_POLL_SECONDS": "0.05",
}

GCLOUD = r"""#!PYTHON -SE
# It is started hundreds of times: no imports that take time.
import os, sys

words, cloud = sys.argv[1:], os.environ["CLOUD"]
exists = lambda name: os.path.exists(f"{cloud}/{name}")


def text(name):
    with open(f"{cloud}/{name}") as file:
        return file.read()


def put(name, text, mode="w"):
    with open(f"{cloud}/{name}", mode) as file:
        file.write(text)


def copy(source, target):
    with open(source, "rb") as read, open(target, "wb", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
        file.write(read.read())


def value(flag):
    return next((word.split("=", 1)[1] for word in words if word.startswith(flag + "=")), None)


def state():
    if not exists("request"):
        return ""
    if exists("taken"):
        return text("taken").strip().replace("ABSENT", "")
    first, *left = text("request").split()
    put("request", " ".join(left or [first]))
    return first


def homes(node):
    homes = [f"{cloud}/machines/{node}/{index}" for index in range(int(text("workers")))]
    for home in homes:
        if not os.path.exists(f"{home}/.local/bin/uv"):
            os.makedirs(f"{home}/.local/bin", exist_ok=True)
            copy(f"{cloud}/uv", f"{home}/.local/bin/uv")
    return homes


def ssh(node):
    started = []
    for index, home in enumerate(homes(node)):
        environment = {name: os.environ[name] for name in ("PATH", "CLOUD")}
        environment |= {"HOME": home, "HOSTNAME": f"t1v-n-12ab-w-{index}", "WORKER": str(index)}
        gone = exists("unreachable") and text("unreachable") == f"{node}/{index}"
        command = "echo ssh: no route to host >&2; exit 255" if gone else value("--command")
        os.chdir(home)
        started.append(os.posix_spawn("/bin/bash", ["bash", "-c", command], environment))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    return next((code for code in codes if code), 0)


put("calls", "\0".join(words) + "\0\n", "a")
if exists("fails"):  # "verb code times file": fails so often, once the file is there
    failing, code, times, there = text("fails").split()
    if failing in words and exists(there):
        put("fails", f"{failing} {code} {int(times) - 1} {there}")
        if int(times) == 1:
            os.unlink(f"{cloud}/fails")
        sys.exit(int(code))
kind, verb = words[2:4] if words[0] == "compute" else ("", "")
if kind == "queued-resources" and verb == "list":
    print(state())
elif kind == "queued-resources" and verb == "create":
    if exists("request"):
        sys.exit("ERROR: ALREADY_EXISTS")
    first, *lives = text("lives").split("\n")
    put("lives", "\n".join(lives or [first]))
    put("request", first)
    nodes = [f"{words[4]}-{i}" for i in range(int(value("--node-count") or 0))] or [words[4]]
    put("nodes", " ".join(nodes))
elif kind == "queued-resources" and verb == "describe":
    print("state:\n  failedData:\n    error:\n      message: no capacity left")
elif kind == "queued-resources" and verb == "delete":
    if not exists("request"):
        sys.exit("ERROR: NOT_FOUND")
    os.system(f"cd '{cloud}' && rm -rf request taken machines nodes")
elif kind == "tpu-vm" and verb == "delete":
    os.unlink(f"{cloud}/nodes")
elif kind == "tpu-vm" and verb == "list":
    states = text("node_state").split() if exists("node_state") else ["READY"]  # of each; the last of all that follow
    for index, node in enumerate(text("nodes").split() if exists("nodes") else []):
        if states[min(index, len(states) - 1)] != "ABSENT":
            print(node, states[min(index, len(states) - 1)], sep="\t")
elif kind == "tpu-vm" and verb == "ssh":
    code = "ERROR: TPU is in state PREEMPTED" if exists("taken") else ssh(words[4])
    if "worker.sh code" in value("--command") and exists("then"):
        os.rename(f"{cloud}/then", f"{cloud}/taken")
    sys.exit(code)
elif kind == "tpu-vm" and verb == "scp":
    node, name = words[5].split(":")
    for home in homes(node):
        copy(words[4], f"{home}/{name}")
"""

# Does for `git archive` what matters here: the scripts as they are now.
GIT = """#!/usr/bin/env bash
case $3 in
  archive) tar -czf "${5#--output=}" -C "$2" tpu_scripts && echo "git $*" >> "$CLOUD/others" ;;
esac
"""
SLEEP = """#!/bin/sh
echo "$1" >> "$CLOUD/slept"
exec REAL 0.05
"""
# As late as the test says.
DATE = """#!/bin/sh
if [ "$1" = +%s ] && read -r later 2>/dev/null < "$CLOUD/later"; then
  echo $(($(REAL +%s) + later))
else
  exec REAL "$@"
fi
"""
# Looks as often as the stand-in for sleep lets others look.
TAIL = """#!/bin/sh
if [ "$4 $5" = "-s 0.2" ]; then
  exec REAL "$1" "$2" "$3" -s 0.03 "$6" "$7"
fi
exec REAL "$@"
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >> "$CLOUD/others"
if [[ $1 == venv ]]; then
  mkdir -p .venv/bin
  printf '%s\\n' '#!/usr/bin/env bash' 'echo "$*"' 'code=$(cat "$CLOUD/smoke.$SLICE.$WORKER" 2>/dev/null)' \
    'echo "smoke says ${code:-0}" >&2' 'exit ${code:-0}' > .venv/bin/python
  chmod +x .venv/bin/python
fi
"""


class Cloud:
    def __init__(self, folder):
        self.folder, self.bin, self.env = folder / "cloud", folder / "bin", folder / "tpu.env"
        self.folder.mkdir()
        self.bin.mkdir()
        self.logs = folder / "logs"
        stand_ins = {
            "gcloud": GCLOUD.replace("PYTHON", sys.executable),
            "git": GIT,
            "sleep": SLEEP.replace("REAL", shutil.which("sleep")),
            "tail": TAIL.replace("REAL", shutil.which("tail")),
            "date": DATE.replace("REAL", shutil.which("date")),
            "python3": "#!/bin/sh\n",
            "../cloud/uv": UV,
        }
        for name, text in stand_ins.items():
            self.program(name, text)
        self.put("workers", "2")
        self.put("lives", "ACTIVE")
        self.settings()

    def program(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def put(self, name, text):
        (self.folder / name).write_text(text)

    def text(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def settings(self, **settings):
        values = ENV | {"TPU_LOGS": str(self.logs), "TPU_POLL_SECONDS": "0.05"} | settings
        self.env.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()))

    def environment(self, **more):
        path = f"{self.bin}:{os.environ['PATH']}"
        return {"PATH": path, "CLOUD": str(self.folder), "TPU_ENV": str(self.env), "HOME": str(self.folder)} | more

    def calls(self):
        """gcloud's arguments, call by call, since the last time that this was asked."""
        calls = [call.split("\0") for call in self.text("calls").split("\0\n")[:-1]]
        self.put("calls", "")
        return calls

    def verbs(self):
        """What gcloud was told to do, without looking: create, scp, ssh, delete."""
        return [call[3] for call in self.calls() if call[3] not in ("list", "describe")]

    def command(self, script, arguments):
        return [str(SCRIPTS / script) if "." in script else str(SCRIPTS / f"{script}.sh"), *arguments]

    def start(self, script, *arguments, **environment):
        return subprocess.Popen(
            self.command(script, arguments),
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __call__(self, script, *arguments, typed="", **environment):
        return subprocess.run(
            self.command(script, arguments),
            input=typed,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ready(self):
        """A pod of one slice that is there and set up."""
        self.put("request", "ACTIVE")
        self.put("nodes", "pod")
        for index in range(int(self.text("workers"))):
            scripts = self.folder / f"machines/pod/{index}/jaxdiff/tpu_scripts"
            scripts.mkdir(parents=True)
            shutil.copy(SCRIPTS / "worker.sh", scripts)


@pytest.fixture
def cloud(tmp_path):
    if shutil.which("flock") is None:
        pytest.skip("the workers' script is for Linux")
    return Cloud(tmp_path)

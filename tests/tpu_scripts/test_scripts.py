"""The TPU scripts against a stand-in for gcloud that records how it was called."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
NAMES = ["create", "setup", "run", "delete"]
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
exit "${GCLOUD_EXIT:-0}"
"""
SETTINGS = {"TPU_NAME": "pod", "TPU_ZONE": "us-east1-a", "TPU_TYPE": "v5litepod-8", "TPU_VERSION": "v2", "TPU_SPOT": ""}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are bash")


@pytest.fixture
def shell(tmp_path):
    """run(script, *arguments) → the finished process, with `calls`: gcloud's arguments, call by call."""
    bin = tmp_path / "bin"
    bin.mkdir()
    gcloud = bin / "gcloud"
    gcloud.write_text(RECORD)
    gcloud.chmod(0o755)
    calls, env = tmp_path / "calls", tmp_path / "tpu.env"

    def run(script, *arguments, settings=None, typed="", **environment):
        values = SETTINGS | (settings or {})
        env.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()))
        calls.write_bytes(b"")
        environment = {"PATH": f"{bin}:{os.environ['PATH']}", "CALLS": str(calls), "TPU_ENV": str(env)} | environment
        done = subprocess.run(
            [str(SCRIPTS / f"{script}.sh"), *arguments], input=typed, env=environment, capture_output=True, text=True
        )
        done.calls = [call.split("\0") for call in calls.read_text().split("\0\n")[:-1]]
        return done

    return run


def printed(done):
    """The commands that a script printed, as the shell would read them."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("name", NAMES)
def test_help(shell, name):
    done = shell(name, "--help", TPU_ENV="/nowhere")
    assert done.returncode == 0 and not done.calls
    assert f"tpu_scripts/{name}.sh" in done.stdout and "--dry-run" in done.stdout
    assert "#!" not in done.stdout and "pipefail" not in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_what_a_run_calls(shell, name):
    rest = ["--", "python", "-c", "print('a  b', \"$HOME\")"] if name == "run" else []
    dry = shell(name, "--dry-run", *rest)
    assert dry.returncode == 0 and not dry.calls
    real = shell(name, *rest, typed="pod\n")
    assert real.returncode == 0, real.stderr
    assert printed(dry)
    wet = [command for command in printed(real) if command[0] == "gcloud"]
    assert [command[1:] for command in wet] == real.calls

    def settled(commands):  # but for the temporary folder's name
        return [[word for word in command if "jaxdiff.tar.gz" not in word] for command in commands]

    assert settled(printed(dry)) == settled(printed(real))


def test_create(shell):
    (call,) = shell("create").calls
    assert call[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
    assert set(call[5:]) == {"--zone=us-east1-a", "--accelerator-type=v5litepod-8", "--version=v2"}
    (call,) = shell("create", settings={"TPU_SPOT": "true", "TPU_PROJECT": "mine"}).calls
    assert {"--spot", "--project=mine"} < set(call)


def test_setup_copies_the_commit_then_installs_it(shell):
    done = shell("setup")
    copy, install, check = done.calls
    assert copy[3] == "scp" and copy[5] == "pod:jaxdiff.tar.gz" and "--worker=all" in copy
    assert not Path(copy[4]).exists()  # the temporary archive is gone
    assert install[3:5] == ["ssh", "pod"] and ".[tpu,bucket]" in install[-1] and "--python 3.12" in install[-1]
    assert "local_device_count" in check[-1]


def test_words_of_a_command_arrive_as_they_were(shell, tmp_path):
    """The worker's shell reads the line back into the same words."""
    words = ["printf", "%s\\n", "a  b", "$HOME", "it's", 'say "hi"', "*", "", "a;b", "--yes"]
    (call,) = shell("run", "--", *words).calls
    assert call[3:5] == ["ssh", "pod"] and "--worker=all" in call
    line = call[-1].removeprefix("--command=")
    (tmp_path / "jaxdiff").mkdir()
    worker = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert worker.stdout.split("\n")[:-1] == words[2:]


def test_detached_commands_run_on(shell, tmp_path):
    (tmp_path / "jaxdiff").mkdir()
    (call,) = shell("run", "--detach", "--", "bash", "-c", "sleep 0.5; echo done; echo wrong >&2").calls
    line = call[-1].removeprefix("--command=")
    worker = subprocess.run(["bash", "-c", f"{line}; wait"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert worker.returncode == 0 and worker.stdout == ""
    assert (tmp_path / "jaxdiff/runs/tpu.log").read_text() == "done\nwrong\n"


def test_delete_asks_for_the_name(shell):
    for typed in ("", "\n", "y\n", "yes\n", "other\n", "po\n"):
        done = shell("delete", typed=typed)
        assert done.returncode == 2 and not done.calls
        assert done.stderr.endswith("error: not deleted\n")
    (call,) = shell("delete", typed="pod\n").calls
    assert call == ["compute", "tpus", "tpu-vm", "delete", "pod", "--zone=us-east1-a", "--quiet"]
    assert shell("delete", "--yes").calls == [call]


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("create", ["--spot"], {}, "unknown argument '--spot'"),
        ("create", ["--yes"], {}, "unknown argument '--yes'"),
        ("delete", ["--detach"], {}, "unknown argument '--detach'"),
        ("create", ["--env"], {}, "--env needs a file"),
        ("create", ["--env", "/nowhere/tpu.env"], {}, "no settings at /nowhere/tpu.env"),
        ("create", [], {"TPU_ZONE": ""}, "does not set TPU_ZONE"),
        ("delete", ["--yes"], {"TPU_NAME": ""}, "does not set TPU_NAME"),
        ("delete", ["--yes"], {"TPU_NAME": "a b; ls"}, "TPU_NAME 'a b; ls'"),
        ("run", [], {}, "no command"),
        ("run", ["--"], {}, "no command"),
        ("run", ["python"], {}, "unknown argument 'python'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(shell, script, arguments, settings, message):
    done = shell(script, *arguments, settings=settings)
    assert done.returncode == 2 and not done.calls
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_failure_of_gcloud_stops_the_script(shell):
    done = shell("setup", GCLOUD_EXIT="7")
    assert done.returncode == 7 and len(done.calls) == 1


def test_without_gcloud(shell, tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("bash", "dirname", "sed", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    done = shell("create", PATH=str(folder))
    assert done.returncode == 2 and done.stderr == "error: gcloud is not installed (or not on PATH)\n"


def test_the_example_has_every_setting():
    example = (SCRIPTS / "tpu.env.example").read_text()
    used = {name for path in SCRIPTS.glob("*.sh") for name in re.findall(r"\bTPU_[A-Z]+\b", path.read_text())}
    assert used - {"TPU_ENV"} == set(re.findall(r"^(TPU_\w+)=", example, re.MULTILINE))


def test_shellcheck():
    # The test extra installs it beside this Python, which need not be on the PATH.
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None, "shellcheck is not installed: pip install -e '.[test]'"
    scripts = sorted(map(str, SCRIPTS.glob("*.sh")))
    done = subprocess.run([checker, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

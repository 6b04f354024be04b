"""What all scripts of the folder have in common: help, dry runs, bad input, settings, style."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
NAMES = ["create", "setup", "run", "watch", "fetch", "delete", "gke"]
NASTY = ["python", "-c", "print('a  b', \"$HOME\")"]
REST = {"run": ["--", *NASTY], "watch": ["--", *NASTY], "gke": ["--", *NASTY], "fetch": ["gs://b/runs/a b"]}
GKE = {
    "GKE_IMAGE": "docker.pkg.dev/p/i",
    "GKE_ACCELERATOR": "tpu-v6e-slice",
    "GKE_TOPOLOGY": "4x4",
    "TPU_BUCKET": "b",
}


def printed(done):
    """The commands that a script printed, as the shell would read them."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("name", [*NAMES, "slurm_gpu.sbatch"])
def test_help(cloud, name):
    done = cloud(name, "--help", TPU_ENV="/nowhere")
    assert done.returncode == 0 and not cloud.calls()
    assert f"tpu_scripts/{name}" in done.stdout and "--dry-run" in done.stdout
    assert "#!" not in done.stdout and "pipefail" not in done.stdout and "shellcheck" not in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_what_a_run_calls(cloud, name, tmp_path):
    cloud.settings(**GKE)
    cloud.program("kubectl", '#!/usr/bin/env bash\ncat > /dev/null\nexec gcloud kubectl "$@" ""\n')
    if name in ("run", "setup"):
        cloud.ready()
    if name == "delete":
        cloud("create")
    cloud.calls()
    rest = REST.get(name, [])
    if name == "run":
        rest = ["--id", "one", *rest]
    if name == "fetch":
        rest = ["--into", str(tmp_path / "in to"), *rest]
    dry = cloud(name, "--dry-run", *rest)
    assert dry.returncode == 0, dry.stderr
    assert printed(dry) and not cloud.calls() and not cloud.logs.exists()
    if name == "watch":  # one round, in order
        verbs = [command[4] for command in printed(dry) if command[0] == "gcloud"]
        order = ["list", "create", "list", "scp", *["ssh"] * 7, "list", "delete"]
        assert verbs == order
        return
    cloud.program("mountpoint", "#!/bin/sh\n")
    real = cloud(name, *rest, typed="pod\n")
    assert real.returncode in (0, 127), real.stderr  # the workers of `run` have no python

    def settled(commands):  # but for what differs from time to time
        text = "\n".join(" ".join(command) for command in commands)
        return re.sub(r"/[^ ]*/(?=jaxdiff.tar.gz)|smoke-[-0-9]+|(?<=fil)ename=-", "", text).splitlines()

    called = [["gcloud" if call[0] != "kubectl" else "", *call] for call in cloud.calls()]
    called = [[word for word in call if word] for call in called if call[3:5] != ["tpu-vm", "list"]]
    shown = [command for command in printed(real) if command[0] in ("gcloud", "kubectl")]
    assert settled(shown) == settled(printed(dry))[-len(shown) :]
    assert settled(called) == settled(shown)


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("create", ["--spot"], {}, "unknown argument '--spot'"),
        ("create", ["--yes"], {}, "unknown argument '--yes'"),
        ("create", ["--help --dry-run"], {}, "unknown argument '--help --dry-run'"),
        ("delete", ["--detach"], {}, "unknown argument '--detach'"),
        ("create", ["--env"], {}, "--env needs a value"),
        ("create", ["--env", "/nowhere/tpu.env"], {}, "no settings at /nowhere/tpu.env"),
        ("create", [], {"TPU_ZONE": ""}, "does not set TPU_ZONE"),
        ("create", [], {"TPU_TYPE": "tpu7x-8"}, "gke.sh runs there"),
        ("create", [], {"TPU_SPOT": "true", "TPU_RESERVED": "true"}, "one of them"),
        ("create", [], {"TPU_SLICES": "two"}, "TPU_SLICES 'two'"),
        ("create", [], {"TPU_BUCKET": "gs://b"}, "the bucket's name alone"),
        ("delete", ["--yes"], {"TPU_NAME": ""}, "does not set TPU_NAME"),
        ("delete", ["--yes"], {"TPU_NAME": "a b; ls"}, "TPU_NAME 'a b; ls'"),
        ("run", [], {}, "no command"),
        ("run", ["--"], {}, "no command"),
        ("run", ["python"], {}, "unknown argument 'python'"),
        ("run", ["--attach", "--", "ls"], {}, "one of them"),
        ("run", ["--id", "a b", "--", "ls"], {}, "--id 'a b'"),
        ("run", ["--", "ls"], {"TPU_PASS": "A=b"}, "'A=b' is not the name of a variable"),
        ("watch", [], {}, "no command"),
        ("fetch", [], {}, "one RUN to fetch"),
        ("fetch", ["a", "b"], {}, "one RUN to fetch"),
        ("fetch", ["gs://b/"], {}, "whole bucket"),
        ("fetch", ["/mnt/bucket/a"], {}, "does not set TPU_BUCKET"),
        ("gke", ["--", "ls"], GKE | {"GKE_TOPOLOGY": "4"}, "GKE_TOPOLOGY '4'"),
        ("gke", ["--", "ls"], GKE | {"GKE_IMAGE": ""}, "GKE_IMAGE"),
        ("gke", ["--", "ls"], GKE | {"GKE_CHIPS": "3"}, "not whole machines of 3"),
        ("gke", ["--", "ls"], GKE | {"TPU_BUCKET": ""}, "TPU_BUCKET is not set"),
        ("gke", [], GKE, "no command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cloud, script, arguments, settings, message):
    cloud.settings(**settings)
    done = cloud(script, *arguments)
    assert done.returncode == 2 and not cloud.calls()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


WRONG = {
    "TPU_ZONE": "us east",
    "TPU_PROJECT": "My Project",
    "TPU_TYPE": "v5e",
    "TPU_VERSION": "V2!",
    "TPU_SLICES": "0",
    "TPU_SPOT": "True",
    "TPU_RESERVED": "yes",
    "TPU_VALID_UNTIL": "soon",
    "TPU_CREATE_FLAGS": "network",
    "TPU_POLL_SECONDS": "abc",
    "TPU_PYTHON": "3.9",
    "TPU_BUCKET": "gs://b",
    "TPU_MAX_HOURS": "two",
    "TPU_MAX_DOLLARS": "-1",
    "TPU_DOLLARS_PER_HOUR": "$5",
    "TPU_BACKOFF_SECONDS": "1.5",
    "TPU_BACKOFF_MOST": "010",
    "GKE_IMAGE": "a b",
    "GKE_TOPOLOGY": "0x4",
    "GKE_CHIPS": "0",
    "GKE_NAMESPACE": "-",
}


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_wrong_with_the_settings_is_said_at_once(cloud, name):
    """Before anything is asked for, each setting in a line, with its value."""
    cloud.settings(**WRONG)
    with cloud.env.open("a") as file:
        file.write("TPU_ZONES=us-east1-a\nexport GKE_IMGE=x\n")
    done = cloud(name, *REST.get(name, []))
    assert done.returncode == 2 and not cloud.calls() and not cloud.logs.exists()
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for setting, value in WRONG.items():
        assert [line for line in lines if line.startswith(f"error: {setting} '{value}': ")], (setting, lines)
    for unknown in ("TPU_ZONES", "GKE_IMGE"):
        assert f"error: {unknown}: there is no such setting; tpu.env.example has all" in lines
    assert len(lines) == len(WRONG) + 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TPU_SPOT = true", "line 6: TPU_SPOT: command not found"),
        ("TPU_SPOT=$ABSENT", "line 6: ABSENT: unbound variable"),
        ("TPU_SETUP='a", "unexpected EOF"),
        ("TPU_SETUP=(", "unexpected"),
        ("echo ok: line 3: no fault of the file >&2; TPU_SPOT = true", "line 6: TPU_SPOT: command not found"),
        ("exit", "tpu.env: ends the shell that reads it: settings alone, no exit or exec"),
        ("exit 0", "ends the shell that reads it"),
        ("TPU_SPOT=true; exec true", "ends the shell that reads it"),
        ("TPU_SPOT=true\r", "TPU_SPOT 'true?': true or false"),
        ("TPU_PASS='\"A'", "TPU_PASS: a quote that is not closed"),
        ("TPU_CREATE_FLAGS='--a=\"b'", "TPU_CREATE_FLAGS: a quote that is not closed"),
    ],
)
def test_what_bash_cannot_read_is_said(cloud, text, message):
    with cloud.env.open("w") as file:
        file.write("TPU_NAME=pod\nTPU_ZONE=us-east1-a\nTPU_TYPE=v4-8\nTPU_VERSION=v2\n\n" + text + "\n")
    done = cloud("create")
    assert done.returncode == 2 and not cloud.calls()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_what_the_file_says_itself_is_no_fault_of_it(cloud):
    cloud.settings()
    with cloud.env.open("a") as file:
        file.write("echo config: line 3: old >&2\nprintf 'no end of line' >&2\nreturn 3\n")
    done = cloud("create", "--dry-run")
    assert "error: " not in done.stderr


def test_the_file_is_checked_in_english(cloud):
    cloud.settings(TPU_SETUP="x")
    with cloud.env.open("a") as file:
        file.write('echo "$LC_ALL" > "$CLOUD/locale"; exit\n')
    assert cloud("create", LC_ALL="C.UTF-8").returncode == 2 and cloud.text("locale") == "C\n"


@pytest.mark.parametrize("zone", ["us-south1-ai1b", "us-central1-ai1a", "us-west4-a", "europe-west4-ai12c"])
def test_zones(cloud, zone):
    cloud.settings(TPU_ZONE=zone)
    done = cloud("delete", "--dry-run")
    assert done.returncode == 0 and f"--zone={zone}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "zone", ["us-south1-ai1", "us-central1-aia", "us-central1-1a", "us-central1", "us-south1-ai1bb"]
)
def test_what_is_no_zone(cloud, zone):
    cloud.settings(TPU_ZONE=zone)
    done = cloud("delete", "--dry-run")
    assert done.returncode == 2 and f"TPU_ZONE '{zone}'" in done.stderr


def test_what_is_passed_may_be_called_like_a_setting(cloud):
    cloud.settings(TPU_PASS="TPU_MIN_LOG_LEVEL", TPU_MIN_LOG_LEVEL="0")
    assert cloud("create", "--dry-run").returncode == 0


def test_flags_keep_their_quotes(cloud):
    """What is quoted is one argument, and nothing is expanded."""
    flags = """--description="a  b" '--labels=x=$HOME,y=*' --note=it\\'s --lines='one\ntwo' * """
    flags += """--last="say \\"hi\\" \\n" --none="" """
    cloud.settings(TPU_CREATE_FLAGS=flags)
    assert cloud("create", "--no-wait").returncode == 0
    (create,) = [call for call in cloud.calls() if call[3] == "create"]
    given = ["--description=a  b", "--labels=x=$HOME,y=*", "--note=it's", "--lines=one\ntwo", "*"]
    assert create[9:] == [*given, '--last=say "hi" \\n', "--none="], create


def test_failure_of_gcloud_stops_the_script(cloud):
    cloud.put("fails", "scp 7 1 calls")
    done = cloud("setup")
    assert done.returncode == 7 and cloud.verbs() == ["scp"]


def test_without_gcloud(cloud, tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("bash", "dirname", "sed", "env", "tr", "git"):
        (folder / tool).symlink_to(shutil.which(tool))
    for script in ("create", "delete", "run", "fetch", "setup", "watch"):
        done = cloud(script, *REST.get(script, []), PATH=str(folder), typed="pod\n")
        assert done.returncode == 2 and done.stderr == "error: gcloud is not installed (or not on PATH)\n", script
        assert not cloud.logs.exists()


def test_the_example_has_every_setting():
    example = (SCRIPTS / "tpu.env.example").read_text()
    used = {name for path in SCRIPTS.glob("*.sh") for name in re.findall(r"\b(?:TPU|GKE)_[A-Z_]+\b", path.read_text())}
    assert used - {"TPU_ENV"} == set(re.findall(r"^((?:TPU|GKE)_\w+)=", example, re.MULTILINE))


def test_the_example_is_good_as_it_is(cloud):
    example = str(SCRIPTS / "tpu.env.example")
    assert cloud("create", "--dry-run", "--env", example).returncode == 0
    done = cloud("watch", "--dry-run", "--env", example, "--", "true")
    assert done.returncode == 0, done.stderr


def test_constraints_are_exact_and_fit():
    """One version a line, of everything that the project requires on a TPU, within its bounds."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (SCRIPTS / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            pins.setdefault(pin.name, []).append(str(pin.specifier)[2:])
    assert {"jax", "jaxlib", "libtpu"} <= set(pins)
    project = (SCRIPTS.parent / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    for line in re.findall(r'^  "(.+?)",', project, re.MULTILINE):
        wanted = Requirement(line)
        assert all(version in wanted.specifier for version in pins[canonicalize_name(wanted.name)]), line


def test_shellcheck():
    # The test extra installs it beside this Python, which need not be on the PATH.
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None, "shellcheck is not installed: pip install -e '.[test]'"
    scripts = sorted(map(str, [*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm_gpu.sbatch"]))
    done = subprocess.run([checker, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

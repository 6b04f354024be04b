"""create, setup, run, fetch and delete against a cloud of folders, whose workers run what they are told."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"


def test_create_waits_and_says_how_far_it_is(cloud):
    cloud.put("lives", "WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = cloud("create")
    assert done.returncode == 0, done.stderr
    states = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("pod: ")]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (create,) = [call for call in cloud.calls() if call[3] == "create"]
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "pod"]
    assert set(create[5:]) == {
        "--zone=us-east1-a",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2",
        "--node-id=pod",
    }


def test_create_twice_creates_once(cloud):
    cloud.put("lives", "WAITING_FOR_RESOURCES ACTIVE")
    assert cloud("create", "--no-wait").returncode == 0
    again = cloud("create")
    assert again.returncode == 0 and "pod is there already: WAITING_FOR_RESOURCES" in again.stdout
    assert "pod is there already: ACTIVE" in cloud("create").stdout
    assert cloud.verbs() == ["create"]


def test_create_asks_for_what_the_settings_say(cloud):
    cloud.settings(
        TPU_SPOT="true",
        TPU_SLICES="2",
        TPU_PROJECT="mine",
        TPU_VALID_UNTIL="6h",
        TPU_CREATE_FLAGS="--network=n --tags=a",
    )
    assert cloud("create", "--no-wait").returncode == 0
    flags = set(cloud.calls()[-1])
    assert {"--spot", "--project=mine", "--node-count=2", "--node-prefix=pod", "--network=n", "--tags=a"} < flags
    assert {"--valid-after-duration=1m", "--valid-until-duration=6h"} < flags and "--node-id=pod" not in flags
    cloud("delete", "--yes")
    cloud.settings(TPU_RESERVED="true")
    assert cloud("create", "--no-wait").returncode == 0
    assert "--reserved" in cloud.calls()[-1]


def test_create_reports_a_request_that_came_to_nothing(cloud):
    for life in ("WAITING_FOR_RESOURCES FAILED", "SUSPENDED", "ACTIVE"):
        cloud.put("lives", life)
        cloud.put("node_state", "PREEMPTED")
        done = cloud("create")
        last = "PREEMPTED" if life == "ACTIVE" else life.split()[-1]
        assert done.returncode == 1 and "no capacity left" in done.stderr
        assert f"error: pod is {last} (the reason is above)" in done.stderr
        assert cloud("delete", "--yes").returncode == 0


def test_create_survives_a_failing_look_but_not_a_failing_creation(cloud):
    cloud.put("fails", "create 7 1 calls")
    assert cloud("create").returncode == 7
    cloud.put("lives", "PROVISIONING PROVISIONING PROVISIONING ACTIVE")
    assert cloud("create", "--no-wait").returncode == 0
    started = cloud.start("create")
    cloud.put("fails", "describe 7 1 calls")
    assert started.wait(20) == 0
    cloud.put("fails", "list 7 1 calls")
    assert cloud("create").returncode == 69  # nothing is created where nobody knows what is there
    assert cloud.verbs().count("create") == 2


def test_setup_prepares_every_worker_of_every_slice(cloud):
    cloud.settings(TPU_SLICES="2", TPU_TYPE="v4-16", TPU_SETUP="echo mine >> ~/mine", TPU_PYTHON="3.11")
    assert cloud("create").returncode == 0 and cloud("setup").returncode == 0
    homes = sorted((cloud.folder / "machines").glob("*/*"))
    assert [str(home)[-7:] for home in homes] == ["pod-0/0", "pod-0/1", "pod-1/0", "pod-1/1"]
    for home in homes:
        assert (home / "jaxdiff/tpu_scripts/smoke.py").is_file() and (home / "mine").read_text() == "mine\n"
    (logs,) = (cloud.logs / "pod").glob("smoke-*")
    assert sorted(log.name for log in logs.iterdir()) == ["0-0.log", "0-1.log", "1-0.log", "1-1.log"]
    assert "tpu_scripts/smoke.py --devices 16" in (logs / "1-1.log").read_text()
    others = cloud.text("others")
    assert others.count("uv venv --quiet --allow-existing --python 3.11 .venv") == 4
    assert others.count("-c tpu_scripts/constraints.txt -e .[tpu,bucket]") == 4


def test_setup_fails_with_one_worker(cloud):
    assert cloud("create").returncode == 0
    cloud.put("smoke.0.1", "1")
    done = cloud("setup")
    assert done.returncode == 1 and "0/1: exit code 1" in done.stderr and "smoke test failed" in done.stderr
    (log,) = (cloud.logs / "pod").glob("smoke-*/0-1.log")
    assert "smoke says 1" in log.read_text() and "[0/1] smoke says 1" in done.stdout
    cloud.put("unreachable", "pod/1")
    assert cloud("setup").returncode == 255


def test_setup_mounts_the_bucket(cloud):
    cloud.settings(TPU_BUCKET="my-bucket")
    for name in ("gcsfuse", "sudo"):
        cloud.program(name, f'#!/usr/bin/env bash\necho "{name} $*" >> "$CLOUD/others"\n')
    cloud.program("mountpoint", "#!/bin/sh\nexit 1\n")
    assert cloud("create").returncode == 0 and cloud("setup").returncode == 0
    assert cloud.text("others").count("my-bucket /mnt/bucket") == 4  # a run mounts it too
    assert "--metadata-cache-ttl-secs=0" in cloud.text("others")


def test_setup_is_refused_under_a_run(cloud):
    cloud.ready()
    assert cloud("run", "--detach", "--", "sh", "-c", "while [ -e $CLOUD/request ]; do sleep 0.1; done").returncode == 0
    done = cloud("setup")
    cloud("run", "--stop")
    assert done.returncode == 3 and "is in progress" in done.stderr


def test_words_of_a_command_arrive_as_they_were(cloud):
    """The worker's shell reads the line back into the same words."""
    cloud.ready()
    words = [
        "a  b",
        "$HOME",
        "it's",
        'say "hi"',
        "*",
        "",
        "a;b",
        "--yes",
        "-x",
        "\\n",
        "`ls`",
        "é",
        "two\nlines",
        "end\n",
    ]
    done = cloud("run", "--id", "words", "--", "printf", "%s\\0", *words)
    assert done.returncode == 0, done.stderr
    for index in range(2):
        log = cloud.folder / f"machines/pod/{index}/jaxdiff/runs/tpu/words.log"
        assert log.read_text().split("\0")[:-1] == words


def test_run_has_one_exit_code(cloud):
    cloud.ready()
    for codes, common in [
        ((0, 0), 0),
        ((0, 3), 3),
        ((4, 3), 4),
        ((75, 75), 75),
        ((1, 75), 75),
        ((71, 134), 71),
        ((71, 70), 70),
        ((71, 73), 73),
        ((134, 73), 73),
        ((0, 75), 75),
    ]:
        done = cloud(
            "run",
            "--id",
            f"{codes[0]}-{codes[1]}",
            "--",
            "sh",
            "-c",
            f"exit $(echo {codes[0]} {codes[1]} | cut -d' ' -f$((WORKER+1)))",
        )
        assert done.returncode == common, (codes, done.stdout, done.stderr)
    assert "0/0: exit code 0" in done.stderr and "0/1: exit code 75" in done.stderr
    cloud.put("unreachable", "pod/1")
    done = cloud("run", "--", "true")
    assert done.returncode == 255 and "not started on every worker" in done.stderr


def test_output_is_shown_and_kept_by_worker(cloud):
    cloud.ready()
    done = cloud("run", "--id", "out", "--", "sh", "-c", 'printf "one\\rtwo\\n"; echo wrong >&2; echo $WORKER')
    assert {"[0/0] one", "[0/0] two", "[0/1] wrong", "[0/1] 1"} <= set(done.stdout.splitlines())
    assert (cloud.logs / "pod/out/0-1.log").read_text() == "one\ntwo\nwrong\n1\n"


def test_a_run_lives_on_and_is_followed_again(cloud):
    cloud.ready()
    assert "no run" in cloud("run", "--attach").stdout
    wait = ["sh", "-c", 'trap "echo saving; exit 75" TERM; echo here; while [ -e $CLOUD/request ]; do sleep 0.1; done']
    assert cloud("run", "--detach", "--id", "long", "--", *wait).returncode == 0
    second = cloud("run", "--", "true")
    assert second.returncode == 3 and "run long is in progress" in second.stderr
    follower = cloud.start("run", "--attach")
    while "[0/1] here" not in (line := follower.stdout.readline()):
        assert line
    os.killpg(follower.pid, signal.SIGTERM)  # the connection ends
    follower.communicate(timeout=10)
    same = cloud.start("run", "--id", "long", "--", *wait)  # not a second one
    time.sleep(0.3)
    stopped = cloud("run", "--stop")
    assert stopped.returncode == 0 and "0/1: exit code 75" in stopped.stderr
    assert same.wait(10) == 75 and same.communicate()[0].count("[0/0] here") == 1
    assert cloud("run", "--attach").returncode == 75
    assert cloud("run", "--stop").returncode == 0
    assert "ended" not in cloud("run", "--", "true").stderr  # free again


def test_a_command_that_vanished_is_no_success(cloud):
    cloud.ready()
    assert (
        cloud(
            "run", "--detach", "--id", "x", "--", "sh", "-c", "while [ -e $CLOUD/request ]; do sleep 0.1; done"
        ).returncode
        == 0
    )
    runs = cloud.folder / "machines/pod/0/jaxdiff/runs/tpu"
    while not all((runs / f"x.{part}").exists() and (runs / f"x.{part}").read_text() for part in ("holder", "pid")):
        time.sleep(0.05)
    os.kill(int((runs / "x.holder").read_text()), signal.SIGKILL)  # as if the machine had started anew
    os.kill(int((runs / "x.pid").read_text()), signal.SIGKILL)
    cloud.put("unreachable", "")
    done = cloud("run", "--stop")
    assert done.returncode == 71 and "0/0: exit code lost" in done.stderr


def test_variables_are_passed_and_never_shown(cloud):
    cloud.settings(TPU_PASS="HF_TOKEN OTHER", OTHER="it's $1")
    dry = cloud("run", "--dry-run", "--", "true", HF_TOKEN="hf_secret")
    assert "HF_TOKEN=***" in dry.stdout and "hf_secret" not in dry.stdout + dry.stderr
    cloud.ready()
    done = cloud("run", "--id", "t", "--", "sh", "-c", 'echo "$HF_TOKEN-$OTHER" | rev', HF_TOKEN="hf_secret")
    assert done.stdout.count("1$ s'ti-terces_fh") == 2
    assert "hf_secret" not in done.stdout and "hf_secret" not in cloud.text("calls")
    assert not list(cloud.folder.rglob("jaxdiff.env"))
    missing = cloud("run", "--", "true")
    assert missing.returncode == 2 and "TPU_PASS names HF_TOKEN, which has no value here" in missing.stderr
    assert cloud("delete", "--yes").returncode == 0  # needs no token


def test_fetch_from_a_bucket(cloud, tmp_path):
    cloud.settings(TPU_BUCKET="b")
    into = str(tmp_path / "in to")
    for run in ("/mnt/bucket/runs/base64/", "gs://b/runs/base64"):
        assert cloud("fetch", "--into", into, run).returncode == 0
        (call,) = cloud.calls()
        assert call[:4] == ["storage", "rsync", "--recursive", "--exclude=^(.*/)?checkpoints/.*"]
        assert call[4:] == ["gs://b/runs/base64", into]
    assert cloud("fetch", "--checkpoints", "--into", into, "gs://b/x").returncode == 0
    assert cloud.calls()[0][2:5] == ["--recursive", "gs://b/x", into]
    done = cloud("fetch", "--dry-run", "gs://b/runs/base64")
    assert shlex.split(done.stdout)[-1] == str(SCRIPTS.parent / "runs/base64")


def test_fetch_from_the_first_worker(cloud, tmp_path):
    """rsync over the stand-in's ssh, where that is installed; else what it is told."""
    cloud.settings(TPU_SLICES="2")
    cloud.put("request", "ACTIVE")
    cloud.put("workers", "1")
    folder = cloud.folder / "machines/pod-0/0/jaxdiff/runs/a"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints/big").write_text("big")
    if shutil.which("rsync") is None:
        cloud.program("rsync", '#!/usr/bin/env bash\n[[ $* == *"--partial"*"pod-0:jaxdiff/runs/a/"* ]] || exit 1\n')
    into = tmp_path / "into"
    done = cloud("fetch", "--into", str(into), "runs/a")
    assert done.returncode == 0, done.stderr
    if shutil.which("rsync"):
        assert [path.name for path in into.iterdir()] == ["metrics.jsonl"]
        assert cloud("fetch", "--checkpoints", "--into", str(into), "runs/a").returncode == 0
        assert (into / "checkpoints/big").read_text() == "big"


def test_delete_asks_for_the_name(cloud):
    assert cloud("create").returncode == 0
    for typed in ("", "\n", "y\n", "yes\n", "other\n", "po\n"):
        done = cloud("delete", typed=typed)
        assert done.returncode == 2 and done.stderr.endswith("error: not deleted\n")
    assert cloud.verbs() == ["create"]
    assert cloud("delete", typed="pod\n").returncode == 0
    (call,) = [call for call in cloud.calls() if call[3] == "delete"]
    assert call[2:] == ["queued-resources", "delete", "pod", "--zone=us-east1-a", "--force", "--quiet"]
    done = cloud("delete", "--yes")
    assert done.returncode == 0 and "there is no pod in us-east1-a" in done.stdout
    cloud.calls()
    cloud.put("nodes", "pod")  # a machine without a queued resource
    assert cloud("delete", "--yes").returncode == 0
    assert next(call for call in cloud.calls() if call[3] == "delete")[2:5] == ["tpu-vm", "delete", "pod"]


def test_smoke_refuses_other_counts(monkeypatch, capsys):
    """The conftest's eight devices, without joining."""
    import importlib.util

    import jax

    spec = importlib.util.spec_from_file_location("smoke", SCRIPTS / "smoke.py")
    smoke = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: None)
    number = jax.device_count()
    assert smoke.total(jax.devices()) == number * (number + 1) / 2
    for wanted, code, message in [
        (number, 0, ""),
        (number + 1, 1, f"should have {number + 1} devices, this worker sees {number}"),
    ]:
        monkeypatch.setattr(sys, "argv", ["smoke.py", "--devices", str(wanted)])
        assert smoke.main() == code and message in capsys.readouterr().err
    monkeypatch.setattr(jax, "local_device_count", lambda: number + 1)
    assert smoke.main() == 1
    monkeypatch.undo()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: None)
    monkeypatch.setattr(sys, "argv", ["smoke.py"])
    monkeypatch.setattr(smoke, "total", lambda devices: 1.5)
    assert smoke.main() == 1 and "the sum over all devices is 1.5" in capsys.readouterr().err


def test_smoke_counts_and_sums(tmp_path):
    """Two real processes, two CPU devices each, joined."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    text = (SCRIPTS / "smoke.py").read_text()
    joined = text.replace("initialization_timeout=120", f"'localhost:{port}', 2, int(__import__('os').environ['RANK'])")
    assert joined != text
    (tmp_path / "smoke.py").write_text(joined)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, str(tmp_path / "smoke.py"), "--devices", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, env=environment | {"RANK": str(i)}, **pipes) for i in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "4 devices (cpu) in 2 workers" in said[0] and "worker 2 of 2: 2 devices" in said[1]

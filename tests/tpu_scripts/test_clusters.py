"""gke.sh's manifest against the fields that JobSet and Kubernetes have; slurm_gpu.sbatch with a stand-in for srun."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
SETTINGS = {
    "TPU_SLICES": "2",
    "TPU_BUCKET": "my-bucket",
    "TPU_MAX_RESTARTS": "7",
    "GKE_IMAGE": "europe-docker.pkg.dev/p/r/jaxdiff:1",
    "GKE_ACCELERATOR": "tpu-v6e-slice",
    "GKE_TOPOLOGY": "4x8",
}
# The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that the manifest may use, by the path to them.
FIELDS = {
    "": "apiVersion kind metadata spec",
    "spec": "replicatedJobs network successPolicy failurePolicy startupPolicy suspend coordinator",
    "spec.failurePolicy": "maxRestarts restartStrategy rules",
    "spec.failurePolicy.rules": "name action onJobFailureReasons onJobFailureMessagePatterns targetReplicatedJobs",
    "spec.replicatedJobs": "name groupName template replicas dependsOn",
    "job.spec": "parallelism completions completionMode backoffLimit podFailurePolicy template activeDeadlineSeconds",
    "job.spec.podFailurePolicy.rules": "action onExitCodes onPodConditions",
    "job.spec.podFailurePolicy.rules.onExitCodes": "containerName operator values",
    "pod.spec": "restartPolicy serviceAccountName terminationGracePeriodSeconds nodeSelector tolerations "
    "containers volumes",
    "container": "name image workingDir command envFrom resources volumeMounts",
}


def known(path, value):
    assert set(value) <= set(FIELDS[path].split()), path


@pytest.fixture
def kubectl(cloud):
    cloud.program(
        "kubectl", '#!/bin/bash\nprintf "%s\\0" "$@" >> "$CLOUD/k"; echo >> "$CLOUD/k"\ncp /dev/stdin "$CLOUD/stdin"\n'
    )
    cloud.settings(**SETTINGS)
    return lambda: [call.split("\0")[:-1] for call in cloud.text("k").split("\n")[:-1]]


def test_manifest(cloud, kubectl):
    words = [
        "python",
        "-m",
        "x",
        'say "hi"',
        "back\\slash",
        "two\nlines",
        "a\tb",
        "bell\a, escape\x1b[0m, return\r",
        "$(HOME)",
        "{${TPU_NAME}}",
        "é: #",
        "&",
    ]
    done = cloud("gke", "--", *words)
    assert done.returncode == 0, done.stderr
    get, create = kubectl()
    assert get[1:4] == ["get", "jobset", "pod"] and create == ["--namespace=default", "create", "--filename=-"]
    text = cloud.text("stdin")
    dry = cloud("gke", "--dry-run", "--", *words)
    assert text in dry.stdout and dry.stdout.endswith("+ kubectl --namespace=default create --filename=-\n")
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    known("", jobset)
    known("spec", jobset["spec"])
    policy = jobset["spec"]["failurePolicy"]
    known("spec.failurePolicy", policy)
    for rule in policy["rules"]:
        known("spec.failurePolicy.rules", rule)
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"]),
        ("RestartJobSet", ["BackoffLimitExceeded"]),
    ]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    known("spec.replicatedJobs", replicated)
    job = replicated["template"]["spec"]
    known("job.spec", job)
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 8, 8, 0)
    disrupted, failed = job["podFailurePolicy"]["rules"]
    known("job.spec.podFailurePolicy.rules", disrupted)
    known("job.spec.podFailurePolicy.rules.onExitCodes", failed["onExitCodes"])
    assert disrupted["action"] == "Count" and disrupted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]
    assert failed["action"] == "FailJob" and failed["onExitCodes"]["operator"] == "NotIn"
    assert failed["onExitCodes"]["values"] == [71, 75, 134, 143]
    pod = job["template"]["spec"]
    known("pod.spec", pod)
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    (container,) = pod["containers"]
    known("container", container)
    assert container["name"] == failed["onExitCodes"]["containerName"]
    assert container["command"] == [word.replace("$(", "$$(") for word in words]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    (volume,) = pod["volumes"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/mnt/bucket"}]


def test_spot_and_secrets(cloud, kubectl):
    cloud.settings(**SETTINGS, TPU_SPOT="true", TPU_PASS="HF_TOKEN")
    done = cloud("gke", "--", "true", HF_TOKEN="hf_secret")
    assert done.returncode == 0 and "hf_secret" not in done.stdout and "HF_TOKEN=***" in done.stdout
    assert "hf_secret" not in cloud.text("k")
    _, delete, create, start = kubectl()
    assert delete[1:4] == ["delete", "secret", "pod-env"] and create[1:5] == ["create", "secret", "generic", "pod-env"]
    assert start[1] == "create"
    pod = yaml.safe_load(cloud.text("stdin"))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "pod-env", "optional": True}}]


def test_a_run_that_is_there_is_not_started_over(cloud, kubectl):
    cloud.program("kubectl", '#!/bin/bash\nprintf "%s\\0" "$@" >> "$CLOUD/k"; echo >> "$CLOUD/k"\necho jobset/pod\n')
    cloud.settings(**SETTINGS, TPU_PASS="HF_TOKEN")
    done = cloud("gke", "--", "true", HF_TOKEN="hf_secret")
    assert done.returncode == 2 and "pod is there already: gke.sh --logs shows it" in done.stderr
    assert len(kubectl()) == 1  # its secret is as it was


def test_logs_and_delete(cloud, kubectl):
    assert cloud("gke", "--delete", typed="other\n").returncode == 2 and not kubectl()
    assert cloud("gke", "--logs").returncode == 0
    assert cloud("gke", "--delete", typed="pod\n").returncode == 0
    logs, delete = kubectl()
    assert "--selector=jobset.sigs.k8s.io/jobset-name=pod,batch.kubernetes.io/job-completion-index=0" in logs
    assert delete[1:4] == ["delete", "jobset", "pod"]


# Starts two tasks as srun does, each in a group of its own, and ends with the largest code; TERM kills them all.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$CLOUD/srun"
while [[ $1 == --* ]]; do shift; done
set -m
SLURM_PROCID=0 "$@" & a=$!
SLURM_PROCID=1 "$@" & b=$!
printf '%s %s' $a $b > "$CLOUD/tasks"
trap 'kill -KILL -$a -$b' TERM
largest=0
for task in $a $b; do
  until wait $task; code=$?; ! kill -0 $task 2>/dev/null; do :; done
  ((code > largest)) && largest=$code
done
exit $largest
"""


@pytest.fixture
def slurm(cloud, tmp_path):
    cloud.program("srun", SRUN)
    cloud.program("scontrol", '#!/bin/bash\necho "$*" >> "$CLOUD/requeued"\n')

    def start(*arguments, **environment):
        environment = {"JAXDIFF_VENV": sys.prefix} | environment
        command = ["bash", str(SCRIPTS / "slurm_gpu.sbatch"), *arguments]
        environment = cloud.environment(SLURM_JOB_ID="12", **environment)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)

    return start


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0", 0, ""),
        ("75 75", 75, "requeue Incomplete 12\n"),
        ("75 137", 75, "requeue Incomplete 12\n"),
        ("1 2", 2, ""),
        ("71 71", 71, "requeue Incomplete 12\n"),
        ("134 137", 71, "requeue Incomplete 12\n"),
        ("137 137", 137, ""),
        ("73 73", 73, ""),
        ("73 137", 73, ""),  # killed by Slurm two minutes after the other had ended
        ("73 134", 73, ""),
    ],
)
def test_slurm_starts_again_what_was_saved(cloud, slurm, codes, code, requeued):
    done = slurm("--", "sh", "-c", f"set -- {codes}; [ $SLURM_PROCID = 0 ] && exit $1; exit $2")
    assert done.wait(20) == code and cloud.text("requeued") == requeued
    assert ("another run writes to this --out" in done.stderr.read()) == (code == 73)
    words = cloud.text("srun").split("\0")
    assert "--output=runs/slurm/%j-%t.log" in words and "--kill-on-bad-exit=0" in words


def test_slurm_signals_the_tasks(cloud, slurm):
    """What it does before the time limit: srun and the script hear nothing, the tasks save."""
    assert "#SBATCH --signal=TERM@300" in (SCRIPTS / "slurm_gpu.sbatch").read_text().splitlines()
    job = slurm("--", "bash", "-c", 'trap "exit 75" TERM; : > $CLOUD/up.$SLURM_PROCID; while :; do sleep 0.1; done')
    while not ((cloud.folder / "up.0").exists() and (cloud.folder / "up.1").exists()):
        time.sleep(0.05)
    for task in cloud.text("tasks").split():
        os.killpg(int(task), signal.SIGTERM)
    assert job.wait(20) == 75 and cloud.text("requeued") == "requeue Incomplete 12\n"


def test_slurm_has_a_most_of_restarts(cloud, slurm):
    done = slurm("--", "sh", "-c", "exit 75", JAXDIFF_RESTARTS="2", SLURM_RESTART_COUNT="2")
    assert done.wait(20) == 75 and not cloud.text("requeued") and "JAXDIFF_RESTARTS" in done.stderr.read()


def test_slurm_processes_that_lose_each_other_soon_every_time(cloud, slurm):
    for count in range(5):
        lost = slurm("--", "sh", "-c", "exit 71", SLURM_RESTART_COUNT="30")
        assert lost.wait(20) == 71 and cloud.text("requeued").count("requeue") == min(count + 1, 3)
    assert "lost each other 5 times" in lost.stderr.read()
    assert slurm("--", "sh", "-c", "exit 75").wait(20) == 75  # something went well: the count begins anew
    assert slurm("--", "sh", "-c", "exit 71").wait(20) == 71
    assert cloud.text("requeued").count("requeue") == 5


def test_slurm_needs_its_python(cloud, slurm):
    done = slurm("--", "true", JAXDIFF_VENV="/absent")
    assert done.wait(20) == 2 and done.stderr.read() == "error: JAXDIFF_VENV: no /absent/bin/python\n"


def test_slurm_dry_run_and_bad_input(cloud):
    words = ["python", "a b", "it's $HOME"]
    dry = cloud("slurm_gpu.sbatch", "--dry-run", "--", *words)
    first, second = dry.stdout.splitlines()
    read = shlex.split(first[2:])
    assert read[0] == "srun" and read[-3:] == words and second == "+ scontrol requeue Incomplete JOB"
    for arguments, message in [
        ([], "no command"),
        (["--x"], "unknown argument '--x'"),
        (["--", "ls"], "not in a Slurm job"),
    ]:
        done = cloud("slurm_gpu.sbatch", *arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1

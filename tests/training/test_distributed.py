"""What a process decides before there are others: whether to join, with what, and what is refused."""

import socket

import jax
import numpy as np
import pytest
from processes import free_port

from jaxdiff.training import distributed, multihost
from jaxdiff.training.distributed import Cluster, agree, check_shared, gathered, on_process_0, once, start


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coordinator": "host:1"}, "--processes and --process missing"),
        ({"coordinator": "host:1", "process": 0}, "--processes missing"),
        ({"processes": 2, "process": 0}, "--coordinator missing"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "--coordinator host: must be HOST:PORT"),
        ({"coordinator": ":80", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"coordinator": "host:99999", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, r"--process 2 of --processes 2: must lie in 0…1"),
        ({"coordinator": "host:1", "processes": 2, "process": -1}, "must lie in 0…1"),
        ({"join": "none", "coordinator": "host:1", "processes": 2, "process": 0}, "give one of them"),
        ({"heartbeat": 0}, "--heartbeat 0"),
        ({"join_timeout": 0}, "--join-timeout 0"),
        ({"stall": -1.0}, r"--stall -1\.0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Cluster(**settings)


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize was called with; it is not."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(distributed, "backends_are_initialized", lambda: False)
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    return calls


def test_alone_nothing_is_called(initialized, monkeypatch, tmp_path):
    assert start(Cluster()) == 1
    assert start(Cluster(coordinator="host:1", processes=1, process=0)) == 1
    monkeypatch.setattr(distributed.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert start(Cluster(join="none")) == 1
    assert not initialized
    agree("anything", {"a": 1})
    check_shared(tmp_path)
    assert once(tmp_path, lambda: 3) == 3 and on_process_0(lambda: 4) == 4
    assert multihost.end(2, "nothing") is None
    np.testing.assert_array_equal(gathered({"a": jax.numpy.arange(3)})["a"], np.arange(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # salloc's own shell: no step
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a single pod, such as a notebook's
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ],
)
def test_jax_is_asked_for_others_where_the_machine_says_so(initialized, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(Cluster(heartbeat=7))
    assert len(initialized) == joins
    if joins:
        assert initialized[0]["heartbeat_timeout_seconds"] == 7 and "coordinator_address" not in initialized[0]


def test_once_a_device_was_used_it_is_too_late(initialized, monkeypatch):
    monkeypatch.setattr(distributed, "backends_are_initialized", lambda: True)
    monkeypatch.setattr(distributed.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert start(Cluster()) == 1 and not initialized  # a single TPU host, whose devices all are here
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(RuntimeError, match="join the other processes first"):
        start(Cluster())


def test_what_is_given_is_not_searched_for(initialized):
    start(Cluster(coordinator="10.0.0.1:8476", processes=4, process=3))
    (given,) = initialized
    assert (given["coordinator_address"], given["num_processes"], given["process_id"]) == ("10.0.0.1:8476", 4, 3)
    assert given["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("tasks", "devices"), [("1(x4)", []), ("1,1(x2)", []), ("8(x2)", None), ("1,2", None), ("", None)]
)
def test_one_process_a_host_has_all_of_its_devices(initialized, monkeypatch, tasks, devices):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-4]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    start(Cluster())
    assert initialized[0]["local_device_ids"] == devices


def test_a_cluster_that_cannot_be_read_is_one_line_that_says_what_to_do(initialized, monkeypatch):
    def refuse(**_):
        raise RuntimeError("To enable automatic bootstrap in a K8s cluster,\n jobs must be indexed")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(
        multihost.PeerLostError, match=r"cluster, jobs must be indexed; say where .* --join none"
    ) as caught:
        start(Cluster())
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_named(initialized):
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this host cannot be used: Address already in use"):
            start(Cluster(coordinator=f"localhost:{port}", processes=2, process=0))


def test_what_an_error_means_for_the_exit_code():
    assert multihost.outcome(ValueError("a\n b")) == (2, "error: a b")
    assert multihost.outcome(FileNotFoundError("gone")) == (2, "error: gone")
    assert multihost.outcome(multihost.PeerLostError("lost")) == (71, "error: lost")
    code, text = multihost.outcome(RuntimeError("a bug"))
    assert code == 70 and text.endswith("RuntimeError: a bug")


@pytest.mark.parametrize(
    ("message", "ours"),
    [
        ("INTERNAL: Mosaic failed to compile a kernel", True),
        ("UNKNOWN: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", False),
        ("DEADLINE_EXCEEDED: Barrier timed out", False),
    ],
)
def test_what_may_be_an_error_of_this_process_is_shown(message, ours, monkeypatch):
    monkeypatch.setattr(multihost, "count", lambda: 2)
    with pytest.raises(multihost.PeerLostError) as caught, multihost.together():
        raise RuntimeError(message)
    code, text = multihost.outcome(caught.value)
    assert code == 71 and text.splitlines()[-1].startswith("error: another process is gone") and message in text
    assert ("Traceback" in text, "or it is this" in text) == (ours, ours)

"""Multi-process runs: joining processes, comparing settings, barriers, and one-time preparation.

    count = start(Cluster())       # before the first use of a device; returns 1 for a single process
    source = once(folder, open_it) # first on one process that shares the folder, then on the others

jax detects the processes on TPU VMs, in GKE, under Slurm, Open MPI and in Kubernetes' indexed jobs; otherwise set
`coordinator`, `processes` and `process`.
"""

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.core.jax_internals import backends_are_initialized, cloud_tpu_init, global_state
from jaxdiff.training import lost_peer, multihost
from jaxdiff.training.interruption import unheard

T = TypeVar("T")
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class Cluster:
    """How this process joins the others, and timeouts for hanging processes."""

    join: Literal["auto", "none"] = "auto"
    """`auto`: detect other processes from the environment (TPU VM, GKE, Slurm, Open MPI, indexed Kubernetes job),
    unless the next three settings give them. `none`: a single process."""
    coordinator: str | None = None
    """HOST:PORT of process 0, reachable from every process; requires `processes` and `process`."""
    processes: int | None = None
    """Number of processes of the run."""
    process: int | None = None
    """Index of this process, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the others at the start."""
    heartbeat: int = 30
    """Seconds without a heartbeat after which a process counts as dead and all others exit."""
    stall: float = 600.0
    """Seconds without progress after which a process reports what it waits for, with the stacks of its threads, on
    standard error and in OUT/stall-PROCESS.txt; six times as long during compilation. 0: never."""
    stall_exit: float = 0.0
    """Seconds without progress after which all processes exit, for a supervisor to restart them: a hanging collective
    never ends by itself. 0: never; 1800 is a good value on a pod."""

    def __post_init__(self) -> None:
        """ValueError for invalid settings."""
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together")
        if self.coordinator is not None and self.processes is not None and self.process is not None:
            _check_address(self.coordinator)
            if self.processes < 1 or not 0 <= self.process < self.processes:
                raise ValueError(
                    f"--process {self.process} of --processes {self.processes}: must lie in 0…{self.processes - 1}"
                )
            if self.join == "none":
                raise ValueError("--join none and --coordinator: give one of them")
        for name, least in (("join_timeout", 1), ("heartbeat", 1), ("stall", 0), ("stall_exit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")


def start(cluster: Cluster) -> int:
    """Join the other processes of the run and return their number; a no-op that returns 1 for a single process.

    Call it before the first use of a device. Afterwards a failure of one process ends all of them (`multihost`). Raises
    ValueError for invalid settings, `multihost.PeerLostError` if the cluster cannot be detected. If the others do not
    join in time, this process exits with one line and `multihost.BROKEN_OFF`; jaxlib would abort with a stack trace.
    """
    if jax.distributed.is_initialized():
        return multihost.count()
    if cluster.coordinator is None and (cluster.join == "none" or not _one_of_several(os.environ)):
        return 1
    if cluster.processes == 1:
        return 1
    if backends_are_initialized():
        if cluster.coordinator is None and jax.process_count() == 1:
            return 1
        raise RuntimeError("a device was used before start(cluster): join the other processes first")
    given: dict[str, Any] = {}
    if cluster.coordinator is not None:
        if cluster.process == 0:
            _check_free(cluster.coordinator)
        given = {"coordinator_address": cluster.coordinator, "num_processes": cluster.processes}
        given |= {"process_id": cluster.process, "cluster_detection_method": "deactivate"}
    with _patience(cluster), lost_peer.ends_this_process():
        try:
            jax.distributed.initialize(
                **given,
                local_device_ids=[] if _alone_on_host(os.environ) else None,
                initialization_timeout=cluster.join_timeout + 60,  # our timeout ends first, with one line
                heartbeat_timeout_seconds=cluster.heartbeat,
                shutdown_timeout_seconds=60,
            )
        except (RuntimeError, ValueError, OSError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise multihost.PeerLostError(
                f"the other processes were not found: {reason}; say where they are with --coordinator HOST:PORT "
                "--processes N --process I, or --join none to run on this machine alone"
            ) from error
    if multihost.count() > 1:
        multihost.watch()
        unheard()
    return multihost.count()


def agree(name: str, values: Mapping[str, Any], seconds: float = 3600.0) -> None:
    """ValueError on every process if these values (flat, JSON-able) differ between processes; `name` is for
    messages."""
    if multihost.count() == 1:
        return
    everyone = {
        int(key): json.loads(text) for key, text in multihost.exchange(name, json.dumps(values), seconds).items()
    }
    first = everyone[0]
    for process, theirs in sorted(everyone.items()):
        if theirs != first:
            key = next(key for key in first | theirs if first.get(key) != theirs.get(key))
            raise ValueError(
                f"{name}: {key} is {first.get(key)!r} on process 0 and {theirs.get(key)!r} on process {process}: "
                "all processes must be started alike and see the same files"
            )


def alike(given: Mapping[str, Any]) -> None:
    """ValueError on every process if their command lines differ, except for `Cluster`."""
    agree("command line", {name: str(value) for name, value in given.items() if not isinstance(value, Cluster)})


def once(folder: Path, prepare: Callable[[], T]) -> T:
    """Call `prepare()` first on one of the processes that share `folder`, then on the others.

    `prepare` must reuse existing results, as in a restarted run. Folders that hosts do not share are prepared once per
    host.
    """
    if multihost.count() == 1:
        return prepare()
    ours = [prepare()] if _lowest_in(folder) == multihost.index() else []
    multihost.barrier("prepared", _DAY)  # the same barrier name on all processes, whatever the folder
    return ours[0] if ours else prepare()


def on_process_0(act: Callable[[], T]) -> T | None:
    """Call `act()` on process 0 while the others wait; they return None."""
    result = act() if multihost.index() == 0 else None
    multihost.barrier("process 0 is done", _DAY)
    return result


def all_done() -> None:
    """Final barrier: a process that exits a minute before the others would count as lost and end them."""
    multihost.barrier("all are done", _DAY)


def gathered(tree: Any) -> Any:
    """Gather arrays sharded over all processes as numpy arrays on process 0; None on the others.

    All processes must call it. Arrays are gathered one by one, so no device holds more than one full array.
    """
    if multihost.count() == 1:
        return jax.device_get(tree)

    def replicated(leaf: Any) -> Any:
        if not isinstance(leaf.sharding, NamedSharding) or leaf.is_fully_replicated:
            copy = leaf
        else:
            copy = jax.jit(_itself, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return jax.device_get(copy.addressable_data(0)) if multihost.index() == 0 else None

    return jax.tree.map(replicated, tree)


def _itself(x: Any) -> Any:
    return x


def check_shared(folder: Path) -> None:
    """ValueError on a process that does not see process 0's files in the folder."""
    if multihost.count() > 1 and _lowest_in(folder) != 0:
        raise ValueError(
            f"{folder.absolute()} on {multihost.name()} is not the folder that process 0 writes to: give one that all "
            "processes share, such as a network file system"
        )


def _lowest_in(folder: Path) -> int:
    """The lowest process index that shares this folder, determined by token files of all processes."""
    folder.mkdir(parents=True, exist_ok=True)
    token = f".process-{multihost.index()}-{secrets.token_hex(8)}"
    (folder / token).touch()
    try:
        tokens = multihost.exchange("tokens", token, _DAY)
        lowest = next(number for number in range(multihost.count()) if (folder / tokens[str(number)]).exists())
        multihost.barrier("tokens seen", _DAY)
    finally:
        (folder / token).unlink(missing_ok=True)
    return lowest


def _one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether the environment indicates other processes; jax then detects them."""
    several = (int(environment.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    in_step = "SLURM_STEP_NODELIST" in environment or "OMPI_COMM_WORLD_SIZE" in environment
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    addressed = "JAX_COORDINATOR_ADDRESS" in environment
    return cloud_tpu_init.running_in_cloud_tpu_vm or (in_step and any(several)) or indexed or addressed


def _alone_on_host(environment: Mapping[str, str]) -> bool:
    """Slurm with one process per host: it owns all local devices; jax would assign only the first."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # "1(x4)", "2,1"
    return bool(tasks) and all(part.split("(")[0] == "1" for part in tasks.split(","))


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator {address}: must be HOST:PORT, such as 10.0.0.1:8476")


def _check_free(address: str) -> None:
    """Check that process 0 can listen on the port; otherwise jaxlib crashes."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--coordinator {address}: port {port} of this host cannot be used: {error.strerror}"
            ) from error


@contextmanager
def _patience(cluster: Cluster) -> Iterator[None]:
    """Exit with one line if the block takes longer than `join_timeout` seconds."""

    def give_up() -> None:
        address = global_state.coordinator_address or "an address still to be found"
        who = "all others" if global_state.process_id == 0 else "process 0 and all others"
        print(
            f"error: waited {cluster.join_timeout} s for {who} to join at {address}: does every process run, with the "
            "same coordinator and number of processes, and can it reach that address?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(multihost.BROKEN_OFF)

    timer = threading.Timer(cluster.join_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

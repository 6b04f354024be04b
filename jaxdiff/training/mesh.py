"""Where arrays live: one mesh of three axes, parameters placed by their shapes, batches split by their first axis.

The same code runs on one CPU device and on a pod: an axis of size 1 costs nothing. The axes are

* `data`: copies of the parameters, each with its part of the batch;
* `fsdp`: parameters, optimizer state and averages split, each device with its part of the batch;
* `tensor`: for splitting single layers; nothing is placed on it by the rule of this file.

Axes are `Auto`: the compiler derives every intermediate placement from those of the arguments and results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; one size may be -1: as many as the devices (all, by default) leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    named = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {named}: sizes are at least 1, and at most one of them is -1 (what the others leave)")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh {named} does not fit {len(devices)} devices: the sizes must multiply to that number")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings(tree: Any, mesh: Mesh, minimum: int = 2**16) -> Any:
    """The placement of every array of `tree` (arrays or shapes), as a tree of NamedSharding.

    The largest axis that `fsdp` divides is split over it (the last of equals); an array of fewer than `minimum`
    elements, or with no such axis, is copied to every device. Optimizer state and averages have the shapes of their
    parameters, and so land beside them.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh.shape["fsdp"], minimum)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ValueError for a global batch that does not divide over the devices and the parts it is taken in."""
    devices = batch_devices(mesh)
    if rows % (devices * accumulate):
        raise ValueError(f"a batch of {rows} does not divide over {devices} devices × {accumulate} parts")


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's numpy batch as global arrays, sharded by their first axis; strings (captions) stay on the host."""
    sharding = batch_sharding(mesh)
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
        if array.dtype.kind not in "OSU"
    }


def _spec(shape: tuple[int, ...], parts: int, minimum: int) -> PartitionSpec:
    candidates = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or int(np.prod(shape)) < minimum or not candidates:
        return PartitionSpec()
    axis = max(candidates)[1]
    return PartitionSpec(*(None,) * axis, "fsdp")

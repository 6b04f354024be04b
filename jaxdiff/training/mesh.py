"""The device mesh with three axes, and the sharding of batches.

The same code runs on one CPU device and on a pod of several slices: an axis of size 1 costs nothing. The axes are

* `data`: replicas of the parameters, each with its part of the batch;
* `fsdp`: parameters, optimizer state and averages sharded, each device with its part of the batch;
* `tensor`: layers sharded by channels, or images by rows.

Axes are `Auto`: the compiler derives intermediate placements from those of the arguments and results. Parameters are
placed by `param_sharding.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or an abstract one for planning."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; one may be -1: the remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.sizes))

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.data, self.fsdp, self.tensor

    def over(self, devices: int) -> "MeshShape":
        """Resolve -1 for `devices` devices. ValueError if the sizes do not multiply to that number."""
        sizes = list(self.sizes)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh {self}: sizes are at least 1, and at most one of them is -1 (what the others leave)"
            )
        if -1 in sizes:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = devices // known if devices % known == 0 else 0
        if math.prod(sizes) != devices:
            raise ValueError(f"mesh {self} does not fit {devices} devices: the sizes must multiply to that number")
        return MeshShape(*sizes)


def parse(text: str) -> MeshShape:
    """`data=8,fsdp=32` → MeshShape. Omitted axes are 1, except `data`, which is -1. ValueError for other text."""
    sizes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(rf"({'|'.join(AXES)})=(-?\d+)", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"mesh {text!r}: write sizes of {', '.join(AXES)}, each once, as in data=8,fsdp=32")
        sizes[match[1]] = int(match[2])
    if -1 in sizes.values():
        sizes.setdefault("data", 1)
    return MeshShape(**sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; one size may be -1: the remaining devices (of all, by default).

    Neighbours in the network become neighbours in the mesh. Slices are connected only by the slower data-centre
    network, so `data` is split over slices first, and `fsdp` only by the remaining factor. Raises ValueError if the
    sizes do not multiply to the number of devices, or the slices do not divide them.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = MeshShape(data, fsdp, tensor).over(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    copies = math.gcd(shape.data, slices)
    across = slices // copies
    if shape.fsdp % across:
        raise ValueError(f"mesh {shape} does not fit {slices} slices: data, or else fsdp, must be a multiple of them")
    inside = (shape.data // copies, shape.fsdp // across, shape.tensor)
    grids = [_neighbours(inside, part) for part in _groups_by(devices, "slice_index")]
    fitting = [grid for grid in grids if grid is not None]
    if len(fitting) < len(grids):
        raise ValueError(f"mesh {shape}: not possible on this topology, choose other sizes")
    # copies × across slices, each a grid of data × fsdp × tensor.
    grid = np.stack(fitting).reshape(copies, across, *inside).transpose(0, 2, 1, 3, 4).reshape(shape.sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _neighbours(sizes: tuple[int, int, int], devices: list[Any]) -> np.ndarray | None:
    """The devices of a slice as a grid; None if its topology does not allow the shape.

    Physical axes are kept together if possible. Keeping the devices along `tensor` in one process takes precedence:
    they compute on the same images, which only that process has read.
    """
    hosts = _groups_by(devices, "process_index")
    fsdp = math.gcd(sizes[1], len(hosts[0]) // sizes[2])
    host = (len(hosts[0]) // sizes[2] // fsdp, fsdp, sizes[2])  # the part of the grid of one process
    result = None
    for split in (False, True):
        with suppress(NotImplementedError):
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
            if _within_processes(grid):
                return grid
            result = grid if result is None else result
    if math.prod(host) == len(hosts[0]) and sizes[0] % host[0] == 0:
        with suppress(NotImplementedError):
            outside = (sizes[0] // host[0], sizes[1] // fsdp, 1)
            return mesh_utils.create_hybrid_device_mesh(
                host, outside, devices, process_is_granule=True, allow_split_physical_axes=True
            )
    return result


def _groups_by(devices: Sequence[Any], attribute: str) -> list[list[Any]]:
    """The devices grouped by slice or process, in order."""
    number = lambda device: getattr(device, attribute, 0)  # noqa: E731
    return [[device for device in devices if number(device) == part] for part in sorted(set(map(number, devices)))]


def _within_processes(grid: np.ndarray) -> bool:
    """Whether all devices along `tensor`, the last axis, belong to one process."""
    return all(len({device.process_index for device in group}) == 1 for group in grid.reshape(-1, grid.shape[-1]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: AnyMesh) -> int:
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(rows: int, mesh: AnyMesh, accumulate: int = 1) -> None:
    """ValueError for a global batch that does not divide over the devices and microbatches."""
    devices = batch_devices(mesh)
    if rows < 1 or accumulate < 1:
        raise ValueError(f"a batch of {rows} in {accumulate} parts: both are at least 1")
    if rows % (devices * accumulate):
        raise ValueError(f"a batch of {rows} does not divide over {devices} devices × {accumulate} parts")


def check_processes(mesh: Mesh) -> None:
    """ValueError if `tensor` spans processes: a process would need rows of the batch that it has not read."""
    if not _within_processes(mesh.devices):
        own, tensor = len(mesh.local_devices), mesh.shape["tensor"]
        raise ValueError(f"tensor={tensor} does not divide the {own} devices of a process: choose one that does")


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's numpy batch as global arrays, sharded by their first axis; strings (captions) stay on the host."""
    sharding, processes = batch_sharding(mesh), len({device.process_index for device in mesh.devices.flat})
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (len(array) * processes, *array.shape[1:]))
        for name, array in arrays.items()
        if array.dtype.kind not in "OSU"
    }

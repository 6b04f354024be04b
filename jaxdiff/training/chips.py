"""Accelerators for planning: published rates, and topology descriptions for ahead-of-time compilation with XLA."""

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.training import gpu_targets
from jaxdiff.training.gpu_targets import Card

GB, GIB, TERA = 1e9, 2.0**30, 1e12

PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090 Ti": 80,
    "RTX 3090": 71,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 2307 / 2,
}
"""Dense bfloat16 peaks per device, from data sheets, by a substring of JAX's device name; the first match counts."""


@dataclass(frozen=True)
class Chip:
    """Rates of one chip, from the vendor's data sheet (November 2026).

    peak: dense bfloat16 FLOP/s. memory: bytes; bandwidth: memory bandwidth in bytes/s. interconnect: receive bandwidth
    of all links of a chip, bytes/s, half of the published bidirectional value. largest: chips of the largest slice
    (TPUs). units: cores × matrix units × multipliers of each, if the published numbers agree with the peak. devices:
    JAX devices per chip. config: libtpu's config name for this kind. card: the GPU description for the CUDA compiler.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    interconnect: float
    largest: int = 0
    units: int | None = None
    devices: int = 1
    config: str | None = None
    card: Card | None = None

    @property
    def clock(self) -> float | None:
        """Cycles a second at which the matrix units reach the peak: 1.05 GHz (v4), 1.50 (v5e), 1.75 (v5p)."""
        return None if self.units is None else self.peak / (2 * self.units)


V4 = Chip("v4", PEAK_TFLOPS["TPU v4"] * TERA, 32 * GIB, 1228 * GB, 300 * GB, 4096, 2 * 4 * 128**2, config="megacore")
V5E = Chip("v5e", PEAK_TFLOPS["TPU v5 lite"] * TERA, 16 * GIB, 819 * GB, 200 * GB, 256, 4 * 128**2)
V5P = Chip("v5p", PEAK_TFLOPS["TPU v5"] * TERA, 95 * GIB, 2765 * GB, 600 * GB, 8960, 2 * 4 * 128**2)
V6E = Chip("v6e", PEAK_TFLOPS["TPU v6 lite"] * TERA, 32 * GIB, 1638 * GB, 400 * GB, 256)
TPU7X = Chip("tpu7x", 2 * PEAK_TFLOPS["TPU7x"] * TERA, 192 * GIB, 7380 * GB, 600 * GB, 9216, devices=2)
A100 = Chip("a100", PEAK_TFLOPS["A100"] * TERA, 80 * GB, 2039 * GB, 300 * GB, card=gpu_targets.A100)
H100 = Chip("h100", PEAK_TFLOPS["H100"] * TERA, 80 * GB, 3350 * GB, 450 * GB, card=gpu_targets.H100)
H200 = Chip("h200", PEAK_TFLOPS["H200"] * TERA, 141 * GB, 4800 * GB, 450 * GB, card=gpu_targets.H200)
B200 = Chip("b200", PEAK_TFLOPS["B200"] * TERA, 180 * GB, 7700 * GB, 900 * GB, card=gpu_targets.B200)
# Connected by PCIe 4.0 ×16; NVLink connects at most two RTX 3090.
L4 = Chip("l4", PEAK_TFLOPS["L4"] * TERA, 24 * GB, 300 * GB, 32 * GB, card=gpu_targets.L4)
RTX_4090 = Chip("rtx4090", PEAK_TFLOPS["RTX 4090"] * TERA, 24 * GB, 1008 * GB, 32 * GB, card=gpu_targets.RTX_4090)
RTX_3090 = Chip("rtx3090", PEAK_TFLOPS["RTX 3090"] * TERA, 24 * GB, 936 * GB, 32 * GB, card=gpu_targets.RTX_3090)

TPUS = (V4, V5E, V5P, V6E, TPU7X)
GPUS = (A100, H100, H200, B200, L4, RTX_4090, RTX_3090)
GPUS_OF_A_HOST = 8


@dataclass(frozen=True)
class Topology:
    """Chips connected by a fast interconnect: `v5p:4x8x8` (a slice), `h100:8` (a host)."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def link(self) -> float:
        """Receive bandwidth of one link, bytes/s; TPUs have two links per axis."""
        return self.chip.interconnect / (2 * len(self.shape))

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis is a ring: multiples of 4x4x4 cubes with three axes, sides of 16 with two axes."""
        cubes = len(self.shape) == 3 and all(side % 4 == 0 for side in self.shape)
        return tuple(cubes or (side == 16 and len(self.shape) == 2) for side in self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.chip in TPUS


def parse(text: str) -> Topology:
    """`v5e:16x16`, `v5p:4x8x8`, `h100:8` → Topology. ValueError that lists the choices."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    chip = next((chip for chip in (*TPUS, *GPUS) if match and chip.name == match[1]), None)
    shape = tuple(map(int, match[2].split("x"))) if match else ()
    # v5e and v6e are 2D tori; v4, v5p and tpu7x have three axes; GPUs have a count.
    axes = 1 if chip in GPUS else 2 if chip in (V5E, V6E) else 3
    if chip is None or len(shape) != axes or 0 in shape:
        raise ValueError(
            f"topology {text!r}: write the chip and its shape, as in v5e:16x16, v6e:16x16, v4:4x8x8, v5p:4x8x8, "
            f"tpu7x:4x8x8 or h100:8 (GPUs: {', '.join(chip.name for chip in GPUS)})"
        )
    if chip in GPUS and shape[0] > GPUS_OF_A_HOST:
        raise ValueError(f"topology {text!r}: plans for GPUs are of one host, which has at most {GPUS_OF_A_HOST}")
    if chip in TPUS:
        _check_slice(text, chip, shape)
    return Topology(chip, shape)


def _check_slice(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """ValueError for a nonexistent slice, whose compilation would run out of memory."""
    if math.prod(shape) > chip.largest:
        raise ValueError(
            f"topology {text!r}: {math.prod(shape):,} chips, and the largest slice of {chip.name} has {chip.largest:,}"
        )
    if len(shape) == 2 and max(shape) > math.isqrt(chip.largest):
        raise ValueError(f"topology {text!r}: sides of {chip.name} are at most {math.isqrt(chip.largest)}")
    if len(shape) == 3 and not set(shape) <= {1, 2, 4} and any(side % 4 for side in shape):
        raise ValueError(f"topology {text!r}: sides of {chip.name} are 1, 2 or 4, or all of them multiples of 4")


def links_of(groups: np.ndarray, topology: Topology) -> float:
    """The number of links from which a chip receives in collectives among groups of chips.

    Along an axis of the network, a full ring gives two links, part of an axis (or a full open axis) one; interleaved
    groups share them. A group that is not a box counts one axis only; a single chip gives 0.

    Args:
        groups: (groups members axes) coordinates of the chips of each group; the minimum over groups is returned
    """

    def along(axis: int, held: Sequence[int]) -> float:
        if len(held) == 1:
            return 0.0
        stride = min(after - before for before, after in itertools.pairwise(held))
        ring = topology.rings[axis] and len(held) * stride == topology.shape[axis]
        return (2 if ring else 1) / stride

    def of_group(group: np.ndarray) -> float:
        held = [sorted(set(places)) for places in group.T.tolist()]
        numbers = [along(axis, places) for axis, places in enumerate(held)]
        if len(np.unique(group, axis=0)) == math.prod(map(len, held)):
            return sum(numbers)
        return min(number for number in numbers if number)

    return min(map(of_group, groups))


def links(devices: np.ndarray, topology: Topology) -> list[float]:
    """The number of links from which a chip receives along each axis of a device grid (`Mesh.devices`)."""
    places = np.array([device.coords for device in devices.flat]).reshape(*devices.shape, -1)[
        ..., : len(topology.shape)
    ]
    axes = range(devices.ndim)
    return [
        links_of(np.moveaxis(places, axis, -2).reshape(-1, devices.shape[axis], places.shape[-1]), topology)
        for axis in axes
    ]


# Without them libtpu queries a metadata server, requires exclusive use of the machine, and prints warnings.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def missing_compiler(topology: Topology) -> str | None:
    """Why compilation for these chips is unavailable, in one line that says what to install; None if available."""
    if not topology.is_tpu:
        return gpu_targets.missing()
    if importlib.util.find_spec("libtpu") is None:
        return "the TPUs' compiler is not installed: pip install -e '.[tpu]' (no TPU has to be there)"
    return None


def compiler_options(topology: Topology) -> dict[str, str | bool | int | float]:
    """Compiler options for ahead-of-time compilation: `lowered.compile(compiler_options=…)`."""
    return {} if topology.is_tpu else dict(gpu_targets.COMPILER_OPTIONS)


def described(topology: Topology, slices: int = 1) -> list[Any]:
    """Abstract devices of TPU slices or of a GPU host, for ahead-of-time compilation. OSError if the compiler is
    missing (`missing_compiler`) or fails; ValueError for no slices, or several slices of GPUs.

    For TPUs, sets unset environment variables of libtpu for the rest of the process.
    """
    if slices < 1:
        raise ValueError(f"{slices} slices of {topology}: at least 1")
    if topology.chip.card is None:
        return _slices(topology, slices)
    if slices > 1:
        raise ValueError(f"{slices} slices of {topology}: GPUs are planned for on one host")
    target = gpu_targets.target_text(topology.chip.card, topology.chip.memory, topology.chip.bandwidth)
    return list(gpu_targets.devices(target, topology.devices))


def _slices(topology: Topology, slices: int) -> list[Any]:
    from jax.experimental import topologies

    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    chip = topology.chip
    settings: dict[str, str | int] = {} if chip.config is None else {"chip_config_name": chip.config}
    settings |= {} if slices == 1 else {"num_slices": slices}
    try:
        devices = topologies.get_topology_desc(str(topology), "tpu", **settings).devices
    except Exception as error:  # libtpu raises several types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot describe {topology}: {reason} (libtpu compiles for TPUs: pip install libtpu)") from error
    if len(devices) != slices * topology.devices:
        expected = slices * topology.devices
        raise OSError(f"libtpu shows {topology} as {len(devices)} devices, not {expected}: another libtpu?")
    return list(devices)

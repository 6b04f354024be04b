"""Descriptions of NVIDIA GPUs for ahead-of-time compilation with XLA's CUDA compiler.

The compiler takes a `GpuTargetConfigProto` as text instead of a card name. `Card` has the fields that differ between
cards and affect the program; the others are constant.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB, MIB = 2**10, 2**20

PLUGINS = {"jax_cuda13_plugin": "jax_plugins.xla_cuda13", "jax_cuda12_plugin": "jax_plugins.xla_cuda12"}
"""The packages of `jax[cuda13]` or `jax[cuda12]` with the compiler, and the modules that register them with JAX."""

NOT_COUNTED = "cuDNN's workspace, which is chosen on the card, and what the CUDA driver itself keeps"
"""Memory that is not counted when a program is compiled without a card."""

COMPILER_OPTIONS: dict[str, str | bool | int | float] = {"xla_gpu_enable_triton_gemm": False}
"""Use cuBLAS for matrix products. With a card, XLA benchmarks its own kernels against cuBLAS. Without one it uses its
own untimed, and fails for shapes that do not fit their default tiles, such as upsampling the input of super-resolution
("Couldn't find output tile sizes", jax 0.10.1)."""


@dataclass(frozen=True)
class Card:
    """A card, without its memory size and bandwidth.

    name: JAX's name. capability: CUDA compute capability. sms: streaming multiprocessors; lanes: float32 units per SM;
    clock: boost clock in GHz; tensor: dense bfloat16 FLOPs per SM and cycle with float32 accumulation. l2: bytes.
    shared: bytes of shared memory per SM, of which a block may use all but 1 KiB. threads: resident threads per SM.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    lanes: int
    clock: float
    tensor: int
    l2: int
    shared: int
    threads: int

    @property
    def accelerated(self) -> bool:
        """Whether the compiler may use architecture-specific instructions (sm_90a, sm_100a)."""
        return self.capability >= (9, 0)


# Sources, all of NVIDIA: the whitepapers of A100 (2020), GA102 (2021, RTX 3090), H100 (2022) and Ada (2023, RTX 4090);
# the data sheets of H200 (2024), L4 (2023) and B200 (2025). Shared memory and threads: table "Technical Specifications
# per Compute Capability" of the CUDA C++ Programming Guide. The boost clock of the L4 and the cache and the clocks of
# H100 and B200 are not in the data sheets; they are the driver's values (also in XLA's own descriptions).
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2048, 40 * MIB, 164 * KIB, 2048)
RTX_3090 = Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 128, 1.695, 512, 6 * MIB, 100 * KIB, 1536)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 2.52, 512, 72 * MIB, 100 * KIB, 1536)
L4 = Card("NVIDIA L4", (8, 9), 58, 128, 2.04, 1024, 48 * MIB, 100 * KIB, 1536)
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 4096, 50 * MIB, 228 * KIB, 2048)
H200 = Card("NVIDIA H200", (9, 0), 132, 128, 1.98, 4096, 50 * MIB, 228 * KIB, 2048)
B200 = Card("NVIDIA B200", (10, 0), 148, 128, 1.965, 8192, 126 * MIB, 228 * KIB, 2048)


def target_text(card: Card, memory: float, bandwidth: float) -> str:
    """The card as a `GpuTargetConfigProto` in text form. Without `threads_per_warp` or `block_dim_limit_x` the compiler
    crashes the process with a division by zero.

    Args:
        memory: bytes; bandwidth: memory bandwidth in bytes/s
    """
    major, minor = card.capability
    feature = "ACCELERATED_FEATURES" if card.accelerated else "NONE"
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared - KIB}
  threads_per_core_limit: {card.threads}
  core_count: {card.sms}
  fpus_per_core: {card.lanes}
  clock_rate_ghz: {card.clock}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {round(bandwidth)}
  device_memory_size: {round(memory)}
  l2_cache_size: {card.l2}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
device_description_str: "{card.name}"
"""


def missing() -> str | None:
    """Why compilation for GPUs is unavailable, in one line; None if available."""
    if _plugin() is not None:
        return None
    return "XLA's CUDA compiler is not installed: pip install -e '.[cuda]' (no GPU has to be there)"


def _plugin() -> str | None:
    return next((module for plugin, module in PLUGINS.items() if importlib.util.find_spec(plugin)), None)


def devices(target: str, count: int) -> Sequence[Any]:
    """`count` abstract devices of one host. OSError, in one line, if the compiler is missing or fails.

    Without a card, sets JAX_SKIP_CUDA_CONSTRAINTS_CHECK for the rest of the process unless it is set: without a driver
    that check fails, and JAX ignores the plugin. JAX itself still computes on the CPU.

    Args:
        target: from `target_text`
    """
    plugin = _plugin()
    if plugin is None:
        raise OSError(missing())
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        try:
            return _described(target, count)
        except NotImplementedError:  # JAX has already initialised its plugins and ignored this one
            importlib.import_module(plugin).initialize()
            return _described(target, count)
    except Exception as error:  # the plugin raises several types
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"XLA's CUDA compiler describes no GPUs here: {text}") from error


def _described(target: str, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc("", platform="cuda", target_config=target, topology=f"1x1x{count}").devices

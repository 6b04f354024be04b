"""All uses of jax's internals. Each may change with any release of jax; no other file imports `jax._src`.

If one is missing, importing this file raises a one-line ImportError with the supported versions.
"""

from typing import Any

import jax

SUPPORTED = ">=0.10,!=0.10.2,!=0.11.0,<0.13"
"""Supported versions of jax, as in pyproject.toml."""

try:
    # Whether this machine is a TPU VM, possibly one of several, before any device is used. A public form of
    # `jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params` could replace it; jax.distributed.initialize
    # detects other machines, but only to join them.
    from jax._src import cloud_tpu_init

    # The state of jax.distributed: process index and count, the address of process 0, and the client of the
    # coordination service, whose key-value store and barriers need no device. Public are jax.distributed.is_initialized
    # and, once devices are used, jax.process_index and jax.process_count. A public key-value store could replace this.
    from jax._src.distributed import global_state

    # The module of jaxlib whose `get_distributed_runtime_client` creates that client and takes the callback for lost
    # processes. Such an argument of jax.distributed.initialize could replace it.
    from jax._src.lib import _jax as jaxlib_module

    # Whether a device has been used, after which it is too late to join other processes. A public function of that
    # name, for example in jax.extend.backend, could replace it.
    from jax._src.xla_bridge import backends_are_initialized

    _USED = (
        cloud_tpu_init.running_in_cloud_tpu_vm,
        (global_state.client, global_state.process_id, global_state.num_processes, global_state.coordinator_address),
        jaxlib_module.get_distributed_runtime_client,
    )
except (ImportError, AttributeError) as error:
    raise ImportError(f"jax {jax.__version__} is not supported, only jax{SUPPORTED}: {error}") from error

__all__ = ["SUPPORTED", "backends_are_initialized", "cloud_tpu_init", "coordination", "global_state", "jaxlib_module"]


def coordination() -> Any:
    """The client of the coordination service. RuntimeError if jax.distributed is not initialized."""
    if global_state.client is None:
        raise RuntimeError("jax.distributed is not initialized: there is no coordination service")
    return global_state.client

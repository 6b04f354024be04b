"""All that jaxdiff uses of jax's internals. Each may change with any release of jax; nothing else imports `jax._src`.

Where one is missing, importing this file raises an ImportError of one line that says which versions are supported.
"""

from typing import Any

import jax

SUPPORTED = ">=0.10,!=0.10.2,!=0.11.0,<0.13"
"""Versions of jax, as in pyproject.toml."""

try:
    # Whether this machine is a TPU VM, which may be one of several, before any device is used. To be replaced by a
    # public form of `jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params`: jax.distributed.initialize
    # looks for other machines itself, but only to join them.
    from jax._src import cloud_tpu_init

    # The state of jax.distributed: this process's number, how many there are, where process 0 is, and the client of the
    # coordination service, whose key-value store and barriers need no device. Public are jax.distributed.is_initialized
    # and, once devices are used, jax.process_index and jax.process_count; a public key-value store would replace this.
    from jax._src.distributed import global_state

    # The module of jaxlib whose `get_distributed_runtime_client` makes that client: the callback for lost processes is
    # given to it. To be replaced by such an argument of jax.distributed.initialize.
    from jax._src.lib import _jax as jaxlib_module

    # Whether a device has been used, after which it is too late to join other processes. To be replaced by a public
    # function of that name, in jax.extend.backend for example.
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
    """The client of the coordination service. RuntimeError where this process has joined no others."""
    if global_state.client is None:
        raise RuntimeError("jax.distributed is not initialized: there is no coordination service")
    return global_state.client

"""How a network is executed: compute type, rematerialization, loops over equal blocks, sharding of activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.nets.activation_sharding import ActivationSharding

Remat = Literal["none", "outputs", "blocks"]

HOW = {"how": True}
"""Metadata of settings that affect only the execution; they are not saved with the model."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How the network is executed. Only `dtype` affects the output.

    dtype: compute type; parameters stay float32.
    remat: what the backward pass recomputes to save memory: `none`; `outputs`: everything except the outputs of
    convolutions and of matrix products with parameters; `blocks`: every block, from its inputs.
    scan: run consecutive blocks of one shape as a loop, which compiles faster (residual blocks of the Efficient U-Net,
    transformer blocks of the latent U-Net).
    sharding: the mesh axes over which activations are sharded.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = field(default="none", metadata=HOW)
    scan: bool = field(default=False, metadata=HOW)
    sharding: ActivationSharding = field(default=ActivationSharding(), metadata=HOW)

    def rematerialized(self, transform: Callable, block: Any) -> Any:
        """Apply `remat` to a block. transform: `nn.remat` for a module's class, `jax.checkpoint` for a function."""
        return block if self.remat == "none" else transform(block, policy=_outputs if self.remat == "outputs" else None)


def in_loop(
    execution: ExecutionConfig, params: Sequence[dict], apply: Callable[[Array, dict], Array], x: Array
) -> Array:
    """Blocks of one shape, one after the other, as a loop that is compiled once. params: of each block; they keep their
    names in the network and are stacked here, so that checkpoints do not depend on `scan`."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def body(x: Array, params: dict) -> tuple[Array, None]:
        return apply(x, params), None

    return jax.lax.scan(execution.rematerialized(jax.checkpoint, body), x, stacked)[0]


def _outputs(primitive: Any, *inputs: Any, **settings: Any) -> bool:
    """Checkpoint policy: save convolutions and matrix products, except those of attention, which have batch axes."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **settings)

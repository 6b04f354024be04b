"""One training step as one compiled program: gradients, clipping, update, average, counters.

The loss is a mean over the global batch, so under a sharded batch the compiler itself takes the gradient's mean over
the devices; clipping comes after it. Every device draws from the same key, folded with the step: loss and gradient are
the same on every mesh shape.

Parameters that lie split over `fsdp` are made whole once a step, in the type that the network computes with, and their
gradients are summed straight into the parts. Left to itself the compiler may split the convolutions instead, and move
pictures between devices where kernels are smaller; and its gradient of a strided convolution is wrong where both the
kernel and the rows of the picture are split (XLA of jax 0.10 to 0.12).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.optimizer import OptimizerConfig, optimizer, schedule
from jaxdiff.training.param_sharding import without_fsdp
from jaxdiff.training.state import Extra, Metrics, Trainable, TrainState

Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


def make_step(
    trainable: Trainable,
    config: OptimizerConfig,
    placements: TrainState,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.9999,
    ema_warmup: bool = True,
) -> Step:
    """`step(state, batch, key) -> (state, metrics)`, compiled; the given state's memory is reused (donated).

    `placements`: the state with a NamedSharding for every array. `key` is the run's, the same at every step.
    `accumulate`: the batch is taken in that many parts, one after the other, with the mean of their gradients (part i's
    key is folded with i). `ema_warmup`: decay min(ema_decay, (1 + n) / (10 + n)) after n updates.

    A loss, gradient or update that is not finite changes the counters only. Metrics are scalars on the devices: the
    trainable's own, and loss, grad_norm (before clipping), learning_rate, skipped, consecutive_skips and
    max_consecutive_skips.
    """
    update = optimizer(config)
    rate = schedule(config)
    mesh = placements.step.mesh

    def step(state: TrainState, batch: Any, key: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        loss, own_metrics, grads, extra = _gradients(trainable, state, batch, key, accumulate, placements)
        norm = optax.tree.norm(grads)

        made = state.step - state.skipped  # updates before this one
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        decay = _ema_decay(made + 1, ema_decay, ema_warmup)
        as_float32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        ema = optax.incremental_update(as_float32, state.ema, 1.0 - decay)

        changed = (params, extra, ema, opt_state)
        kept = (state.params, state.extra, state.ema, state.opt_state)
        params, extra, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        consecutive_skips = jnp.where(finite, 0, state.consecutive_skips + 1)
        new = TrainState(
            step=state.step + 1,
            params=params,
            extra=extra,
            ema=ema,
            opt_state=opt_state,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            consecutive_skips=consecutive_skips,
            max_consecutive_skips=jnp.maximum(state.max_consecutive_skips, consecutive_skips),
        )
        counters = {
            "skipped": new.skipped,
            "consecutive_skips": new.consecutive_skips,
            "max_consecutive_skips": new.max_consecutive_skips,
        }
        metrics = {**own_metrics, "loss": loss, "grad_norm": norm, "learning_rate": rate(made), **counters}
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(placements, NamedSharding(mesh, PartitionSpec())))


def _gradients(
    trainable: Trainable, state: TrainState, batch: Any, key: Any, accumulate: int, placements: TrainState
) -> tuple[Any, Metrics, Any, Extra]:
    """Loss, metrics and gradient (placed like the parameters): means over the `accumulate` parts of the batch; and what
    they make of `extra`, one after the other."""

    def part(extra: Extra, rows: Any, key: Any) -> tuple[tuple[Any, Metrics, Any], Extra]:
        gradient = jax.value_and_grad(trainable.loss, has_aux=True)
        (loss, (metrics, extra)), grads = gradient(whole, extra, (), rows, key, state.step)
        grads = jax.lax.with_sharding_constraint(grads, placements.params)
        return (loss, metrics, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)), extra

    mesh = placements.step.mesh
    cast = trainable.cast(state.params)
    whole = jax.lax.with_sharding_constraint(cast, jax.tree.map(without_fsdp, placements.params))
    if accumulate == 1:
        result, extra = part(state.extra, batch, key)
        return *result, extra

    def split(x: Any) -> Any:
        # Part i takes rows i, i + accumulate, …: each device's rows stay on it, whatever part they fall into.
        parts = jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def add(carry: tuple[Any, Extra], indexed: tuple[Any, Any]) -> tuple[tuple[Any, Extra], None]:
        (total, extra), (index, rows) = carry, indexed
        result, extra = part(extra, rows, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, result), extra), None

    parts = jax.tree.map(split, batch)
    shapes, _ = jax.eval_shape(part, state.extra, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, extra), _ = jax.lax.scan(add, (zeros, state.extra), (jnp.arange(accumulate), parts))
    return *jax.tree.map(lambda x: x / accumulate, total), extra


def _ema_decay(updates: Any, decay: float, warmup: bool) -> Any:
    return jnp.minimum(decay, (1.0 + updates) / (10.0 + updates)) if warmup else jnp.float32(decay)

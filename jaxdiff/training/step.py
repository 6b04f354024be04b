"""One training step as one compiled program: gradients, clipping, update, average, counters.

The loss is a mean over the global batch, so with a sharded batch the compiler averages the gradient over the devices;
clipping follows. All devices use the same key, folded with the step, so loss and gradient are the same on every mesh
shape.

Parameters sharded over `fsdp` are gathered once per step, in the network's compute type, and their gradients are
reduce-scattered. Without these constraints the compiler may split the convolutions, and move images between devices
instead of smaller kernels; and its gradient of a strided convolution is wrong if both the kernel and the rows of the
image are sharded (XLA of jax 0.10 to 0.12).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.optimizer import STAYS, Optimizers, learning_rates
from jaxdiff.training.param_sharding import without_fsdp
from jaxdiff.training.state import Extra, Labels, Metrics, Params, Trainable, TrainState, update_rule

Step = Callable[..., tuple[TrainState, Metrics]]


def make_step(
    trainable: Trainable,
    config: Optimizers,
    placements: TrainState,
    *,
    frozen: Any = (),
    accumulate: int = 1,
    ema_decay: float = 0.9999,
    ema_warmup: bool = True,
) -> Step:
    """Returns the compiled `step(state, batch, key, frozen=()) -> (state, metrics)`, which donates `state`.

    placements: the state with a NamedSharding for every array. frozen: likewise for the loss's frozen arrays.
    accumulate: number of microbatches, run in sequence; their gradients are averaged, microbatch i's key is folded with
    i, and `extra` is passed from one to the next. ema_warmup: decay min(ema_decay, (1 + n) / (10 + n)) after n updates.
    `key` is the run's, the same at every step.

    A non-finite loss, gradient, update or extra changes only the counters. Metrics are scalars on the devices: the
    trainable's, and loss, grad_norm (before clipping, over all labels), learning_rate (with several labels
    learning_rate_LABEL), skipped, consecutive_skips and max_consecutive_skips.
    """
    rule, labels = update_rule(trainable, config), trainable.labels(placements.params)
    gradients = _Gradients(trainable, placements, frozen, accumulate)
    mesh = placements.step.mesh

    def step(state: TrainState, batch: Any, key: Any, frozen: Any = ()) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        loss, own_metrics, grads, extra = gradients(state, frozen, batch, key)
        norm = optax.tree.norm(grads)

        update_count = state.step - state.skipped  # updates before this one
        updates, opt_state = rule.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates)) & _finite(extra)
        params = optax.apply_updates(state.params, updates)
        ema = _averaged(state.ema, params, labels, _ema_decay(update_count + 1, ema_decay, ema_warmup))

        changed = (params, extra, ema, opt_state)
        kept = (state.params, state.extra, state.ema, state.opt_state)
        params, extra, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        counters = _counted(state, finite)
        new = TrainState(state.step + 1, params, extra, ema, opt_state, **counters)
        metrics = {**own_metrics, "loss": loss, "grad_norm": norm, **learning_rates(config, update_count), **counters}
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(placements, NamedSharding(mesh, PartitionSpec())))


@dataclass(frozen=True)
class _Gradients:
    """Loss, metrics and gradient (sharded like the parameters), averaged over `accumulate` microbatches; and `extra`,
    updated by each in turn."""

    trainable: Trainable
    placements: TrainState
    frozen: Any  # placements
    accumulate: int

    def __call__(self, state: TrainState, frozen: Any, batch: Any, key: Any) -> tuple[Any, Metrics, Any, Extra]:
        gathered = _gathered(self.trainable.cast(state.params), self.placements.params)
        frozen = _gathered(frozen, self.frozen)

        def part(extra: Extra, rows: Any, key: Any) -> tuple[tuple[Any, Metrics, Any], Extra]:
            gradient = jax.value_and_grad(self._loss, has_aux=True)
            extra = _gathered(extra, self.placements.extra)
            (loss, (metrics, extra)), grads = gradient(gathered, extra, frozen, rows, key, state.step)
            grads = jax.lax.with_sharding_constraint(grads, self.placements.params)
            extra = jax.lax.with_sharding_constraint(extra, self.placements.extra)
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)
            return (loss, metrics, grads), extra

        if self.accumulate == 1:
            result, extra = part(state.extra, batch, key)
            return *result, extra

        def add(carry: tuple[Any, Extra], indexed: tuple[Any, Any]) -> tuple[tuple[Any, Extra], None]:
            (total, extra), (index, rows) = carry, indexed
            result, extra = part(extra, rows, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, result), extra), None

        microbatches = jax.tree.map(self._split, batch)
        shapes, _ = jax.eval_shape(part, state.extra, jax.tree.map(lambda x: x[0], microbatches), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, extra), _ = jax.lax.scan(add, (zeros, state.extra), (jnp.arange(self.accumulate), microbatches))
        return *jax.tree.map(lambda x: x / self.accumulate, total), extra

    def _loss(self, params: Params, *rest: Any) -> tuple[Any, tuple[Metrics, Extra]]:
        """The loss, without gradients for arrays that are not updated."""
        stop = lambda leaf, label: jax.lax.stop_gradient(leaf) if label == STAYS else leaf  # noqa: E731
        return self.trainable.loss(jax.tree.map(stop, params, self.trainable.labels(params)), *rest)

    def _split(self, x: Any) -> Any:
        # Microbatch i takes rows i, i + accumulate, …, so that all rows stay on their device.
        microbatches = jnp.moveaxis(x.reshape(-1, self.accumulate, *x.shape[1:]), 1, 0)
        sharding = NamedSharding(self.placements.step.mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(microbatches, sharding)


def _gathered(tree: Any, placements: Any) -> Any:
    """The tree, gathered along `fsdp`."""
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(without_fsdp, placements))


def _averaged(ema: Params, params: Params, labels: Labels, decay: Any) -> Params:
    """The next float32 average; unchanged for arrays that are not updated."""
    as_float32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    new = optax.incremental_update(as_float32, ema, 1.0 - decay)
    return jax.tree.map(lambda label, new, old: old if label == STAYS else new, labels, new, ema)


def _finite(tree: Any) -> Any:
    """Whether all numbers of a tree are finite."""
    return jax.tree.reduce(lambda total, leaf: total & jnp.isfinite(leaf).all(), tree, jnp.bool_(True))


def _counted(state: TrainState, finite: Any) -> dict[str, Any]:
    """The counters of skipped steps, after this step."""
    consecutive_skips = jnp.where(finite, 0, state.consecutive_skips + 1)
    return {
        "skipped": state.skipped + jnp.where(finite, 0, 1),
        "consecutive_skips": consecutive_skips,
        "max_consecutive_skips": jnp.maximum(state.max_consecutive_skips, consecutive_skips),
    }


def _ema_decay(updates: Any, decay: float, warmup: bool) -> Any:
    return jnp.minimum(decay, (1.0 + updates) / (10.0 + updates)) if warmup else jnp.float32(decay)

"""One training step as one compiled program: gradients, clipping, update, average, counters.

The loss is a mean over the global batch, so under a sharded batch the compiler itself takes the gradient's mean over
the devices; clipping comes after it. Every device draws from the same key, folded with the step: loss and gradient are
the same on every mesh shape.

Parameters that lie split over `fsdp` are made whole once a step, in the type that the network computes with, and their
gradients are summed straight into the parts. Left to itself the compiler may split the convolutions instead, and move
images between devices where kernels are smaller; and its gradient of a strided convolution is wrong where both the
kernel and the rows of the image are split (XLA of jax 0.10 to 0.12).
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
    """`step(state, batch, key, frozen=()) -> (state, metrics)`, compiled; the given state's memory is reused (donated).

    `placements`: the state with a NamedSharding for every array; `frozen`: the same of what the loss reads and never
    updates. `key` is the run's, the same at every step. `accumulate`: the batch is taken in that many parts, one after
    the other, with the mean of their gradients (part i's key is folded with i); `extra` goes from part to part.
    `ema_warmup`: decay min(ema_decay, (1 + n) / (10 + n)) after n updates.

    A loss, gradient, update or extra that is not finite changes the counters only. Metrics are scalars on the devices:
    the trainable's own, and loss, grad_norm (before clipping, of all labels together), learning_rate (of several labels
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
    """Loss, metrics and gradient (placed like the parameters): means over the `accumulate` parts of the batch; and what
    they make of `extra`, one after the other."""

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
        """The loss, with no gradient for what stays."""
        held = lambda leaf, label: jax.lax.stop_gradient(leaf) if label == STAYS else leaf  # noqa: E731
        return self.trainable.loss(jax.tree.map(held, params, self.trainable.labels(params)), *rest)

    def _split(self, x: Any) -> Any:
        # Part i takes rows i, i + accumulate, …: each device's rows stay on it, whatever part they fall into.
        microbatches = jnp.moveaxis(x.reshape(-1, self.accumulate, *x.shape[1:]), 1, 0)
        sharding = NamedSharding(self.placements.step.mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(microbatches, sharding)


def _gathered(tree: Any, placements: Any) -> Any:
    """The same, whole along `fsdp`."""
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(without_fsdp, placements))


def _averaged(ema: Params, params: Params, labels: Labels, decay: Any) -> Params:
    """The next average, float32; of what stays, exactly the same."""
    as_float32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    new = optax.incremental_update(as_float32, ema, 1.0 - decay)
    return jax.tree.map(lambda label, new, old: old if label == STAYS else new, labels, new, ema)


def _finite(tree: Any) -> Any:
    """Whether all numbers of a tree are finite."""
    return jax.tree.reduce(lambda total, leaf: total & jnp.isfinite(leaf).all(), tree, jnp.bool_(True))


def _counted(state: TrainState, finite: Any) -> dict[str, Any]:
    """The counters of steps that were skipped, after this one."""
    consecutive_skips = jnp.where(finite, 0, state.consecutive_skips + 1)
    return {
        "skipped": state.skipped + jnp.where(finite, 0, 1),
        "consecutive_skips": consecutive_skips,
        "max_consecutive_skips": jnp.maximum(state.max_consecutive_skips, consecutive_skips),
    }


def _ema_decay(updates: Any, decay: float, warmup: bool) -> Any:
    return jnp.minimum(decay, (1.0 + updates) / (10.0 + updates)) if warmup else jnp.float32(decay)

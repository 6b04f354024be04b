"""The protocol `Trainable`, and the training state as one immutable tree."""

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, Sharding

from jaxdiff.core.trees import check_tree
from jaxdiff.training.mesh import AnyMesh
from jaxdiff.training.optimizer import Optimizers, labelled_optimizer
from jaxdiff.training.param_sharding import BY_SHAPE, ParamSharding, following, shardings

Params = Any  # nested dicts of arrays
Extra = Any  # a tree of arrays, often ()
Labels = Any  # the tree of parameters with a string for each array
Metrics = dict[str, Any]  # scalars


@runtime_checkable
class Trainable(Hashable, Protocol):
    """Hashable settings, by which compiled programs are cached, with pure functions."""

    def init(self, key: Any) -> tuple[Params, Extra]:
        """Initial float32 parameters, and `extra`, which is updated without a gradient (an EMA codebook, counters).
        Traced, so that no host ever holds all of them."""
        ...

    def loss(
        self, params: Params, extra: Extra, frozen: Any, batch: Any, key: Any, step: Any
    ) -> tuple[Any, tuple[Metrics, Extra]]:
        """The mean loss over the batch, scalars to log (also means over the batch), and the next `extra`.

        frozen: arrays that are never updated, such as a teacher, or (). step: int32 scalar, the number of previous
        steps.
        """
        ...

    def labels(self, params: Params) -> Labels:
        """The label of each array's optimizer; "none" for arrays that are not updated."""
        ...

    def cast(self, params: Params) -> Params:
        """Parameters in the network's compute types, in which they are communicated between devices."""
        ...

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a batch. side: of images, in pixels."""
        ...


@struct.dataclass
class TrainState:
    """The training state; counters are int32 scalars on the devices."""

    step: Any  # steps taken, skipped ones included
    params: Params
    extra: Extra  # updated by the loss
    ema: Params  # exponential moving average of params, float32
    opt_state: Any
    skipped: Any  # steps with a non-finite loss or gradient, which changed only the counters
    consecutive_skips: Any  # such steps since the last finite one
    max_consecutive_skips: Any  # the largest `consecutive_skips` so far


def create_state(params: Params, extra: Extra, rule: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The average starts at the parameters."""
    counter = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(counter, params, extra, ema, rule.init(params), counter, counter, counter)


@lru_cache(maxsize=32)
def abstract_init(trainable: Trainable) -> tuple[Params, Extra]:
    """Shapes and types of parameters and extra. Cached, as tracing a large model takes seconds."""
    return jax.eval_shape(trainable.init, jax.random.key(0))


def abstract_params(trainable: Trainable) -> Params:
    """Shapes and types of the parameters."""
    return abstract_init(trainable)[0]


def update_rule(trainable: Trainable, config: Optimizers) -> optax.GradientTransformation:
    """The combined optimizer of all labels. ValueError if `config` lacks one of them."""
    return labelled_optimizer(config, trainable.labels(abstract_params(trainable)))


def loss_inputs(trainable: Trainable, batch: Any, frozen: Any = ()) -> tuple[Any, ...]:
    """Shapes and types of the arguments of `trainable.loss`, for a batch (arrays or shapes)."""
    key, step = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    return *abstract_init(trainable), frozen, batch, key, step


def abstract_state(
    trainable: Trainable, config: Optimizers, mesh: AnyMesh, placement: ParamSharding = BY_SHAPE
) -> TrainState:
    """Shapes, types and placements of the state on `mesh`; nothing is computed."""
    create = partial(create_state, rule=update_rule(trainable, config))
    shapes = jax.eval_shape(create, *abstract_init(trainable))
    placements = following(shapes, shapes.params, shardings(shapes.params, mesh, placement))
    placements = placements.replace(extra=shardings(shapes.extra, mesh, placement, strict=False))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, placements)


def placements_of(tree: Any) -> Any:
    """The sharding of every array (or shape with a sharding) of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(
    trainable: Trainable,
    config: Optimizers,
    key: Any,
    mesh: Mesh,
    params: Params | None = None,
    placement: ParamSharding = BY_SHAPE,
    extra: Any = None,
) -> TrainState:
    """The state before the first step; each device computes its own shards.

    params, extra: initial ones (on host or devices) instead of those of `trainable.init(key)`; an `extra` only with
    params, and not an empty one. Raises ValueError if their names or shapes do not match `trainable`.
    """
    placements = placements_of(abstract_state(trainable, config, mesh, placement))
    create = partial(create_state, rule=update_rule(trainable, config))
    with jax.set_mesh(mesh):
        if params is None:
            return jax.jit(lambda key: create(*trainable.init(key)), out_shardings=placements)(key)
        check_tree(params, abstract_params(trainable), "the tree of initial parameters")
        placed = jax.tree.map(_placed, params, placements.params)
        if jax.tree.leaves(extra):
            check_tree(extra, abstract_init(trainable)[1], "the tree of the initial extra")
            extra = jax.tree.map(_placed, extra, placements.extra)
        elif jax.tree.leaves(extra := placements.extra):
            extra = jax.jit(lambda key: trainable.init(key)[1], out_shardings=placements.extra)(key)
        return jax.jit(create, out_shardings=placements)(placed, extra)


def abstract_frozen(frozen: Any, mesh: AnyMesh, placement: ParamSharding = BY_SHAPE) -> Any:
    """Shapes of `frozen` arrays with the placements of `place_frozen`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        frozen,
        shardings(frozen, mesh, placement, strict=False),
    )


def place_frozen(frozen: Any, mesh: Mesh, placement: ParamSharding = BY_SHAPE) -> Any:
    """Shard a loss's `frozen` arrays (on host or devices) over the devices like parameters."""
    return jax.tree.map(_placed, frozen, shardings(frozen, mesh, placement, strict=False))


def _placed(leaf: Any, sharding: Sharding) -> jax.Array:
    """Shard an array. With several processes, `device_put` of a host array would gather the copies of all processes on
    each device, to check that they are equal."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

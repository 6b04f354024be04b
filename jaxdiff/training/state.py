"""Everything that training changes, as one immutable tree: parameters, their average, optimizer state, counters."""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, Sharding

from jaxdiff.core.trees import check_tree
from jaxdiff.training.mesh import AnyMesh
from jaxdiff.training.optimizer import OptimizerConfig, optimizer
from jaxdiff.training.param_sharding import BY_SHAPE, ParamSharding, following, shardings

Params = Any  # nested dicts of arrays
Metrics = dict[str, Any]  # scalars


@runtime_checkable
class Stage(Hashable, Protocol):
    """What can be trained: plain settings, which programs are cached by, with two pure functions."""

    def init(self, key: Any) -> Params:
        """Parameters drawn with `key`; traced, so that no host ever holds them all."""
        ...

    def loss(self, params: Params, batch: Any, key: Any) -> tuple[Any, Metrics]:
        """The mean loss over the batch, and further scalars to log (means over the batch too)."""
        ...


@runtime_checkable
class Casting(Protocol):
    """A stage that computes with parameters of another type than it keeps: they travel between devices in that type."""

    def cast(self, params: Params) -> Params: ...


@struct.dataclass
class TrainState:
    """One step's worth of everything; counters are int32 scalars on the devices."""

    step: Any  # steps taken, skipped ones included
    params: Params
    ema: Params  # exponential moving average of params, float32
    opt_state: Any
    skipped: Any  # steps whose loss or gradient was not finite: nothing but the counters changed
    consecutive_skips: Any  # such steps since the last finite one
    max_consecutive_skips: Any  # the largest `consecutive_skips` so far


def create_state(params: Params, config: OptimizerConfig) -> TrainState:
    """The state before the first step. The average starts at the parameters."""
    counter = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(counter, params, ema, optimizer(config).init(params), counter, counter, counter)


@lru_cache(maxsize=32)
def abstract_params(stage: Stage) -> Params:
    """Shapes and types of the parameters; traced once for each of the last stages, as a large one takes seconds."""
    return jax.eval_shape(stage.init, jax.random.key(0))


def abstract_state(
    stage: Stage, config: OptimizerConfig, mesh: AnyMesh, placement: ParamSharding = BY_SHAPE
) -> TrainState:
    """Shapes, types and placements of the state on `mesh`; nothing is computed."""
    shapes = jax.eval_shape(lambda params: create_state(params, config), abstract_params(stage))
    placements = following(shapes, shapes.params, shardings(shapes.params, mesh, placement))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, placements)


def init_state(
    stage: Stage,
    config: OptimizerConfig,
    key: Any,
    mesh: Mesh,
    params: Params | None = None,
    placement: ParamSharding = BY_SHAPE,
) -> TrainState:
    """The state before the first step, each device computing its own part.

    `params` (host arrays or devices' own) start from other parameters than `stage.init(key)`. Raises ValueError where
    their names or shapes are not the stage's.
    """
    placements = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stage, config, mesh, placement))
    with jax.set_mesh(mesh):
        if params is None:
            return jax.jit(lambda key: create_state(stage.init(key), config), out_shardings=placements)(key)
        check_tree(params, abstract_params(stage), "the tree of initial parameters")
        placed = jax.tree.map(_placed, params, placements.params)
        return jax.jit(lambda params: create_state(params, config), out_shardings=placements)(placed)


def _placed(leaf: Any, sharding: Sharding) -> jax.Array:
    """Every device takes its part. With several processes `device_put` of a host's array would gather the copies of all
    of them on each device, to see that they are equal."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

"""Losses of examples that a model is not trained on, the same number whenever the same parameters are evaluated.

A model that can says the loss of each example alone (`HasHeldOutLosses`), whose key is folded with the example's
number: how the examples are batched and over what they are spread changes only the rounding. Of any other trainable its
own loss is taken, batch by batch, each with a fixed key.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.training import multihost
from jaxdiff.training.agreement import gather
from jaxdiff.training.mesh import batch_devices, check_batch, to_devices
from jaxdiff.training.metrics import HELD_OUT
from jaxdiff.training.param_sharding import without_fsdp
from jaxdiff.training.state import Extra, Params, Trainable, TrainState, placements_of

Batch = Mapping[str, Any]
HeldOutBatches = Callable[[], Iterable[Batch]]
"""Called at each evaluation: the held-out batches from the first to the last, dicts of numpy arrays as in training.

`lambda: kept` gives those of a list, any other function may read them anew. Of several processes each gives its own
share: of P processes, process p has examples p, p + P, …, as `data.pipeline.image_batches` gives them.
"""


@runtime_checkable
class HasHeldOutLosses(Protocol):
    """A trainable that says the held-out losses of single examples."""

    def held_out_losses(
        self, params: Params, extra: Extra, frozen: Any, batch: Any, numbers: Any, key: Any
    ) -> dict[str, tuple[Any, Any]]:
        """By the name of the metric, which is `held_out_loss` for all together, the sum over the batch's examples and
        their count.

        `numbers`: int32 (b), the numbers of the examples in the held-out set; where one is −1 the row is padding, and
        counts nothing. `key`: the same for all batches; what an example draws depends on it and its number alone.
        """
        ...


@dataclass(frozen=True)
class HeldOut:
    """Evaluates what `batches` gives; compiled once for each shape of a batch. `placements`: as in `step.make_step`."""

    trainable: Trainable
    placements: TrainState
    frozen: Any
    mesh: Mesh
    batches: HeldOutBatches

    @cached_property
    def compiled(self) -> Callable[..., dict[str, tuple[Any, Any]]]:
        function = partial(_totals, self.trainable, self.placements, placements_of(self.frozen))
        return jax.jit(function, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def __call__(self, state: TrainState, before: Callable[[int], None] = lambda number: None) -> dict[str, float]:
        """The metrics of the averaged parameters: means over all examples, NaN where there is none of a kind.

        `before(number)` is called before each batch, and may raise to break off. Raises ValueError where there are no
        examples, and for a batch that does not divide over the devices where the loss is one of whole batches.
        """
        totals: dict[str, np.ndarray] = {}
        waiting: deque[Any] = deque()
        by_example = isinstance(self.trainable, HasHeldOutLosses)
        for number, (batch, numbers) in enumerate(_placed(self.batches(), self.mesh, by_example)):
            before(number)
            arguments = state.ema, state.extra, self.frozen, batch, numbers, np.int32(number), state.step
            waiting.append(self.compiled(*arguments))
            if len(waiting) > 2:
                _add(totals, waiting.popleft())
        for values in waiting:
            _add(totals, values)
        if not totals:
            raise ValueError("no held-out examples: an evaluation needs at least one batch of them")
        return {name: float(total / count) if count else float("nan") for name, (total, count) in totals.items()}


def _totals(
    trainable: Trainable, placements: TrainState, placed: Any, *arguments: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and counts of a batch."""
    params, extra, frozen, batch, numbers, batch_number, step = arguments
    params = _gathered(trainable.cast(params), placements.params)
    extra, frozen = _gathered(extra, placements.extra), _gathered(frozen, placed)
    key = jax.random.key(0)
    if isinstance(trainable, HasHeldOutLosses):
        return trainable.held_out_losses(params, extra, frozen, batch, numbers, key)
    loss, (metrics, _) = trainable.loss(params, extra, frozen, batch, jax.random.fold_in(key, batch_number), step)
    own = {f"held_out_{name}": value for name, value in metrics.items()}
    rows = jnp.float32(numbers.shape[0])
    return {name: (jnp.float32(value) * rows, rows) for name, value in (own | {HELD_OUT: loss}).items()}


def _gathered(tree: Any, placements: Any) -> Any:
    """The same, whole along `fsdp`."""
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(without_fsdp, placements))


def _add(totals: dict[str, np.ndarray], values: dict[str, tuple[Any, Any]]) -> None:
    """In float64, once the device has them."""
    for name, pair in jax.device_get(values).items():
        totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)


def _placed(batches: Iterable[Batch], mesh: Mesh, by_example: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches on the devices with the numbers of their examples, as many on each process; padded where losses are of
    single examples."""
    own, processes = iter(batches), multihost.count()
    devices = batch_devices(mesh) // processes
    size = first = 0
    last: dict[str, np.ndarray] = {}
    for number in range(np.iinfo(np.int32).max):
        batch = next(own, None)
        last = last if batch is None else _arrays(batch)
        rows = 0 if batch is None else _rows(last, number)
        counts = gather(rows)
        if not any(counts):
            return
        if not by_example:
            _check(counts, mesh, number)
        elif not last:
            raise ValueError(f"no held-out examples on {multihost.name()}: each process needs one at least")
        size = max(size, -(-max(counts) // devices) * devices) if by_example else rows
        numbers = np.full(size, -1, np.int32)
        numbers[:rows] = (first + np.arange(rows)) * processes + multihost.index()
        first += rows
        yield _to_devices({name: array[:rows] for name, array in last.items()}, numbers, mesh)


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    """Without strings, which stay on the host."""
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {name: array for name, array in arrays.items() if array.dtype.kind not in "OSU"}


def _rows(arrays: Mapping[str, np.ndarray], number: int) -> int:
    rows = {len(array) for array in arrays.values()}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"held-out batch {number}: arrays of {sorted(rows)} rows: must be one number above 0")
    return rows.pop()


def _check(counts: list[int], mesh: Mesh, number: int) -> None:
    """ValueError for a batch that cannot be split over the devices as it is."""
    if len(set(counts)) > 1:
        raise ValueError(f"held-out batch {number}: the processes have {counts} rows of it: must be equally many")
    try:
        check_batch(sum(counts), mesh)
    except ValueError as error:
        raise ValueError(f"held-out batch {number}: {error}") from None


def _to_devices(arrays: Mapping[str, np.ndarray], numbers: np.ndarray, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """The batch padded with zeros to as many rows as there are numbers, and these."""
    padded = {
        name: np.concatenate([array, np.zeros((len(numbers) - len(array), *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }
    placed = to_devices({**padded, "": numbers}, mesh)
    return placed, placed.pop("")

"""Deterministic losses on held-out examples.

A model that implements `HasHeldOutLosses` gives the loss of each example, with a key folded with the example's number,
so batching and sharding change only the rounding. For any other trainable its own loss is evaluated per batch, with a
fixed key for each batch.
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
"""Called at each evaluation; returns all held-out batches, dicts of numpy arrays as in training.

`lambda: batches` reuses a list; other functions may read the data again. Each process returns its own examples: process
p of P has the examples p, p + P, …, as in `data.pipeline.image_batches`.
"""


@runtime_checkable
class HasHeldOutLosses(Protocol):
    """A trainable with held-out losses of single examples."""

    def held_out_losses(
        self, params: Params, extra: Extra, frozen: Any, batch: Any, numbers: Any, key: Any
    ) -> dict[str, tuple[Any, Any]]:
        """(sum over the batch's examples, their count) by metric name; `held_out_loss` is the metric over all examples.

        numbers: int32 (b), indices in the held-out dataset; −1 marks a padding row, which does not count. key: the same
        for all batches; the randomness of an example depends only on it and the example's number.
        """
        ...


@dataclass(frozen=True)
class HeldOut:
    """Evaluates `batches`, compiled once per batch shape. placements: as in `step.make_step`."""

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
        """The metrics of the averaged parameters: means over all examples; NaN for a metric without examples.

        `before(number)` is called before each batch and may raise to abort. Raises ValueError for no examples, and, for
        losses per batch, for a batch that does not divide over the devices.
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
    """The tree, gathered along `fsdp`."""
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(without_fsdp, placements))


def _add(totals: dict[str, np.ndarray], values: dict[str, tuple[Any, Any]]) -> None:
    """Accumulate in float64; waits for the device."""
    for name, pair in jax.device_get(values).items():
        totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)


def _placed(batches: Iterable[Batch], mesh: Mesh, by_example: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches on the devices with the numbers of their examples, of equal size on all processes; padded if losses are
    per example."""
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
    """The arrays without strings, which stay on the host."""
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {name: array for name, array in arrays.items() if array.dtype.kind not in "OSU"}


def _rows(arrays: Mapping[str, np.ndarray], number: int) -> int:
    rows = {len(array) for array in arrays.values()}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"held-out batch {number}: arrays of {sorted(rows)} rows: must be one number above 0")
    return rows.pop()


def _check(counts: list[int], mesh: Mesh, number: int) -> None:
    """ValueError for a batch that cannot be split over the devices without padding."""
    if len(set(counts)) > 1:
        raise ValueError(f"held-out batch {number}: the processes have {counts} rows of it: must be equally many")
    try:
        check_batch(sum(counts), mesh)
    except ValueError as error:
        raise ValueError(f"held-out batch {number}: {error}") from None


def _to_devices(arrays: Mapping[str, np.ndarray], numbers: np.ndarray, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """The batch, zero-padded to the length of `numbers`, and the numbers, on the devices."""
    padded = {
        name: np.concatenate([array, np.zeros((len(numbers) - len(array), *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }
    placed = to_devices({**padded, "": numbers}, mesh)
    return placed, placed.pop("")

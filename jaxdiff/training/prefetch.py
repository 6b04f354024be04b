"""Moves numpy batches to the devices, one batch ahead, and validates them."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from jaxdiff.training import multihost
from jaxdiff.training.distributed import agree
from jaxdiff.training.mesh import check_batch, to_devices


@runtime_checkable
class Batches(Protocol):
    """A resumable stream of dicts of numpy arrays (this process's rows), such as Grain's DatasetIterator.

    A stream with batches of different shapes also has `varying_shapes`: a text that determines the order of shapes, so
    that processes can compare it. The step is compiled for each shape.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class OwnRows:
    """This process's rows of a stream that every process computes identically in full: for cheap data."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __next__(self) -> dict[str, Any]:
        def own(value: Any) -> Any:
            if len(value) % multihost.count():
                raise ValueError(f"a batch of {len(value)} does not divide over {multihost.count()} processes")
            rows = len(value) // multihost.count()
            return value[multihost.index() * rows : (multihost.index() + 1) * rows]

        return {name: own(value) for name, value in next(self._batches).items()}

    @property
    def varying_shapes(self) -> str | None:
        return getattr(self._batches, "varying_shapes", None)

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


class Prefetch:
    """`next` returns a batch on the devices, its number of rows over all processes, and the stream's state after it.

    count: total number of batches; one batch is prefetched. With several processes, all must have the same number of
    rows, and either constant shapes or the same `varying_shapes`; a difference would hang all of them.
    """

    def __init__(self, batches: Batches, mesh: Mesh, accumulate: int, count: int) -> None:
        self._batches, self._mesh, self._accumulate, self._count = batches, mesh, accumulate, count
        self._ready: deque[tuple[Any, int, Any]] = deque()
        self._asked = 0
        self._shapes: dict[str, str] | None = None  # of the first batch, with several processes

    def __next__(self) -> tuple[Any, int, Any]:
        while len(self._ready) < 2 and self._asked < self._count:
            self._ready.append(self._fetch())
        return self._ready.popleft()

    def _fetch(self) -> tuple[Any, int, Any]:
        try:
            batch = next(self._batches)
        except StopIteration:
            at = f" on {multihost.name()}" if multihost.count() > 1 else ""
            raise ValueError(
                f"the data ended{at} after {self._asked} batches of the {self._count} still to come: repeat it"
            ) from None
        self._asked += 1
        rows = {np.shape(value)[0] for value in batch.values()}
        if len(rows) != 1:
            raise ValueError(f"arrays of a batch differ in their number of rows: {sorted(rows)}")
        if multihost.count() > 1:
            self._check_shapes(batch)
        total = rows.pop() * multihost.count()
        check_batch(total, self._mesh, self._accumulate)
        return to_devices(batch, self._mesh), total, self._batches.get_state()

    def _check_shapes(self, batch: Mapping[str, Any]) -> None:
        arrays = {name: np.asarray(value) for name, value in sorted(batch.items())}
        arrays = {name: a for name, a in arrays.items() if a.dtype.kind not in "OSU"}
        varying = getattr(self._batches, "varying_shapes", None)
        if self._shapes is None:
            shapes = {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
            agree("the first batch", {**shapes, "order of shapes": varying})
        # With varying shapes, only the number of rows and of axes is constant.
        shown = {
            name: list(a.shape) if varying is None else [len(a), *["*"] * (a.ndim - 1)] for name, a in arrays.items()
        }
        current = {name: f"{arrays[name].dtype}{shape}" for name, shape in shown.items()}
        if self._shapes is None:
            self._shapes = current
        if current != self._shapes:
            first = self._shapes
            name = next(name for name in current | first if current.get(name) != first.get(name))
            raise ValueError(
                f"batch {self._asked} on {multihost.name()}: {name} is {current.get(name)}, was {first.get(name)} in "
                "the first: with several processes all batches must be alike"
            )

"""From a stream of numpy batches to arrays on the devices, one batch ahead, with what is wrong with a batch said."""

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

    One whose batches differ in shape has a `varying_shapes` too: a text that decides which shape comes when, so that
    several processes can see that they agree. The step is compiled for each shape.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class OwnRows:
    """This process's rows of a stream that every process draws whole, each the same: for data that cost little."""

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
    """`next` gives a batch on the devices, its number of rows over all processes, and the stream's state after it.

    `count` batches in all; one more than is asked for is on its way to the devices. With several processes each must
    have as many rows as the others, and the shapes of its first batch, or the same `varying_shapes` as the others: what
    differs would hang them all.
    """

    def __init__(self, batches: Batches, mesh: Mesh, accumulate: int, count: int) -> None:
        self._batches, self._mesh, self._accumulate, self._count = batches, mesh, accumulate, count
        self._ready: deque[tuple[Any, int, Any]] = deque()
        self._asked = 0
        self._form: dict[str, str] | None = None  # of the first batch, on several processes

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
            self._check_form(batch)
        total = rows.pop() * multihost.count()
        check_batch(total, self._mesh, self._accumulate)
        return to_devices(batch, self._mesh), total, self._batches.get_state()

    def _check_form(self, batch: Mapping[str, Any]) -> None:
        arrays = {name: np.asarray(value) for name, value in sorted(batch.items())}
        arrays = {name: a for name, a in arrays.items() if a.dtype.kind not in "OSU"}
        varying = getattr(self._batches, "varying_shapes", None)
        if self._form is None:
            shapes = {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
            agree("the first batch", {**shapes, "order of shapes": varying})
        # Of batches whose shapes vary, the rows are fixed and the number of axes.
        shown = {
            name: list(a.shape) if varying is None else [len(a), *["*"] * (a.ndim - 1)] for name, a in arrays.items()
        }
        form = {name: f"{arrays[name].dtype}{shape}" for name, shape in shown.items()}
        if self._form is None:
            self._form = form
        if form != self._form:
            name = next(name for name in form | self._form if form.get(name) != self._form.get(name))
            raise ValueError(
                f"batch {self._asked} on {multihost.name()}: {name} is {form.get(name)}, was {self._form.get(name)} in "
                "the first: with several processes all batches must be alike"
            )

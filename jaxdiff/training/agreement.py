"""Communication between the processes of a run: small values, and failures during a save."""

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.core.jax_internals import coordination


def gather(value: Any) -> list[Any]:
    """Gather a JSON value from every process, in the order of the processes. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size)).ravel()
    rows = multihost_utils.process_allgather(np.pad(mine, (0, sizes.max() - mine.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier(name: str) -> Callable[..., None] | None:
    """A barrier for Orbax that does not wait for failed processes; None for a single process.

    If a save fails on one process, it reaches Orbax's last barrier while its exception propagates, and the others would
    wait at an earlier barrier until the timeout of a slow save. Here the failed process publishes its error under
    `name` and continues, and the others raise OSError with that error. They cannot save again afterwards.
    """
    if jax.process_count() == 1:
        return None
    import orbax.checkpoint as ocp  # imported here: it takes a quarter of a second

    wait = ocp.multihost.get_barrier_sync_fn()
    store = coordination()

    def meet(*, key: str, timeout_ms: int) -> None:
        error = sys.exception()
        if error is not None:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            store.key_value_set(f"{name}/{jax.process_index()}", text, allow_overwrite=True)
            return
        ended: list[Exception | None] = []

        def hold() -> None:
            try:
                wait(key=key, timeout_ms=timeout_ms)
                ended.append(None)
            except Exception as problem:
                ended.append(problem)

        holding = threading.Thread(target=hold, daemon=True)
        holding.start()
        while holding.is_alive():
            holding.join(1)
            failed = store.key_value_dir_get(name)
            if failed:
                process, text = failed[0][0].rsplit("/", 1)[-1], failed[0][1]
                raise OSError(f"process {process}: {text}")
        if ended[0] is not None:
            raise ended[0]

    return meet

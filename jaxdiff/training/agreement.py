"""What several processes of one run tell each other: small values, and that one of them has failed."""

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdiff.core.jax_internals import coordination


def gather(value: Any) -> list[Any]:
    """Every process's value (what JSON can hold), in the order of the processes. All of them must call it."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size)).ravel()
    rows = multihost_utils.process_allgather(np.pad(mine, (0, sizes.max() - mine.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier(name: str) -> Callable[..., None] | None:
    """For Orbax: a barrier at which nobody waits for a process that has failed; None for a single process.

    A process whose part of a save fails comes to Orbax's last barrier while its exception is on its way up, when the
    others already wait at an earlier one, and would for as long as a slow save may take. Here it leaves word under
    `name` and goes on, and the others raise OSError with what it said. They cannot save again after that.
    """
    if jax.process_count() == 1:
        return None
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

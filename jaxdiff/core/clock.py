"""Elapsed time of operations without a progress measure, such as compilation."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def ticking(show: Callable[[float], None], every: float = 1.0) -> Iterator[None]:
    """Call `show(elapsed seconds)` at the start of the block and then every `every` seconds in a thread.

    `show` is not called after the block.
    """
    done, start = threading.Event(), time.perf_counter()
    show(0.0)

    def tick() -> None:
        while not done.wait(every):
            show(time.perf_counter() - start)

    thread = threading.Thread(target=tick, name="clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def clock(what: str, leave: bool = True) -> Iterator[None]:
    """Show a line `what: 00:12` on standard error that is updated in the block. leave: keep the line at the end."""
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=leave) as bar:

        def show(seconds: float) -> None:
            bar.refresh()

        with ticking(show):
            yield

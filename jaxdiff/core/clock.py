"""How long something has taken that cannot say how far it is, such as compilation: shown while it runs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def ticking(show: Callable[[float], None], every: float = 1.0) -> Iterator[None]:
    """Inside, `show(seconds since the beginning)` is called: once at the start, then every `every` seconds in a thread.

    It is not called any more once this is left.
    """
    done, begun = threading.Event(), time.perf_counter()
    show(0.0)

    def tick() -> None:
        while not done.wait(every):
            show(time.perf_counter() - begun)

    thread = threading.Thread(target=tick, name="clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def clock(what: str, leave: bool = True) -> Iterator[None]:
    """A line `what: 00:12` on standard error, whose time goes on inside. `leave`: it stays there in the end."""
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=leave) as bar:

        def show(seconds: float) -> None:
            bar.refresh()

        with ticking(show):
            yield

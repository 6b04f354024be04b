"""The toy stage, trained by the processes that join, each with its rows of the same batches; and what can go wrong.

    python joined_toy.py --out OUT --steps 30 [--fault kill --at 12 --who 1]

Process WHO meets FAULT when it is asked for batch AT.

Faults: kill, raise, SIGTERM, SIGINT, hang, end (the data ends), short (a row less), nan, seed (other settings).
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import processes
from training_toy import Stream, Toy, config

from experiments.cli import run
from jaxdiff.training.loop import Diverged, train

ROWS = 16


@dataclass
class Share(Stream):
    """This process's rows of the batches of `Stream`, and its fault."""

    fault: str = ""
    at: int = -1
    process: int = 0
    count: int = 1

    def __next__(self) -> Any:
        now = self.index == self.at
        if now:
            self.meet()
        batch = super().__next__()
        rows = ROWS // self.count
        batch = {name: value[self.process * rows : (self.process + 1) * rows] for name, value in batch.items()}
        if now and self.fault == "short":
            batch = {name: value[1:] for name, value in batch.items()}
        if self.fault.startswith("SIG") and self.index > self.at:
            time.sleep(0.3)  # jax looks once a second whether there was a signal
        if self.fault == "nan" and self.index > self.at:
            batch["x"][0, 0] = float("nan")
        return batch

    def meet(self) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raise":
            raise ValueError("image 7 is torn")
        if self.fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.fault])
        if self.fault == "hang":
            time.sleep(1000)
        if self.fault == "end":
            raise StopIteration


def main(
    out: Path,
    steps: int = 30,
    fault: str = "",
    at: int = -1,
    who: int = 0,
    stall: float = 0,
    stall_exit: float = 0,
    heartbeat: int = 10,
) -> None:
    count = processes.join(heartbeat)
    mine = jax.process_index() == who
    stream = Share(process=jax.process_index(), count=count, fault=fault if mine else "", at=at)
    changes = {"seed": 1} if mine and fault == "seed" else {}
    settings = config(steps=steps, stall_exit=stall_exit, stall=stall, **changes)
    train(Toy(), stream, settings, out)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))

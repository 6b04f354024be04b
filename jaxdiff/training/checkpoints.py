"""Checkpoints on disk: the train state, the data iterator's place, and the settings that made them.

A step appears in the directory when all of it is written; an interrupted save leaves the older ones as they were.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdiff.training.settings import difference
from jaxdiff.training.state import Params, TrainState


class Checkpoints:
    """The newest `keep` checkpoints in `directory`. `settings` (flat, JSON-able) are saved with them and compared.

    Methods raise OSError where writing fails and ValueError where reading does: one line that names the directory.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self.settings = dict(settings)
        with _explained(OSError, f"{self.directory}: cannot be used for checkpoints"):
            self._manager = _manager(self.directory, keep)

    def latest(self) -> int | None:
        """The newest step saved, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Copy the state off the devices and write it in the background. `data`: bytes, or what JSON can hold."""
        place = {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}
        items = {
            "state": ocp.args.StandardSave(state.replace(ema={})),
            "ema": ocp.args.StandardSave(state.ema),
            "data": ocp.args.JsonSave(place),
            "settings": ocp.args.JsonSave(self.settings),
        }
        with _explained(OSError, f"{self.directory}: checkpoint of step {step} not saved (is the disk full?)"):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any]:
        """The newest state, placed as `abstract` says, and the data iterator's state.

        Raises ValueError also where the checkpoint was made with other settings, naming the first that differs.
        """
        step = self.latest()
        with _explained(ValueError, f"{self.directory}: checkpoint of step {step} cannot be restored"):
            saved = self._restore(step, settings=ocp.args.JsonRestore())["settings"]
        differs = difference(saved, self.settings)
        if differs:
            raise ValueError(f"{self.directory} was saved with other settings: {differs}")
        with _explained(ValueError, f"{self.directory}: checkpoint of step {step} cannot be restored"):
            items = self._restore(
                step,
                state=ocp.args.StandardRestore(abstract.replace(ema={})),
                ema=ocp.args.StandardRestore(abstract.ema),
                data=ocp.args.JsonRestore(),
            )
            place = items["data"]
            data = base64.b64decode(place["bytes"]) if "bytes" in place else place["json"]
        return items["state"].replace(ema=items["ema"]), data

    def _restore(self, step: int | None, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Wait for what is being written."""
        with _explained(OSError, f"{self.directory}: checkpoint not saved (is the disk full?)"):
            self._manager.wait_until_finished()
            self._manager.close()


def load_ema(directory: str | Path, abstract: Params | None = None) -> Params:
    """The averaged parameters of the newest checkpoint in `directory`, as float32.

    `abstract` (shapes with shardings) says what to expect and where to put it; without it, they come to the first
    device. Raises FileNotFoundError where there is no checkpoint, ValueError where it is not the expected one.
    """
    directory = Path(directory).absolute()
    manager = _manager(directory, None, create=False) if directory.is_dir() else None
    step = manager.latest_step() if manager else None
    if step is None:
        raise FileNotFoundError(f"{directory}: no checkpoint here")
    with _explained(ValueError, f"{directory}: averaged parameters of step {step} cannot be restored"):
        if abstract is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            saved = manager.item_metadata(step)["ema"]
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        return manager.restore(step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(abstract)))["ema"]


def _manager(directory: Path, keep: int | None, create: bool = True) -> ocp.CheckpointManager:
    policy = None if keep is None else ocp.checkpoint_managers.LatestN(keep)
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=create, read_only=not create)
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "ema": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "settings": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


@contextmanager
def _explained(kind: type[Exception], what: str) -> Iterator[None]:
    """Any failure inside as one line of the given kind."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise kind(f"{what}: {reason[0][:300] if reason else type(error).__name__}") from error

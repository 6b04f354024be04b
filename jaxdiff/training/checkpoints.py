"""Checkpoints on disk: the train state, the data iterator's place, and the settings that made them.

A step appears in the directory when all of it is written; a save that fails leaves the older ones as they were.
"""

import base64
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdiff.training.settings import difference
from jaxdiff.training.state import Params, TrainState


class Checkpoints:
    """The newest `keep` checkpoints in `directory`; `settings` (flat, JSON-able) are saved with them and compared.

    A context manager: leaving it waits for what is being written. Saving raises OSError, reading ValueError: one line
    that names the directory.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self.settings = dict(settings)
        with _explained(OSError, f"{self.directory}: cannot be used for checkpoints"):
            self._manager = _manager(self.directory, keep, create=True)

    def latest(self) -> int | None:
        """The newest step saved, None where there is none."""
        return _latest(self._manager, self.directory)

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Copy the state off the devices and write it in the background. `data`: bytes, or what JSON can hold."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        free = shutil.disk_usage(self.directory).free
        if size > free:
            raise OSError(
                f"{self.directory}: disk full: the checkpoint of step {step} takes {size / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free; the older ones are intact"
            )
        place = {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}
        items = {
            "state": ocp.args.StandardSave(state.replace(ema={})),
            "ema": ocp.args.StandardSave(state.ema),
            "data": ocp.args.JsonSave(place),
            "settings": ocp.args.JsonSave(self.settings),
        }
        with self._saving():
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

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_no_tracebacks)
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            with self._saving():
                self._manager.wait_until_finished()
                self._manager.close()
        except OSError:
            if not isinstance(error, Exception):  # otherwise the failure that brought us here is the one to report
                raise
        finally:
            logging.getLogger("absl").removeFilter(_no_tracebacks)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Failures, those of an earlier save in the background too, as OSError, with nothing half-written left."""
        try:
            with _explained(OSError, f"{self.directory}: checkpoint not saved, the older ones are intact"):
                yield
        except OSError:
            for rest in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(rest, ignore_errors=True)
            raise


def load_ema(directory: str | Path, abstract: Params | None = None) -> Params:
    """The averaged parameters of the newest checkpoint in `directory`, as float32.

    `abstract` (shapes with shardings) says what to expect and where to put it; without it, they come to the first
    device. Raises FileNotFoundError where there is no checkpoint, ValueError where it is not the expected one.
    """
    directory = Path(directory).absolute()
    manager = _manager(directory, None, create=False) if directory.is_dir() else None
    step = _latest(manager, directory) if manager else None
    if step is None:
        raise FileNotFoundError(f"{directory}: no checkpoint here")
    with _explained(ValueError, f"{directory}: averaged parameters of step {step} cannot be restored"):
        if abstract is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            saved = manager.item_metadata(step)["ema"]
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        return manager.restore(step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(abstract)))["ema"]


def _manager(directory: Path, keep: int | None, create: bool) -> ocp.CheckpointManager:
    policy = None if keep is None else ocp.checkpoint_managers.LatestN(keep)
    # Rests of an interrupted save go when a run starts again, but a reader must not touch what a run is writing.
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=create, cleanup_tmp_directories=create)
    tree, json = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"state": tree(), "ema": tree(), "data": json(), "settings": json()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _latest(manager: ocp.CheckpointManager, directory: Path) -> int | None:
    """The newest step. A damaged directory that would look empty raises: never a silent fresh start."""
    step = manager.latest_step()
    newest = max((int(path.name) for path in directory.iterdir() if path.name.isdigit()), default=None)
    if step != newest:
        raise ValueError(f"{directory / str(newest)} is not a complete checkpoint: delete or repair it")
    return step


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Orbax logs a background failure with its traceback, several times; it also raises it, and we report that."""
    return not (record.exc_info and "orbax" in record.pathname)


@contextmanager
def _explained(kind: type[Exception], what: str) -> Iterator[None]:
    """Any failure inside as one line of the given kind."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
        raise kind(f"{what}: {reason if len(reason) < 200 else '…' + reason[-200:]}") from error

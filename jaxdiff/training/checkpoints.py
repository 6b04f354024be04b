"""Checkpoints on disk: the train state, the positions of the data iterators, and the settings of the run.

A step appears in the directory only when it is complete, including a manifest of its files; a failed or interrupted
save leaves older checkpoints intact. Before reading, all bytes are verified against the manifest.
"""

import base64
import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdiff.core.settings import difference, first_difference
from jaxdiff.core.trees import flatten, of_part, unflatten
from jaxdiff.training import manifest
from jaxdiff.training.agreement import barrier, gather
from jaxdiff.training.multihost import FolderInUseError
from jaxdiff.training.state import Params, TrainState

UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of folders in progress, as in Orbax
SLICE = 1 << 20
"""Bytes: smallest slice that replicas of an array write separately."""


class SettingsDifferError(ValueError):
    """A checkpoint was saved with other settings.

    name: the first setting that differs, such as `optimizer.learning_rate`; the last component is the field. saved,
    given: its values, None if it is absent.
    """

    def __init__(self, directory: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        super().__init__(f"{directory} was saved with other settings: {difference(saved, given)}")
        name = first_difference(saved, given)
        assert name is not None  # otherwise nothing differs
        self.name, self.saved, self.given = name, saved.get(name), given.get(name)


class Checkpoints:
    """The newest `keep` checkpoints in `directory`; `settings` (flat, JSON-able) are saved with them and compared.

    All processes share the directory and make the same calls. A context manager: leaving it waits for pending writes.
    Saving raises OSError, reading ValueError: one line that names the directory.
    check: called on process 0, in any thread, before a checkpoint is renamed into place and before a deletion; if it
    raises, neither is done, and saving raises the same error. adapt: maps the settings saved at a step to those
    compared with the given ones, so that some settings may change.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        keep: int = 3,
        check: Callable[[], None] = lambda: None,
        adapt: Callable[[int, Mapping[str, Any]], Mapping[str, Any]] = lambda step, saved: saved,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.settings = dict(settings)
        self._being_saved: int | None = None
        self._check, self._adapt = check, adapt
        with _explained(OSError, f"{self.directory}: cannot be used for checkpoints"):
            self._manager = _manager(self.directory, keep, create=True, check=check)

    def latest(self) -> int | None:
        """The newest saved step, None if there is none."""
        step = problem = None
        try:
            step = _latest(self._manager, self.directory)
        except (ValueError, OSError) as error:
            problem = str(error)
        step, problem = gather([step, problem])[0]  # another host may see an older state of a shared directory
        if problem:
            raise ValueError(problem)
        return step

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Copy the state off the devices and write it in the background.

        data: this process's iterator state: bytes, or a JSON value.
        """
        with self._saving(self._being_saved):
            self._manager.wait_until_finished()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        place = {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}
        gathered = gather([place, shutil.disk_usage(self.directory).free])
        free = min(free for _, free in gathered)
        if size > free:
            raise OSError(
                f"{self.directory}: disk full: the checkpoint of step {step} takes {size / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free; the older ones are intact"
            )
        items = {
            "state": ocp.args.PyTreeSave(replace(state, ema={})),
            "ema": ocp.args.PyTreeSave(state.ema),
            "data": ocp.args.JsonSave({"places": [place for place, _ in gathered]}),
            "settings": ocp.args.JsonSave(self.settings),
        }
        self._being_saved = step
        with self._saving(step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any]:
        """The newest state, placed like `abstract` (on any mesh), and this process's iterator state.

        Raises SettingsDifferError if the checkpoint has other settings, ValueError if it was saved by another number of
        processes: each reads its own shard of the data, and a position in one shard is invalid in another.
        """
        step = self._sound()
        data = self._data(step)
        return self._state(step, abstract), data

    def restore_state(self, abstract: TrainState) -> TrainState:
        """The state without the iterator state, for any number of processes."""
        return self._state(self._sound(), abstract)

    def _sound(self) -> int:
        """The newest step, after verifying its files and settings."""
        step = self.latest()
        if step is None:
            raise ValueError(f"{self.directory}: no checkpoint here")
        problem = _shared_damage(self.directory / str(step))
        if problem:
            steps = gather(_steps(self.directory))[0]  # the same steps on all processes
            way = _way_on(self.directory, steps, _shared_damage)
            raise ValueError(f"{self.directory}: checkpoint of step {step} cannot be restored: {problem}; {way}")
        saved = self._restore(step, settings=ocp.args.JsonRestore())["settings"]
        saved = self._adapt(step, saved)
        if difference(saved, self.settings):
            raise SettingsDifferError(self.directory, saved, self.settings)
        return step

    def _state(self, step: int, abstract: TrainState) -> TrainState:
        trees = {"state": replace(abstract, ema={}), "ema": abstract.ema}
        items = self._restore(step, **{name: _placed(tree) for name, tree in trees.items()})
        return items["state"].replace(ema=items["ema"])

    def _data(self, step: int) -> Any:
        saved = self._restore(step, data=ocp.args.JsonRestore())["data"]
        places = saved["places"]
        if len(places) != jax.process_count():
            raise ValueError(
                f"{self.directory}: the number of processes was {len(places)} and is {jax.process_count()} here: each "
                "reads its own shard of the data and resumes only in that; start as many, or begin a new run from the "
                "averaged parameters"
            )
        place = places[jax.process_index()]
        return base64.b64decode(place["bytes"]) if "bytes" in place else place["json"]

    def _restore(self, step: int, **items: Any) -> Any:
        with _explained(ValueError, f"{self.directory}: checkpoint of step {step} cannot be restored"):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def __enter__(self) -> "Checkpoints":
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_no_tracebacks)
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            with self._saving(self._being_saved):
                self._manager.wait_until_finished()
                self._manager.close()
        except (OSError, FolderInUseError):
            if not isinstance(error, Exception):  # otherwise report the original failure
                raise
        finally:
            gc.collect()  # collects failed tasks here, because they log their errors on collection
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(_no_tracebacks)

    @contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        """Turn failures, also in the background, into OSError, and remove partial writes."""
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        try:
            with _explained(OSError, f"{self.directory}: {what} not saved, the older ones are intact"):
                yield
        except OSError:
            if jax.process_index() == 0:
                self._check()  # files of another run are not ours to delete
                for rest in self.directory.glob(f"*{UNFINISHED}"):
                    shutil.rmtree(rest, ignore_errors=True)
            raise


def load_ema(directory: str | Path, abstract: Params | None = None, part: bool = False) -> Params:
    """The averaged parameters of the newest checkpoint in `directory`, as float32.

    abstract: expected shapes with shardings; None: load onto the first device. part: the checkpoint may lack some of
    these. Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged or unexpected.
    """
    directory = Path(directory).absolute()
    manager = _manager(directory, None, create=False) if directory.is_dir() else None
    step = _latest(manager, directory) if manager else None
    if manager is None or step is None:
        raise FileNotFoundError(f"{directory}: no checkpoint here")
    what = f"{directory}: averaged parameters of step {step} cannot be restored"
    problem = manifest.damage(directory / str(step), only=("ema",))
    if problem:
        raise ValueError(f"{what}: {problem}; {_way_on(directory, _steps(directory), manifest.damage)}")
    with _explained(ValueError, what):
        if abstract is None or part:
            saved = dict(manager.item_metadata(step)["ema"].items())
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            if abstract is None:
                abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
            else:
                abstract = unflatten(of_part(flatten(saved).keys(), flatten(abstract)))
        return manager.restore(step, args=ocp.args.Composite(ema=_placed(abstract)))["ema"]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always False, because the loop checks for preemption. Orbax would ask jax in the background about an older
        step; jax would take it for the current one, and the processes would stop after different steps."""
        return False


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint folder that is renamed into place after its manifest is written; then old checkpoints are deleted.

    Runs in the background, on process 0, after all processes have written. Orbax adds files until it renames the
    folder, so here it renames it to another unfinished name first.
    """

    keep: int | None = None  # all
    check: Callable[[], None] = staticmethod(lambda: None)
    _final_path: Any  # Orbax's, which has no types

    async def finalize(self) -> None:
        final = self._final_path
        if UNFINISHED in final.parent.name:  # an item's folder in that of a step
            return await super().finalize()
        self._final_path = final.parent / f"{final.name}{UNFINISHED}-sealing{UNFINISHED}"
        try:
            await super().finalize()
            manifest.write(Path(self._final_path))
            self.check()
            self._final_path.rename(final)
            manifest.sync(Path(final.parent))
        finally:
            self._final_path = final
        for step in _steps(Path(final.parent))[: -self.keep] if self.keep else ():
            # Rename first: a partially deleted checkpoint must not look like a damaged one.
            old = final.parent / str(step)
            shutil.rmtree(old.rename(final.parent / f"{step}-deleted{UNFINISHED}"), ignore_errors=True)


def _manager(
    directory: Path, keep: int | None, create: bool, check: Callable[[], None] = lambda: None
) -> ocp.CheckpointManager:
    # A restarted run removes leftovers of an interrupted save; a reader must not touch what a run is writing.
    options = ocp.CheckpointManagerOptions(
        create=create,
        cleanup_tmp_directories=create,
        temporary_path_class=type("Sealed", (_Sealed,), {"keep": keep, "check": staticmethod(check)}),
        async_options=ocp.AsyncOptions(barrier_sync_fn=barrier(f"failed/{directory}")),
    )
    # Orbax splits a replicated array into one slice per device, each copied by its own program; not worth it if small.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    tree, json = partial(ocp.PyTreeCheckpointHandler, type_handler_registry=registry), ocp.JsonCheckpointHandler
    handlers = {"state": tree(), "ema": tree(), "data": json(), "settings": json()}
    return _Manager(directory, options=options, item_handlers=handlers)


def _placed(abstract: Any) -> ocp.args.PyTreeRestore:
    """Restore arguments for a tree of shapes with shardings."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def _latest(manager: ocp.CheckpointManager, directory: Path) -> int | None:
    """The newest step. Raises for a damaged directory that looks empty, to avoid a silent fresh start."""
    steps = _steps(directory)
    if not steps:
        others = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        others = [name for name in others if UNFINISHED not in name]
        if others:
            raise ValueError(f"{directory}: no checkpoint here, but {others[0]}: a checkpoint is named as its step")
        return None
    manager.reload()  # a running process may have added some
    if (manager.latest_step() or -1) < steps[-1]:
        way = _way_on(directory, steps, manifest.damage)
        raise ValueError(f"{directory / str(steps[-1])} is not a complete checkpoint; {way}")
    return steps[-1]


def _steps(directory: Path) -> list[int]:
    """The steps with an entry in `directory`."""
    numbers = [int(path.name) for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(number for number in numbers if (directory / str(number)).exists())


def _way_on(directory: Path, steps: list[int], damage: Callable[[Path], str | None]) -> str:
    """Advice for a damaged newest step: which steps to delete to resume from the newest intact one."""
    bad = [directory / str(steps[-1])]
    for older in reversed(steps[:-1]):
        if damage(directory / str(older)) is None:
            return f"delete {' and '.join(map(str, bad))} to go on from step {older}, which is intact"
        bad.append(directory / str(older))
    return f"no older one is intact: delete {directory} to begin anew, or repair it"


def _shared_damage(folder: Path) -> str | None:
    """`manifest.damage` with the work split over all processes, and the same result on all."""
    problems = gather(manifest.damage(folder, process=jax.process_index(), processes=jax.process_count()))
    return next((problem for problem in problems if problem), None)


_LOGGERS = "absl", "asyncio"


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Filter tracebacks of background failures, which Orbax and asyncio log several times. Orbax also raises them, and
    that is reported."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


@contextmanager
def _explained(kind: type[Exception], what: str) -> Iterator[None]:
    """Turn any exception into one line of the given type."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
        raise kind(f"{what}: {reason if len(reason) < 200 else '…' + reason[-200:]}") from error

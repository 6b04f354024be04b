"""Checkpoints on disk: the train state, the data iterators' places, and the settings that made them.

A step appears in the directory when all of it is written, a manifest of all its files included; a save that fails or is
cut off leaves the older ones as they were. What is read is first compared with its manifest, byte for byte.
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
from jaxdiff.training import manifest
from jaxdiff.training.agreement import barrier, gather
from jaxdiff.training.multihost import FolderInUseError
from jaxdiff.training.state import Params, TrainState

UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax, and so we, put behind the name of what is being written
SLICE = 1 << 20
"""Bytes: what replicas of an array, one on each device, write apart is no smaller than this."""


class SettingsDifferError(ValueError):
    """A checkpoint was saved with other settings.

    name: of the first that differs, as `optimizer.learning_rate`; its last part is the name of the field. saved, given:
    its values, None where there is none.
    """

    def __init__(self, directory: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        super().__init__(f"{directory} was saved with other settings: {difference(saved, given)}")
        name = first_difference(saved, given)
        assert name is not None  # otherwise nothing differs
        self.name, self.saved, self.given = name, saved.get(name), given.get(name)


class Checkpoints:
    """The newest `keep` checkpoints in `directory`; `settings` (flat, JSON-able) are saved with them and compared.

    With several processes, all of them share the directory and make the same calls. A context manager: leaving it waits
    for what is being written. Saving raises OSError, reading ValueError: one line that names the directory.
    `check` is called before a checkpoint gets its name and before anything is deleted, in process 0, in any thread;
    where it raises, neither is done, and saving raises the same. `adapt` says with what of the settings saved at a step
    the given ones are to be compared: what may change.
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
        """The newest step saved, None where there is none."""
        step = problem = None
        try:
            step = _latest(self._manager, self.directory)
        except (ValueError, OSError) as error:
            problem = str(error)
        step, problem = gather([step, problem])[0]  # a shared directory may look older from another host
        if problem:
            raise ValueError(problem)
        return step

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Copy the state off the devices and write it in the background.

        `data` is this process's own place: bytes, or what JSON can hold.
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
        """The newest state, placed as `abstract` says (on any mesh), and the place of this process's data.

        Raises SettingsDifferError where the checkpoint was made with other settings, ValueError where it was made by
        another number of processes: each reads a share of the data, and a place in one share is none in another.
        """
        step = self._sound()
        data = self._data(step)
        return self._state(step, abstract), data

    def restore_state(self, abstract: TrainState) -> TrainState:
        """The state alone, which any number of processes can go on from."""
        return self._state(self._sound(), abstract)

    def _sound(self) -> int:
        """The newest step, found to be as it was saved and of these settings."""
        step = self.latest()
        if step is None:
            raise ValueError(f"{self.directory}: no checkpoint here")
        problem = _shared_damage(self.directory / str(step))
        if problem:
            steps = gather(_steps(self.directory))[0]  # all processes must look at the same
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
                "reads its share of the data, and goes on only in that; start as many, or begin a new run from the "
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
            if not isinstance(error, Exception):  # otherwise the failure that brought us here is the one to report
                raise
        finally:
            gc.collect()  # tasks that failed beside the one that is reported log it as they are collected
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(_no_tracebacks)

    @contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        """Failures, those in the background too, as OSError, with nothing half-written left."""
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        try:
            with _explained(OSError, f"{self.directory}: {what} not saved, the older ones are intact"):
                yield
        except OSError:
            if jax.process_index() == 0:
                self._check()  # what another run has there is none of ours
                for rest in self.directory.glob(f"*{UNFINISHED}"):
                    shutil.rmtree(rest, ignore_errors=True)
            raise


def load_ema(directory: str | Path, abstract: Params | None = None) -> Params:
    """The averaged parameters of the newest checkpoint in `directory`, as float32.

    `abstract` (shapes with shardings) says what to expect and where to put it; without it, they come to the first
    device. Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or not the expected.
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
        if abstract is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            saved = manager.item_metadata(step)["ema"]
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        return manager.restore(step, args=ocp.args.Composite(ema=_placed(abstract)))["ema"]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks. Orbax asks jax in the background too, once a step is written that then is an old one;
        jax takes it for the step that this process is at, and has the processes stop after different ones."""
        return False


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that is written under another name and gets its own once its manifest is in it; then the oldest go.

    Runs in the background, in process 0, after all processes have written. Orbax itself adds to the folder to the last,
    and then renames it; so it is let to rename it to a name that still says unfinished.
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
            # Under another name first: one that is deleted in part must not look like one that is damaged.
            old = final.parent / str(step)
            shutil.rmtree(old.rename(final.parent / f"{step}-deleted{UNFINISHED}"), ignore_errors=True)


def _manager(
    directory: Path, keep: int | None, create: bool, check: Callable[[], None] = lambda: None
) -> ocp.CheckpointManager:
    # Rests of an interrupted save go when a run starts again, but a reader must not touch what a run is writing.
    options = ocp.CheckpointManagerOptions(
        create=create,
        cleanup_tmp_directories=create,
        temporary_path_class=type("Sealed", (_Sealed,), {"keep": keep, "check": staticmethod(check)}),
        async_options=ocp.AsyncOptions(barrier_sync_fn=barrier(f"failed/{directory}")),
    )
    # Orbax cuts a replicated array into one piece a device, each copied by a program of its own: small ones go whole.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    tree, json = partial(ocp.PyTreeCheckpointHandler, type_handler_registry=registry), ocp.JsonCheckpointHandler
    handlers = {"state": tree(), "ema": tree(), "data": json(), "settings": json()}
    return _Manager(directory, options=options, item_handlers=handlers)


def _placed(abstract: Any) -> ocp.args.PyTreeRestore:
    """A tree of shapes with shardings, as it is to be restored."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def _latest(manager: ocp.CheckpointManager, directory: Path) -> int | None:
    """The newest step. A damaged directory that would look empty raises: never a silent fresh start."""
    steps = _steps(directory)
    if not steps:
        others = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        others = [name for name in others if UNFINISHED not in name]
        if others:
            raise ValueError(f"{directory}: no checkpoint here, but {others[0]}: a checkpoint is named as its step")
        return None
    manager.reload()  # a run that goes on may have added some
    if (manager.latest_step() or -1) < steps[-1]:
        way = _way_on(directory, steps, manifest.damage)
        raise ValueError(f"{directory / str(steps[-1])} is not a complete checkpoint; {way}")
    return steps[-1]


def _steps(directory: Path) -> list[int]:
    """The steps that have something of their name in `directory`."""
    numbers = [int(path.name) for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(number for number in numbers if (directory / str(number)).exists())


def _way_on(directory: Path, steps: list[int], damage: Callable[[Path], str | None]) -> str:
    """What to do about the newest of `steps`, which is damaged: the newest that is intact, by name."""
    bad = [directory / str(steps[-1])]
    for older in reversed(steps[:-1]):
        if damage(directory / str(older)) is None:
            return f"delete {' and '.join(map(str, bad))} to go on from step {older}, which is intact"
        bad.append(directory / str(older))
    return f"no older one is intact: delete {directory} to begin anew, or repair it"


def _shared_damage(folder: Path) -> str | None:
    """`manifest.damage`, the work shared by all processes, and the answer the same in all."""
    problems = gather(manifest.damage(folder, process=jax.process_index(), processes=jax.process_count()))
    return next((problem for problem in problems if problem), None)


_LOGGERS = "absl", "asyncio"


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Orbax logs a background failure with its traceback, several times, and asyncio those of the tasks beside it.
    Orbax also raises it, and we report that."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


@contextmanager
def _explained(kind: type[Exception], what: str) -> Iterator[None]:
    """Any failure inside as one line of the given kind."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
        raise kind(f"{what}: {reason if len(reason) < 200 else '…' + reason[-200:]}") from error

"""A run that is killed again and again, at moments of every stage, and goes on: is any checkpoint or any bit lost?

python tests/training/killed.py --moments 50 --report killed.json

One training run that saves every second step and keeps two checkpoints is started once a moment. Each time it sends
itself SIGKILL at a random event of one stage (`STAGES`), or is sent it from outside. After every death the newest
checkpoint must be intact, the next start must go on from exactly that one, and in the end every loss that was ever
written must be, bit for bit, that of a run that was never stopped. All is drawn from `--seed`.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jaxdiff.training import manifest
from jaxdiff.training.metrics import read

STAGES = {
    "step": "a batch is asked for, between two steps or while one runs",
    "saving": "the state is being copied off the devices, the folder made",
    "writing": "some of the checkpoint's files are there, perhaps in part",
    "items": "parts of the checkpoint get their names",
    "hashing": "all files are there, the manifest is being made",
    "manifest": "half of the manifest is written",
    "sealed": "the manifest is written, the folder has not its name yet",
    "named": "the folder just got its name",
    "deleting": "an old checkpoint is being deleted",
    "cleaning": "at the start, rests of the last death are being removed",
    "outside": "any time",
}
AHEAD = 60  # steps that a start would train if it were let
FOR_EVER = 1_000_000  # steps that are not done when death comes from outside, however fast the machine is


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill(Path(folder), arguments.moments, arguments.seed, arguments.stages, print)
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1))
    print({name: value for name, value in report.items() if name != "deaths"})
    return 0 if report["survived"] == arguments.moments and report["last_equal"] else 1


def kill(folder: Path, moments: int, seed: int, stages: list[str], say: Any) -> dict[str, Any]:
    """Kill a run in `folder` at `moments` moments, the stages in turn, and compare it with one that was left alone."""
    draw = random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # every child has jax already imported
    context.set_forkserver_preload(["killed", "training_toy", "jaxdiff.training.loop", "tensorboardX"])
    out, places = folder / "killed", folder / "places"
    deaths, seen = [], []
    for moment in range(moments):
        stage = stages[moment % len(stages)]
        # What a stage's `count`-th event is: of `saving` one a save, of `items` and `hashing` several.
        count = draw.randint(1, {"step": 20, "items": 20, "hashing": 60, "cleaning": 8}.get(stage, 5))
        before = newest(out)
        ahead = FOR_EVER if stage == "outside" else AHEAD
        code = _start(context, out, places, before + ahead, stage, count, draw.uniform(0, 4))
        resumed = int(places.read_text() or -1) if before else 0  # -1: died before it had restored anything
        after, problem = newest(out), damaged(out)
        seen.append(losses(out))
        death = {
            "moment": moment,
            "stage": stage,
            "event": count,
            "died": code == -signal.SIGKILL,
            "newest_before": before,
            "resumed_from": resumed,
            "newest_after": after,
            "unfinished": sorted(path.name for path in (out / "checkpoints").glob("*tmp")),
            "damage": problem,
        }
        deaths.append(death)
        say(death)
    last = newest(out) + 10
    _start(context, out, places, last, "none", 0, None)
    seen.append(losses(out))
    longest = max(max(run, default=0) for run in seen)
    _start(context, folder / "whole", folder / "whole-places", longest, "none", 0, None)
    whole = losses(folder / "whole")
    for death, run in zip(deaths, seen, strict=False):
        death["losses_compared"] = len(run)
        death["equal"] = all(whole[step] == loss for step, loss in run.items())
        death["survived"] = (
            death["equal"] and death["resumed_from"] in (-1, death["newest_before"]) and death["damage"] is None
        )
    return {
        "moments": moments,
        "seed": seed,
        "died": sum(death["died"] for death in deaths),
        "survived": sum(death["died"] and death["survived"] for death in deaths),
        "last_equal": len(seen[-1]) == last and all(whole[step] == loss for step, loss in seen[-1].items()),
        "stages": {stage: sum(death["died"] and death["stage"] == stage for death in deaths) for stage in stages},
        "deaths": deaths,
    }


def newest(out: Path) -> int:
    return max((int(path.name) for path in (out / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def damaged(out: Path) -> str | None:
    """What is wrong with the newest checkpoint."""
    step = newest(out)
    return manifest.damage(out / "checkpoints" / str(step)) if step else None


def losses(out: Path) -> dict[int, float]:
    path = out / "metrics.jsonl"
    return {line["step"]: line["loss"] for line in read(path)} if path.exists() else {}


def _start(context: Any, out: Path, places: Path, steps: int, stage: str, count: int, delay: float | None) -> int:
    """Train in a process of its own; its exit code. With stage `outside` it is killed `delay` s after it resumed."""
    begun = newest(out)
    places.write_text("")
    child = context.Process(target=_child, args=(out, places, steps, stage, count))
    child.start()
    try:
        if stage == "outside":
            until = time.monotonic() + 120
            while child.is_alive() and time.monotonic() < until and begun and not places.read_text():
                time.sleep(0.01)
            time.sleep(delay)
            child.kill()
        child.join(240)
    finally:
        child.kill()
        child.join()
    return child.exitcode


def _child(out: Path, places: Path, steps: int, stage: str, count: int) -> None:
    """The run, with what kills it at the `count`-th event of `stage`."""
    import jax
    from training_toy import Stream, Toy, config

    from jaxdiff.training.loop import Layout, train
    from jaxdiff.training.mesh import make_mesh

    class Recorded(Stream):
        def set_state(self, state: dict[str, int]) -> None:
            places.write_text(str(state["index"]))
            super().set_state(state)

    left = _Countdown(count)
    _arm(out / "checkpoints", stage, left)
    stream = Recorded(before=(lambda _: left.down()) if stage == "step" else None)
    mesh = make_mesh(devices=jax.devices()[:1])
    train(Toy(width=4096), stream, config(steps=steps, save_every=2, keep=2), out, layout=Layout(mesh))


class _Countdown:
    """SIGKILL to this very process when it has counted to the end."""

    def __init__(self, count: int) -> None:
        self._left, self._lock = count, threading.Lock()

    def down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(folder: Path, stage: str, left: _Countdown) -> None:
    """Watch what Python is about to do with the file system."""
    saved = threading.Event()  # a first checkpoint of this process has got its name
    removed = threading.local()  # the folder that this thread is deleting

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.remove", "os.rename", "shutil.rmtree"):
            return
        path, ours = Path(str(args[0])), str(folder) in f"{args[0]} {args[1] or ''}"
        if event == "shutil.rmtree":
            removed.path = path
        rest = getattr(removed, "path", folder)
        happens = {
            "saving": event == "os.mkdir" and ours,
            "items": event == "os.rename" and ours and "-sealing" not in path.name,
            "hashing": event == "open" and "-sealing" in str(path) and path.name != manifest.MANIFEST,
            "sealed": event == "os.rename" and "-sealing" in path.name,
            "named": event == "open" and path == folder and saved.is_set(),  # to have the new name on disk
            "deleting": event == "os.remove" and "-deleted" in rest.name and saved.is_set(),
            "cleaning": event == "os.remove" and rest.parent == folder and not saved.is_set(),
        }
        if happens.get(stage):
            left.down()
        if happens["sealed"]:
            saved.set()

    sys.addaudithook(watch)
    if stage == "manifest":
        _half_manifests(left)
    if stage == "writing":
        threading.Thread(target=_when_files, args=(folder, left), daemon=True).start()


def _half_manifests(left: _Countdown) -> None:
    """Manifests come in two halves, and death between them."""
    whole = json.dump

    def dump(value: Any, file: Any, **options: Any) -> None:
        if not file.name.endswith(manifest.MANIFEST):
            return whole(value, file, **options)
        text = json.dumps(value, **options)
        file.write(text[: len(text) // 2])
        file.flush()
        left.down()
        file.write(text[len(text) // 2 :])

    manifest.json.dump = dump


def _when_files(folder: Path, left: _Countdown) -> None:
    """Counts the moments at which a checkpoint being written has a file more than when last looked at."""
    known: set[str] = set()
    while True:
        try:
            now = {str(path) for path in folder.glob("*tmp/**/*") if path.is_file()}
        except OSError:  # a folder got another name meanwhile
            continue
        if now - known:
            left.down()
        known = now


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxdiff-test-cache"))
    sys.exit(main())

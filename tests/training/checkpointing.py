"""Run as several processes by tests: save a state over all their devices, or restore it, and print what there was.

Bad input is printed, too, and ends in exit code 2.

python checkpointing.py save|fail|restore FOLDER     # fail: process 1 cannot write
"""

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from processes import join
from training_toy import Toy

from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state

STAGE = Toy(width=8192)  # wide enough that its parameters are split
OPTIMIZER = OptimizerConfig()


def digests(state: Any) -> dict[str, str]:
    """Of every array, wherever its parts are."""
    whole = multihost_utils.process_allgather(state, tiled=True)
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]
    }


def place(step: int, process: int) -> dict[str, Any]:
    """Places differ from process to process, in length too."""
    return {"step": step, "process": process, "read": list(range(50 * process))}


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    join()
    mesh = make_mesh(fsdp=jax.device_count())
    with jax.set_mesh(mesh), Checkpoints(folder, {"a": 1}) as checkpoints:
        said = {"latest": checkpoints.latest()}
        if what == "restore":
            state, said["place"] = checkpoints.restore(abstract_state(STAGE, OPTIMIZER, mesh))
        else:
            for step in (15,) if what == "fail" else (5, 10):
                if what == "fail" and jax.process_index() == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
                state = init_state(STAGE, OPTIMIZER, jax.random.key(step), mesh)
                checkpoints.save(step, state, place(step, jax.process_index()))
        said |= {"split": not state.params["first"]["kernel"].is_fully_addressable, "state": digests(state)}
    print(json.dumps(said))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(2)

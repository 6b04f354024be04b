"""What `--init` begins with: the averaged parameters of another run of a diffusion model."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.core.trees import check_tree, flatten, listed, unflatten
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.training import multihost
from jaxdiff.training.state import abstract_params
from jaxdiff.weights import stages, tree
from jaxdiff.weights.runs import has_text_source, read_text_source
from jaxdiff.weights.stages import load_params


def initial(run: Path, model: DiffusionModel, expected: Any = None) -> dict:
    """The EMA parameters of a run, or of its model/, on the host. expected: shapes and placements, for several
    processes. ValueError if they belong to another network.

    The model may have parameters that the run lacks, such as those of another condition: they begin as in a new model,
    and a line names them.
    """
    from jaxdiff.training.checkpoints import load_ema  # imported here: Orbax takes a quarter of a second

    if not run.is_dir():
        raise FileNotFoundError(f"--init {run}: no such folder")
    checkpoints, shapes = run / "checkpoints", abstract_params(model)
    if checkpoints.is_dir() and multihost.count() > 1:  # all processes read it together
        sharded = load_ema(checkpoints, expected, part=True)
        params = jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), sharded)
    elif checkpoints.is_dir():
        params = load_ema(checkpoints)
        check_tree(params, shapes, str(checkpoints), part=True)
    else:
        params = load_params(model, run / tree.PARAMS, part=True)
    have = flatten(jax.tree.map(np.asarray, params))
    new = sorted(flatten(shapes).keys() - have.keys())
    if new:
        have |= _new(model, new)
        if multihost.index() == 0:
            print(f"--init {run}: {listed('parameters are new and begin at random', new)}")
    return unflatten(have)


def warn_of_other_text(run: Path, fingerprint: str | None) -> None:
    """Say that a run was trained with another text encoder: widths may agree all the same."""
    folder = next((each for each in (run / "model", run) if (each / stages.SETTINGS).is_file()), None)
    known = None if folder is None else stages.read_settings(folder)[2]
    if known is None or fingerprint in (None, known) or multihost.index() > 0:
        return
    place = read_text_source(run).source if has_text_source(run) else "its own"
    warnings.warn(
        f"--init {run} was trained with another text encoder ({place}), whose embeddings it has learned to read: "
        "unless another one is meant, name it with --text",
        stacklevel=2,
    )


def _new(model: DiffusionModel, names: list[str]) -> dict[str, np.ndarray]:
    """Initial parameters with these names, on the host; the others are not computed."""
    computed = jax.jit(lambda key: {name: leaf for name, leaf in flatten(model.init(key)[0]).items() if name in names})
    return jax.tree.map(np.asarray, computed(jax.random.key(0)))

"""FID's Inception-v3 from a safetensors file with PyTorch's names.

The public file, pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases, is a pickle;
`experiments.export inception` converts it.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import trees
from jaxdiff.nets.inception import SIDE, Inception
from jaxdiff.weights import hub, tree

UNUSED = ("fc.bias", "num_batches_tracked")
"""Suffixes of ignored tensors: the Inception score omits the bias; the other counts training steps."""

RULES = (
    ("conv_1a/{part}/{leaf}", "Conv2d_1a_3x3.{part}.{leaf}"),
    ("conv_2a/{part}/{leaf}", "Conv2d_2a_3x3.{part}.{leaf}"),
    ("conv_2b/{part}/{leaf}", "Conv2d_2b_3x3.{part}.{leaf}"),
    ("conv_3b/{part}/{leaf}", "Conv2d_3b_1x1.{part}.{leaf}"),
    ("conv_4a/{part}/{leaf}", "Conv2d_4a_3x3.{part}.{leaf}"),
    ("classes/{leaf}", "fc.{leaf}"),
    ("mixed_{block}/one/{part}/{leaf}", "Mixed_{block}.branch1x1.{part}.{leaf}"),
    ("mixed_{block}/pool/{part}/{leaf}", "Mixed_{block}.branch_pool.{part}.{leaf}"),
    ("mixed_{block}/five_{i}/{part}/{leaf}", "Mixed_{block}.branch5x5_{i}.{part}.{leaf}"),
    ("mixed_5{x}/three_{i}/{part}/{leaf}", "Mixed_5{x}.branch3x3dbl_{i}.{part}.{leaf}"),
    ("mixed_6a/three/{part}/{leaf}", "Mixed_6a.branch3x3.{part}.{leaf}"),
    ("mixed_6a/twice_{i}/{part}/{leaf}", "Mixed_6a.branch3x3dbl_{i}.{part}.{leaf}"),
    ("mixed_6{x}/seven_{i}/{part}/{leaf}", "Mixed_6{x}.branch7x7_{i}.{part}.{leaf}"),
    ("mixed_6{x}/twice_{i}/{part}/{leaf}", "Mixed_6{x}.branch7x7dbl_{i}.{part}.{leaf}"),
    ("mixed_7a/seven_{i}/{part}/{leaf}", "Mixed_7a.branch7x7x3_{i}.{part}.{leaf}"),
    ("mixed_7{x}/three_{i}/{part}/{leaf}", "Mixed_7{x}.branch3x3_{i}.{part}.{leaf}"),
    ("mixed_7{x}/twice_{i}/{part}/{leaf}", "Mixed_7{x}.branch3x3dbl_{i}.{part}.{leaf}"),
)
WORDS = {"norm": "bn", "kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(path: Path) -> dict:
    """The parameters, float32. FileNotFoundError with download instructions if absent; ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights of Inception at {path}: download pt_inception-2015-12-05-6726825d.pth from pytorch-fid's "
            f"releases, then python -m experiments.export inception --source FILE.pth --out {path}"
        )
    shapes = _shapes()
    stored = {key: tensor for key, tensor in tree.read_header(path)[0].items() if not key.endswith(UNUSED)}
    return hub.load_params(stored, shapes, names(shapes), "float32", jnp.asarray, str(path))


def write(path: Path, tensors: Mapping[str, np.ndarray], where: str) -> int:
    """Writes tensors under PyTorch's names, as `load` reads them; returns the number of parameters.

    where: the origin of the tensors, for the ValueError if they do not fit this network.
    """
    kept = {key: np.asarray(tensor, np.float32) for key, tensor in tensors.items() if not key.endswith(UNUSED)}
    shapes = _shapes()
    want = {key: hub.theirs_shape(ours, trees.flatten(shapes)[ours].shape) for ours, key in names(shapes).items()}
    trees.check_shapes({key: tensor.shape for key, tensor in kept.items()}, want, where)
    tree.write_safetensors(path, kept, {"format": "pt"})
    return sum(tensor.size for tensor in kept.values())


def names(shapes: dict) -> dict[str, str]:
    """Maps each parameter path to its PyTorch name."""
    return hub.names(trees.flatten(shapes), RULES, WORDS)


def _shapes() -> dict:
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]

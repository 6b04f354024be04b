"""A dVAE on disk: DIR/dvae.json (settings) and DIR/model.safetensors; and OpenAI's published pickles.

OpenAI published encoder.pkl and decoder.pkl, pickled modules of its package `dall_e`. `from_openai` converts them.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.core.trees import flatten, listed, unflatten
from jaxdiff.models.dvae import TrainedDVAE
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.weights import pickles, sizes, tree
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SETTINGS = "dvae.json"
PACKAGE = "dall_e"
"""The package of the classes in OpenAI's pickles."""
PUBLISHED = DVAEConfig()


def save(dvae: TrainedDVAE, directory: str | Path, dtype: str = "float32") -> None:
    """Writes both files atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    content = {"version": VERSION, "side": dvae.side, "config": to_json(dvae.config)}
    with tree.saving(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        tree.save_tree(directory / tree.PARAMS, dvae.params, {"format": "jaxdiff"}, dtype)


def folder_of(run: str | Path) -> Path:
    """The folder of a run's dVAE, or `run` itself if it holds one."""
    inner = Path(run) / "model"
    return inner if (inner / SETTINGS).is_file() else Path(run)


def load(directory: str | Path) -> TrainedDVAE:
    """Settings and float32 parameters. Raises FileNotFoundError, or ValueError for invalid files."""
    path = Path(directory) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no dVAE here (it has no {SETTINGS})")
    data = json_files.read_object(path)
    if not {"side", "config"} <= data.keys():
        raise ValueError(f"{path}: not the settings of a dVAE")
    check_version(data, str(path))
    config, side = from_json(data["config"], str(path)), data["side"]
    if not isinstance(config, DVAEConfig) or not isinstance(side, int) or side < 1 or side % config.stride:
        raise ValueError(f"{path}: not the settings of a dVAE")
    expected = sizes.shapes(_init, config, str(path))
    params = tree.load_expected(path.parent / tree.PARAMS, expected)
    return TrainedDVAE(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), side)


def from_openai(encoder: str | Path, decoder: str | Path, config: DVAEConfig = PUBLISHED) -> TrainedDVAE:
    """The dVAE of OpenAI's two pickles; nothing in them is executed. ValueError if a file is no such pickle, or its
    tensors are not those of `config`."""
    params: dict[str, jax.Array] = {}
    for name, path in (("encoder", encoder), ("decoder", decoder)):
        stored = pickles.read_tensors(path, (PACKAGE,))
        wanted = {key: leaf for key, leaf in flatten(_shapes(config)).items() if key.startswith(f"{name}/")}
        names = {key: openai_name(config, key) for key in wanted}
        if missing := sorted(set(names.values()) - stored.keys()):
            raise ValueError(f"{path}: not the {name} of this dVAE: {listed('missing', missing)}")
        if extra := sorted(stored.keys() - set(names.values())):
            raise ValueError(f"{path}: not the {name} of this dVAE: {listed('unknown', extra)}")
        for key, leaf in wanted.items():
            array = stored[names[key]]
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            if array.shape != leaf.shape:
                raise ValueError(f"{path}: {names[key]} has the shape {array.shape}, not {leaf.shape}")
            params[key] = jnp.asarray(np.asarray(array, np.float32))
    return TrainedDVAE(config, unflatten(params), 256)


def openai_name(config: DVAEConfig, key: str) -> str:
    """OpenAI's name of a parameter. Their groups are numbered in the order in which they run, from 1."""
    network, layer, *inner, leaf = key.split("/")
    letter = {"kernel": "w", "bias": "b"}[leaf]
    if layer in ("stem", "head"):
        return f"blocks.{'input' if layer == 'stem' else 'output.conv'}.{letter}"
    level, block = map(int, layer.removeprefix("level_").split("_"))
    group = level + 1 if network == "encoder" else len(config.multipliers) - level
    path = "id_path" if inner == ["shortcut"] else f"res_path.{inner[0]}"
    return f"blocks.group_{group}.block_{block + 1}.{path}.{letter}"


def _init(config: DVAEConfig) -> dict:
    side = config.stride
    return config.module().init(jax.random.key(0), jnp.zeros((1, side, side, config.image_channels)))["params"]


def _shapes(config: DVAEConfig) -> dict:
    return jax.eval_shape(lambda: _init(config))

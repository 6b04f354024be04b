"""A classifier on disk: DIR/classifier.json (its name and settings) and DIR/model.safetensors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdiff.core import json_files
from jaxdiff.core.files import replacing
from jaxdiff.models.classifier import ClassifierTraining
from jaxdiff.nets.classifier import ClassifierConfig
from jaxdiff.weights import sizes, tree
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SETTINGS = "classifier.json"


def save(directory: Path, name: str, config: ClassifierConfig, params: dict, dtype: str = "float32") -> None:
    """Writes both files atomically. name: the training dataset; also the name of its metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    with tree.saving(path), replacing(path) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, "name": name, "config": to_json(config)}, indent=1) + "\n")
        tree.save_tree(directory / tree.PARAMS, params, {"format": "jaxdiff"}, dtype)


def load(directory: Path) -> tuple[str, ClassifierConfig, dict]:
    """Name, settings and parameters (float32). Raises FileNotFoundError, or ValueError for invalid files."""
    path = Path(directory) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no classifier here (it has no {SETTINGS})")
    data = json_files.read_object(path)
    if not {"name", "config"} <= data.keys():
        raise ValueError(f"{path}: not the settings of a classifier")
    check_version(data, str(path))
    name, config = data["name"], from_json(data["config"], str(path))
    if not isinstance(name, str) or not isinstance(config, ClassifierConfig):
        raise ValueError(f"{path}: not the settings of a classifier")
    sizes.check_name(name, "name", str(path))
    expected = sizes.shapes(_init, config, str(path))
    params = tree.load_expected(Path(directory) / tree.PARAMS, expected)
    return name, config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def _init(config: ClassifierConfig) -> dict:
    return ClassifierTraining(config).init(jax.random.key(0))[0]

"""A trained Imagen cascade on disk.

    DIR/text/              the text encoder: config.json, model.safetensors, tokenizer.json (transformers layout)
    DIR/base64/            stage.json (settings) and model.safetensors (averaged parameters)
    DIR/sr256/ DIR/sr1024/ the same for super-resolution

A folder of a training run (`…/model`) is one such stage. `SHIPPED` is the tiny cascade of the package.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdiff.systems.cascade import Cascade, Model
from jaxdiff.systems.imagen import Sampling, Stage
from jaxdiff.weights import tree
from jaxdiff.weights.settings import from_json, to_json
from jaxdiff.weights.t5 import load_text_encoder

SHIPPED = Path(__file__).parent / "tiny"
STAGES = ("base64", "sr256", "sr1024")


def load(directory: str | Path = SHIPPED) -> Cascade:
    """The cascade in `directory`; a super-resolution stage may be missing, with all after it.

    Raises FileNotFoundError, or ValueError for settings, names or shapes that do not fit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder of weights")
    base = load_model(directory / STAGES[0])
    present = [name for name in STAGES[1:] if (directory / name).is_dir()]
    if present != list(STAGES[1 : 1 + len(present)]):
        raise ValueError(f"{directory}: holds {present[-1]} without the stage before it")
    text = load_text_encoder(directory / "text", base.stage.text_length)
    return Cascade(text, base, tuple(load_model(directory / name) for name in present))


def load_model(directory: str | Path) -> Model:
    """One stage: its settings, its parameters as float32, and how it draws."""
    directory = Path(directory)
    settings = directory / "stage.json"
    if not settings.is_file():
        raise FileNotFoundError(f"{directory}: no stage here (it has no stage.json)")
    try:
        data = json.loads(settings.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{settings}: not JSON ({error})") from error
    if not isinstance(data, dict) or not {"stage", "sampling"} <= data.keys() <= {"stage", "sampling", "text"}:
        raise ValueError(f"{settings}: not the settings of a stage")
    stage, sampling = (from_json(data[name], str(settings)) for name in ("stage", "sampling"))
    text = data.get("text")
    if not isinstance(stage, Stage) or not isinstance(sampling, Sampling) or not isinstance(text, str | None):
        raise ValueError(f"{settings}: not the settings of a stage")
    return Model(stage, load_params(stage, directory / "model.safetensors"), sampling, text)


def load_params(stage: Stage, path: Path) -> dict:
    """The parameters of a stage from its safetensors file, float32. ValueError where names or shapes differ."""
    params = tree.load_expected(path, jax.eval_shape(stage.init, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def save_model(model: Model, directory: str | Path, dtype: str = "float32") -> None:
    """Writes one stage; `dtype` "float16" or "bfloat16" halves the file. OSError where the disk is full.

    Both files appear whole or not at all, and an older stage stays as it was where the new one cannot be saved.
    """
    directory = Path(directory)
    told = {"stage": to_json(model.stage), "sampling": to_json(model.sampling)}
    settings = json.dumps(told if model.text is None else told | {"text": model.text}, indent=1)
    directory.mkdir(parents=True, exist_ok=True)
    with tree.replacing(directory / "stage.json") as temporary:
        temporary.write_text(settings + "\n")
        tree.save_tree(directory / "model.safetensors", model.params, {"format": "jaxdiff"}, dtype)

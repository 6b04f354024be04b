"""Descriptions of folders for error messages: users often name a folder beside the intended one."""

from pathlib import Path

from jaxdiff.core import json_files
from jaxdiff.core.messages import quoted
from jaxdiff.weights.stages import SETTINGS


def describe(folder: Path) -> str:
    """Describe a folder without a cascade, and how to use it."""
    for find in (_run, _network, _other):
        if description := find(folder):
            return description
    runs = sorted(path.parent.parent.name for path in folder.glob(f"*/model/{SETTINGS}"))
    if runs:
        return f"holds the runs {', '.join(runs)}: name them, the one that samples from text first"
    return (
        "no weights: a cascade has base64/ (python -m experiments.export imagen makes one of finished runs), a run of "
        "experiments.train imagen.… has model/, a pipeline of DeepFloyd IF has model_index.json"
    )


def _run(folder: Path) -> str | None:
    """A training run that cannot be sampled from."""
    command = _json(folder / "settings.json").get("command")
    if isinstance(command, str):
        used = {
            "t5": f"its {folder / 'encoder'} is for --text of experiments.train",
            "clip": f"its {folder / 'model'} is for --clip of experiments.evaluate",
            "classifier": f"its {folder / 'model'} is for --classifier of experiments.evaluate",
        }
        return f"a run of {quoted(command)}: {used.get(command, 'it has saved nothing yet')}"
    if (folder / "checkpoints").is_dir():
        return "a run without model/: of another version, or not of a diffusion model"
    return None


def _network(folder: Path) -> str | None:
    kind = _json(folder / "config.json").get("model_type")
    if kind in ("t5", "mt5", "umt5"):
        return "a T5 in the transformers layout: a text encoder, for --text of experiments.train"
    if kind in ("clip", "clip_text_model"):
        return "a CLIP in the transformers layout, for --clip of experiments.evaluate"
    if (folder / "classifier.json").is_file():
        return "a classifier, for --classifier of experiments.evaluate"
    if kind is not None:
        return f"a network of type {quoted(kind)}, not a cascade"
    return None


def _other(folder: Path) -> str | None:
    if (folder / "embeddings.json").is_file():
        return "stored text embeddings, for --embeddings of experiments.train"
    if (folder / "dataset.json").is_file():
        return f"a dataset: --data records:{folder} of experiments.train"
    if not any(folder.iterdir()):
        return "an empty folder"
    return None


def _json(path: Path) -> dict:
    """The JSON object in a file; empty if absent or invalid."""
    try:
        return json_files.read_object(path)
    except (OSError, ValueError):
        return {}

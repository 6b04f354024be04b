"""Output of evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdiff.core.files import write_json
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.weights.settings import to_json


def report(scores: dict, provenance: dict, path: Path | None) -> None:
    """Print the scores without the lists of wrong images; write everything to `path`."""
    for name, value in scores.items():
        if not name.startswith("wrong"):
            print(f"{name:37} {_readable(value)}")
    if path is not None:
        write_json(path, {**scores, "made_by": provenance})


def provenance(settings: Any, model: Pipeline, names: Sequence[str]) -> dict:
    """The provenance of scores: settings `names`, weights, sampling settings of each stage, device."""
    values = {name: getattr(settings, name) for name in names} | {"dtype": settings.sampling.dtype}
    stages = [to_json(each.sampling) for each in model.boxes if isinstance(each, TrainedModel)]
    weights = ", ".join(settings.pipeline.names)
    return {**values, "weights": weights, "stages": stages, "device": jax.devices()[0].device_kind}


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items())
    return f"{value:.4g}"

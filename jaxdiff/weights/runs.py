"""Loading the folder of a diffusion model's training run, finished or not.

RUN/model/stage.json         settings, written before the first step
RUN/checkpoints/             the newest holds the averaged parameters
RUN/model/model.safetensors  the averaged parameters, written at the end
RUN/text_encoder.json        location and settings of the text encoder
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.trees import check_tree
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.training.state import abstract_params
from jaxdiff.weights import hub, stages, tree

MODEL = "model"
TEXT = "text_encoder.json"


@dataclass(frozen=True)
class TextSource:
    """source: directory or hub id of the text encoder. length: tokens per caption. dtype: its compute type.
    fingerprint: that of its embeddings."""

    source: str
    length: int
    dtype: str
    fingerprint: str


def is_run(folder: Path) -> bool:
    """Whether the folder is a training run that has started."""
    return (folder / MODEL / stages.SETTINGS).is_file()


def latest_step(run: Path) -> int | None:
    """The step of the newest checkpoint; None if there is none."""
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def load(run: Path) -> TrainedModel:
    """The model at a run's newest checkpoint. FileNotFoundError if there is none yet; ValueError if it is damaged."""
    model, sampling, text = stages.read_settings(run / MODEL)
    params = averaged(run, model)
    if params is None:
        params = stages.load_params(model, run / MODEL / tree.PARAMS)
    return TrainedModel(model, params, sampling, text)


def averaged(run: Path, model: Any) -> dict | None:
    """The averaged parameters of a run's newest checkpoint; None if they are in its model/ alone. Raises as `load`."""
    checkpoints = run / "checkpoints"
    if latest_step(run) is not None:
        from jaxdiff.training.checkpoints import load_ema  # imported here: Orbax takes a quarter of a second

        ema = load_ema(checkpoints)
        check_tree(ema, abstract_params(model), str(checkpoints))
        return ema
    if not (run / MODEL / tree.PARAMS).is_file():
        raise FileNotFoundError(f"{run}: a run that has saved no checkpoint yet; wait for its first (--save-every)")
    return None


def save_text_source(run: Path, source: TextSource) -> None:
    """Record the run's text encoder; a directory is stored as an absolute path."""
    place = Path(source.source)
    values = asdict(source) | ({"source": str(place.resolve())} if place.is_dir() else {})
    write_json(run / TEXT, values)


def has_text_source(run: Path) -> bool:
    return (run / TEXT).is_file()


def read_text_source(run: Path) -> TextSource:
    """The inverse of `save_text_source`. ValueError if damaged; FileNotFoundError if the text encoder is gone."""
    path = run / TEXT
    values = json_files.read_object(path)
    if values.keys() != {field.name for field in fields(TextSource)} or type(values["length"]) is not int:
        raise ValueError(f"{path}: does not say where a text encoder is")
    if not all(isinstance(values[name], str) for name in ("source", "dtype", "fingerprint")):
        raise ValueError(f"{path}: does not say where a text encoder is")
    hub.check_dtype(values["dtype"])
    source = TextSource(**values)
    if Path(source.source).is_absolute() and not Path(source.source).is_dir():
        raise FileNotFoundError(f"{source.source}: the text encoder of {run} is no longer there; name it with --text")
    return source

"""The folder of a training run of a diffusion model as weights: finished or not, it can be sampled from.

RUN/model/stage.json         settings, from before the first step on
RUN/checkpoints/             of which the newest has the averaged parameters
RUN/model/model.safetensors  these, at the end
RUN/text_encoder.json        where the text encoder is, and how it was used
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.trees import check_tree
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.training.checkpoints import load_ema
from jaxdiff.training.state import abstract_params
from jaxdiff.weights import hub, stages

MODEL = "model"
TEXT = "text_encoder.json"


@dataclass(frozen=True)
class TextSource:
    """source: directory or hub id of the text encoder. length: tokens a caption. dtype: what it was computed in.
    fingerprint: of what it gave."""

    source: str
    length: int
    dtype: str
    fingerprint: str


def is_run(folder: Path) -> bool:
    """Whether the folder is that of a run which has begun."""
    return (folder / MODEL / stages.SETTINGS).is_file()


def load(run: Path) -> TrainedModel:
    """What a run has learned up to its newest checkpoint. FileNotFoundError where it has saved none yet; ValueError for
    a damaged one."""
    model, sampling, text = stages.read_settings(run / MODEL)
    checkpoints, params = run / "checkpoints", run / MODEL / "model.safetensors"
    if any(path.name.isdigit() for path in checkpoints.glob("*")):
        learned = load_ema(checkpoints)
        check_tree(learned, abstract_params(model), str(checkpoints))
        return TrainedModel(model, learned, sampling, text)
    if not params.is_file():
        raise FileNotFoundError(f"{run}: a run that has saved no checkpoint yet; wait for its first (--save-every)")
    return TrainedModel(model, stages.load_params(model, params), sampling, text)


def save_text_source(run: Path, source: TextSource) -> None:
    """Write down where the run's text encoder is: a directory by its absolute path."""
    place = Path(source.source)
    values = asdict(source) | ({"source": str(place.resolve())} if place.is_dir() else {})
    write_json(run / TEXT, values)


def has_text_source(run: Path) -> bool:
    return (run / TEXT).is_file()


def read_text_source(run: Path) -> TextSource:
    """ValueError for a damaged file; FileNotFoundError where the text encoder is no longer there."""
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

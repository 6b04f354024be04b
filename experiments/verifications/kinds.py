"""What weights are, by their files: a family, the library to compare it with, and its comparison."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.verifications import clip, deepfloyd, stable_diffusion, t5
from experiments.verifications.inputs import Inputs
from experiments.verifications.libraries import Against, Libraries
from experiments.verifications.rows import Row
from jaxdiff.core.messages import quoted
from jaxdiff.weights import hub, imagen, kinds
from jaxdiff.weights.stages import SETTINGS

Compare = Callable[[Sequence[str | Path], Inputs, Libraries], Iterator[Row]]


@dataclass(frozen=True)
class Kind:
    """A family. sampled: whether its comparison samples images, so that size and steps matter."""

    title: str
    against: Against
    compare: Compare
    sampled: bool


T5 = Kind("T5", "transformers", t5.compare, sampled=False)
CLIP = Kind("CLIP", "transformers", clip.compare, sampled=False)
DEEPFLOYD = Kind("DeepFloyd IF", "diffusers", deepfloyd.compare, sampled=True)
STABLE_DIFFUSION = Kind("Stable Diffusion", "diffusers", stable_diffusion.compare, sampled=True)


def recognised(weights: Sequence[str]) -> tuple[Kind, list[str | Path]]:
    """The family of the weights, and the place of each network. Only settings are downloaded, and only for a hub id.

    Raises FileNotFoundError, or ValueError that says what the folder is.
    """
    if not weights:
        raise ValueError("--weights names nothing: a folder, a file or a hub id")
    places = [place for each in weights for place in _places(each)]
    found = [_kind(place) for place in places]
    if len(places) > 1 and any(kind is not DEEPFLOYD for kind in found):
        raise ValueError(f"{', '.join(map(str, places))}: several places are for the stages of DeepFloyd IF only")
    return found[0], places


def _places(name: str) -> list[str | Path]:
    """A folder of several stages is each of them."""
    folder = Path(name)
    if folder.exists():
        stages = [folder / stage for stage in imagen.STAGES if imagen.is_pipeline(folder / stage)]
        return [*stages] or [folder]
    if name.endswith(".safetensors") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such file or folder")
    return [name]


def _kind(place: str | Path) -> Kind:
    if Path(place).is_file():
        return STABLE_DIFFUSION
    folder = hub.directory_of(place, folders=())  # of a hub id the settings alone
    if imagen.is_pipeline(folder):
        name = str(hub.read_json(folder / "model_index.json").get("_class_name"))
        for prefix, kind in (("StableDiffusion", STABLE_DIFFUSION), ("IF", DEEPFLOYD)):
            if name.startswith(prefix):
                return kind
        raise ValueError(f"{folder}: a pipeline of the class {quoted(name)} is not compared")
    if (folder / "config.json").is_file():
        model: Any = hub.read_json(folder / "config.json").get("model_type")
        for models, kind in ((t5.CLASSES, T5), (clip.TOWERS, CLIP)):
            if isinstance(model, str) and model in models:
                return kind
    if any((folder / stage / SETTINGS).is_file() for stage in ("", "model", *imagen.STAGES)):
        raise ValueError(f"{folder}: a model of jaxdiff's own, of which there is no independent implementation")
    raise ValueError(f"{folder}: {kinds.describe(folder)}")

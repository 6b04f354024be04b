"""Settings dataclasses ⇄ JSON: every dataclass by its name with its fields, enums by theirs. A closed list of classes,
so that a file can name nothing else. Fields that say only how something is computed (metadata `how`) are not written,
and left as they are by default where a file has them."""

import dataclasses
import enum
import typing
from typing import Any

import typeguard

from jaxdiff.core.messages import quoted, reason
from jaxdiff.diffusion import grids, guidance, losses, parameterization, samplers, schedules, thresholding
from jaxdiff.nets import blocks, classifier, unet
from jaxdiff.systems import imagen, imagen_drawing, tiles
from jaxdiff.weights import sizes

_CLASSES = {
    cls.__name__: cls
    for cls in (
        *(imagen.Stage, imagen_drawing.Sampling, imagen.NullText, imagen.Enlargement, tiles.Tiles),
        *(unet.UNetConfig, unet.EfficientUNetConfig, unet.Reading, blocks.Activation),
        classifier.ClassifierConfig,
        *(schedules.Cosine, schedules.Linear, schedules.EDM, schedules.RectifiedFlow, schedules.Discrete),
        *(schedules.Focused, parameterization.Prediction, guidance.Guidance),
        *(losses.Simple, losses.MinSNR, losses.PowerSNR, losses.Sigmoid),
        *(samplers.DDPM, samplers.DDIM, samplers.DPMSolverPP2M, samplers.Heun, samplers.Euler),
        *(grids.UniformTime, grids.UniformLogSNR, grids.Karras),
        *(grids.Leading, grids.Trailing, grids.Linspace, grids.Respaced),
        *(thresholding.Unthresholded, thresholding.Static, thresholding.Dynamic),
    )
}


def to_json(settings: Any) -> Any:
    """Settings as JSON's types; ValueError for a class that `from_json` would not read back."""
    if isinstance(settings, enum.Enum) or dataclasses.is_dataclass(settings):
        name = type(settings).__name__
        if _CLASSES.get(name) is not type(settings):
            raise ValueError(f"settings of class {name} cannot be written to a file")
        if isinstance(settings, enum.Enum):
            return {"class": name, "member": settings.name}
        learned = [field.name for field in dataclasses.fields(settings) if not field.metadata.get("how")]
        return {"class": name, **{field: to_json(getattr(settings, field)) for field in learned}}
    if isinstance(settings, tuple | list):
        return [to_json(item) for item in settings]
    return settings


def from_json(data: Any, where: str) -> Any:
    """The inverse of `to_json`, of what `core.json_files` has read. ValueError that names `where` for anything it does
    not know, and for sizes beyond their bounds (`sizes.py`), before anything is built."""
    if isinstance(data, list):
        if len(data) > sizes.ENTRIES:
            raise ValueError(f"{where}: a list of {len(data)} entries, more than {sizes.ENTRIES}")
        return tuple(from_json(item, where) for item in data)
    if not isinstance(data, dict):
        return data
    name = data.get("class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"{where}: unknown class of settings {quoted(name)}")
    cls = _CLASSES[name]
    how: set[str] = set()
    if dataclasses.is_dataclass(cls):
        how = {field.name for field in dataclasses.fields(cls) if field.metadata.get("how")} - {"class"}
    fields = {field: from_json(value, where) for field, value in data.items() if field not in {"class", *how}}
    _check(cls, fields, where)
    try:
        made = cls[fields["member"]] if issubclass(cls, enum.Enum) else cls(**fields)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where}: settings of {name} that this version does not know ({reason(error)})") from error
    except ValueError as error:  # of the class itself, which knows no file
        raise ValueError(f"{where}: {reason(error)}") from error
    if isinstance(made, unet.UNetConfig):
        sizes.check_network(made, where)
    return made


def _check(cls: type, fields: dict[str, Any], where: str) -> None:
    """ValueError for a field of another type, or out of its bounds."""
    hints, every = typing.get_type_hints(cls), typeguard.CollectionCheckStrategy.ALL_ITEMS
    for field, value in fields.items():
        hint = hints.get(field, typing.Any)
        sizes.check(cls, field, value, where)
        try:
            typeguard.check_type(value, hint, collection_check_strategy=every)
        except typeguard.TypeCheckError as error:
            raise ValueError(f"{where}: {field} of {cls.__name__} is {quoted(value)}: {reason(error)}") from error
        if isinstance(value, bool) and hint in (float, float | None):  # to Python, True is the number 1
            raise ValueError(f"{where}: {field} of {cls.__name__} is {value}, it takes only numbers")

"""Gathers finished stages into one folder, which every script takes as `--weights`.

    python -m experiments.imagen.assemble --text runs/t5/encoder --base64 runs/base64/model --out runs/cascade
    python -m experiments.imagen.assemble --text runs/t5/encoder --base64 runs/base64/model --sr256 runs/sr256/model \\
        --sr1024 runs/sr1024/model --dtype float16 --out runs/cascade
    python -m experiments.imagen.assemble --text runs/t5/encoder --base64 runs/a/model runs/b/model --out runs/mean

Takes seconds. The stages are checked against one another and the text encoder before anything is written. Several
folders for one stage give the mean of their parameters: the ends of runs each of which began (`--init`) with what the
last had learned draw better together than each alone.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.cli import run
from jaxdiff.core.files import replacing
from jaxdiff.models.sampling import TrainedModel, mean
from jaxdiff.systems.imagen import imagen
from jaxdiff.weights import hub, t5
from jaxdiff.weights.imagen import STAGES, load_model, save_model


@dataclass(frozen=True)
class Settings:
    """The parts of a cascade."""

    text: str
    """Directory, or hub id, of the text encoder that the stages were trained with."""
    base64: tuple[Path, ...]
    """The model/ folder of the base's run; of several runs, each begun with the last one's parameters: their mean."""
    out: Path
    """Folder of the cascade."""
    sr256: tuple[Path, ...] = ()
    """The same of 64→256; left out, the cascade ends at 64."""
    sr1024: tuple[Path, ...] = ()
    """The same of 256→1024."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the text encoder was computed in when the stages were trained."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the stages' parameters are stored in. Two bytes halve the files; they are float32 again when loaded."""


def main(settings: Settings) -> None:
    """Gather finished stages into one folder."""
    if not settings.base64:
        raise ValueError("--base64 names no folder")
    folders = {name: given for name in STAGES if (given := getattr(settings, name))}
    models = {name: _mean(given) for name, given in folders.items()}
    base, *super_resolution = models.values()
    if base.model.text is None:
        raise ValueError(f"{folders['base64'][0]}: a stage that reads no text")
    directory = hub.directory_of(settings.text, "T5")
    encoder = t5.load_text_encoder(directory, base.model.text.shape[0], settings.text_dtype)
    made_by = encoder.fingerprint
    for name, model in models.items():
        if model.text_fingerprint not in (None, made_by):
            raise ValueError(
                f"{folders[name][0]} was trained with the text encoder {model.text_fingerprint}, {settings.text} in "
                f"{settings.text_dtype} is {made_by}"
            )
    cascade = imagen(encoder, base, *super_resolution)
    others = [name for name in STAGES if name not in folders and (settings.out / name).exists()]
    if others:
        raise ValueError(f"{settings.out} holds {' and '.join(others)} of another cascade: choose another folder")
    text = settings.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    for file in sorted(directory.iterdir()):
        if file.is_file():
            with replacing(text / file.name) as temporary:
                shutil.copyfile(file, temporary)
    for name, model in models.items():
        save_model(model, settings.out / name, settings.dtype)
    print(f"{settings.out}: a cascade that draws {', '.join(map(str, cascade.sides))}")


def _mean(folders: tuple[Path, ...]) -> TrainedModel:
    models = [load_model(folder) for folder in folders]
    try:
        return mean(models)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, folders))}: {error}") from error


if __name__ == "__main__":
    run(main)

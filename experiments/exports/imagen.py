"""Finished stages and their text encoder in one folder, which every command takes as `--weights`.

    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --out runs/cascade
    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --sr1024 runs/sr1024 --dtype float16 \\
        --out runs/cascade
    python -m experiments.export imagen --base64 runs/a runs/b --out runs/mean

Takes seconds. The stages are checked against one another and the text encoder before anything is written. Several
runs of one stage give the mean of their parameters: the ends of runs each of which began (`--init`) with what the last
had learned sample better together than each alone.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.core.files import replacing
from jaxdiff.models.sampling import TrainedModel, mean
from jaxdiff.systems.imagen import imagen
from jaxdiff.weights import hub, runs, stages, t5
from jaxdiff.weights.imagen import STAGES
from jaxdiff.weights.runs import TextSource


@dataclass(frozen=True)
class Settings:
    """The parts of a cascade."""

    base64: tuple[Path, ...] = ()
    """Folder of the base's run, or of a cascade's stage; of several runs, each begun with the last one's parameters:
    their mean."""
    sr256: tuple[Path, ...] = ()
    """The same of 64→256; left out, the cascade ends at 64."""
    sr1024: tuple[Path, ...] = ()
    """The same of 256→1024."""
    text: str | None = None
    """Directory, or hub id, of the text encoder that the stages were trained with; left out: where the base's run has
    it from."""
    text_dtype: Literal["float32", "bfloat16"] | None = None
    """What the text encoder was computed in when the stages were trained; left out: as the base's run says, or
    float32."""
    out: Path = Path("runs/cascade")
    """Folder of the cascade."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the stages' parameters are stored in. Two bytes halve the files; they are float32 again when loaded."""


def main(settings: Settings) -> None:
    """A cascade of Imagen, from its finished stages."""
    if not settings.base64:
        raise ValueError("--base64 names no folder")
    folders = {name: given for name in STAGES if (given := getattr(settings, name))}
    models = {name: _mean(given) for name, given in folders.items()}
    base, *super_resolution = models.values()
    if base.model.text is None:
        raise ValueError(f"{settings.base64[0]}: a stage that reads no text")
    source = text_source(settings, base.model.text.shape[0])
    directory = hub.directory_of(source.source, "T5")
    encoder = t5.load_text_encoder(directory, source.length, source.dtype)
    made_by = encoder.fingerprint
    for name, model in models.items():
        if model.text_fingerprint not in (None, made_by):
            raise ValueError(
                f"{folders[name][0]} was trained with the text encoder {model.text_fingerprint}, {source.source} in "
                f"{source.dtype} is {made_by}"
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
        stages.save_model(model, settings.out / name, settings.dtype)
    sides = ", ".join(map(str, cascade.sides))
    print(f"{settings.out}: a cascade that samples {sides} pixels, for --weights of experiments.sample")


def text_source(settings: Settings, length: int) -> TextSource:
    """Where the text encoder is. ValueError where neither the command line nor the base's run says so."""
    run = settings.base64[0]
    if settings.text is None:
        if not runs.has_text_source(run):
            raise ValueError(f"{run} does not say where its text encoder is: name it with --text")
        known = runs.read_text_source(run)
        return TextSource(known.source, length, settings.text_dtype or known.dtype, known.fingerprint)
    return TextSource(settings.text, length, settings.text_dtype or "float32", "")


def _mean(folders: tuple[Path, ...]) -> TrainedModel:
    models = [runs.load(folder) if runs.is_run(folder) else stages.load_model(folder) for folder in folders]
    try:
        return mean(models)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, folders))}: {error}") from error

"""Export finished stages and their text encoder to one folder, for `--weights` of every command.

    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --out runs/cascade
    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --sr1024 runs/sr1024 --dtype float16 \\
        --out runs/cascade
    python -m experiments.export imagen --base64 runs/a runs/b --out runs/mean

Takes seconds. The stages and the text encoder are checked for compatibility before anything is written. Several runs of
one stage are averaged: if each run started (`--init`) from the previous one, the mean of their parameters samples
better than any of them.
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
    """Stages and text encoder of a cascade."""

    base64: tuple[Path, ...] = ()
    """Folder of the base's run, or of a cascade's stage; several runs, each started from the previous one's parameters,
    are averaged."""
    sr256: tuple[Path, ...] = ()
    """The same for 64→256; default: the cascade ends at 64."""
    sr1024: tuple[Path, ...] = ()
    """The same for 256→1024."""
    text: str | None = None
    """Directory or hub id of the text encoder that the stages were trained with; default: from the base's run."""
    text_dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type of the text encoder when the stages were trained; default: from the base's run, or float32."""
    out: Path = Path("runs/cascade")
    """Folder of the cascade."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters. 16-bit types halve the files; parameters are loaded as float32."""


def main(settings: Settings) -> None:
    """Export a cascade of Imagen from its finished stages."""
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
    fingerprint = encoder.fingerprint
    for name, model in models.items():
        if model.text_fingerprint not in (None, fingerprint):
            raise ValueError(
                f"{folders[name][0]} was trained with the text encoder {model.text_fingerprint}, {source.source} in "
                f"{source.dtype} is {fingerprint}"
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
    print(
        f"{settings.out}: a cascade that samples {sides} pixels, for --weights of experiments.sample and for "
        f'jaxdiff.from_pretrained("{settings.out}")'
    )


def text_source(settings: Settings, length: int) -> TextSource:
    """Location of the text encoder. ValueError if neither the command line nor the base's run has it."""
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

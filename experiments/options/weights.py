"""The trained models that a command uses."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options import settings_file
from experiments.tasks.task import Task
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import pretrained
from jaxdiff.weights.adapters import LoRAFile, LoRAs
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.pretrained import LoadOptions
from jaxdiff.weights.runs import latest_step
from jaxdiff.weights.t5 import load_text_encoder


@dataclass(frozen=True)
class WeightsOptions:
    """The trained models."""

    weights: tuple[str, ...] = (str(SHIPPED),)
    """Folder of a cascade or of a training run, finished or not; a Stable Diffusion, as a .safetensors file, folder or
    hub id (id@revision); the folder of a dalle-mini; runs of a DALL·E 2's prior, decoder and upsamplers; the folder of
    Karlo, or both of Kandinsky 2.2; or DeepFloyd IF pipelines, one folder or hub id per stage: a published stage I
    includes its stage II."""
    sr: tuple[str, ...] = ()
    """Super-resolution stages to append: runs, or stages of other cascades, in the order of their sizes."""
    text: str | None = None
    """Directory or hub id of the text encoder; default: the weights' own."""
    variant: str | None = None
    """Variant of a pipeline's files, such as fp16 (part of their names)."""
    clean: bool = True
    """Clean captions for DeepFloyd IF as in its training."""
    vae: str | None = None
    """File or folder of the autoencoder, instead of that of a latent diffusion model; the VQGAN of a dalle-mini."""
    prediction: Literal["", "epsilon", "v"] = ""
    """What a Stable Diffusion 2 in a single file predicts; default: as the file says, otherwise v."""
    ema: bool = False
    """Use the averaged weights of a single file that has both."""
    chunks: int = 1
    """Windows of 75 tokens for a prompt that CLIP reads; longer prompts are cut."""
    lora: tuple[str, ...] = ()
    """LoRAs of a latent diffusion model: files, folders or hub ids, with a weight as in FILE=0.8."""
    strict: bool = False
    """Refuse a LoRA with tensors that fit no network, instead of a warning."""
    control: tuple[str, ...] = ()
    """ControlNets of a latent diffusion model: files, folders or hub ids; give a --hint for each."""
    prompt_weights: bool = False
    """Read (word:1.3), ((word)) and [word] in a prompt as weights, for CLIP."""

    @property
    def places(self) -> tuple[str, ...]:
        return (*self.weights, *self.sr)

    @property
    def names(self) -> list[str]:
        """The weights for metadata; `shipped` replaces the path of the installed package."""
        return ["shipped" if place == str(SHIPPED) else place for place in self.places]

    @property
    def read(self) -> dict[str, object]:
        """The settings of latent diffusion that are given, for metadata."""
        names = ("vae", "prediction", "ema", "chunks", "prompt_weights", "lora", "control")
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def load(self, tasks: Mapping[str, Task], dtype: str | None = None, text: TextEncoder | None = None) -> Pipeline:
        """Load the pipeline; `text` replaces its text encoder. ValueError or FileNotFoundError naming a folder."""
        if (own := self.own(tasks)) is not None:
            return own
        for place in self.places:
            if (line := unfinished(Path(place))) is not None:
                print(line, file=sys.stderr)
        # Large weights take minutes to read; small ones load before the bar appears. Only on a terminal.
        with tqdm(desc="load", unit="B", unit_scale=True, delay=2, disable=None) as bar:

            def place(array: np.ndarray) -> jax.Array:
                bar.update(array.nbytes)
                return jnp.asarray(array)

            if text is None and self.text is not None:
                text = self.load_text(dtype)
            return pretrained.load(self.places, dataclasses.replace(self.options(dtype), place=place), text)

    def options(self, dtype: str | None = None) -> LoadOptions:
        """How the weights are read. ValueError for a bad option."""
        if self.chunks < 1:
            raise ValueError(f"--chunks {self.chunks}: a prompt has at least one window")
        prediction = {"": None, "epsilon": Prediction.EPSILON, "v": Prediction.V}[self.prediction]
        read = {"chunks": self.chunks, "weights": self.prompt_weights, "vae": self.vae, "prediction": prediction}
        read |= {"loras": LoRAs(tuple(map(_lora, self.lora)), self.strict), "controls": self.control}
        return LoadOptions(dtype, self.variant, clean=self.clean, ema=self.ema, **read)

    def own(self, tasks: Mapping[str, Task]) -> Pipeline | None:
        """The pipeline of a run whose task builds its own; None if the library loads it."""
        task = _task(self.places[0], tasks)
        return None if task is None else task.pipeline(self.places)

    def load_text(self, dtype: str | None = None) -> TextEncoder:
        """Load only the text encoder."""
        if self.text is None:
            return pretrained.load_text(self.weights, self.options(dtype))
        return load_text_encoder(self.text, pretrained.text_length(self.weights))


def _lora(text: str) -> LoRAFile:
    """Parse FILE or FILE=WEIGHT."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return LoRAFile(text)
    try:
        return LoRAFile(path, float(weight))
    except ValueError as error:
        raise ValueError(f"--lora {text}: the weight after = is a number") from error


def unfinished(run: Path) -> str | None:
    """A line for a run that has not reached its last step; None for others."""
    step, kept = latest_step(run), run / settings_file.NAME
    if step is None or not kept.is_file():
        return None
    steps = settings_file.read(kept)[1].get("steps")
    return f"{run}: step {step} of {steps}" if isinstance(steps, int) and step < steps else None


def _task(place: str, tasks: Mapping[str, Task]) -> Task | None:
    """The task of a run's folder; None for other folders."""
    path = Path(place) / settings_file.NAME
    return tasks.get(settings_file.read(path)[0]) if path.is_file() else None

"""Which trained models a command uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options import settings_file
from experiments.tasks.task import Task
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import imagen
from jaxdiff.weights.imagen import SHIPPED, load_text
from jaxdiff.weights.t5 import load_text_encoder


@dataclass(frozen=True)
class WeightsOptions:
    """What samples."""

    weights: tuple[str, ...] = (str(SHIPPED),)
    """Folder of a cascade or of a training run, finished or not; or DeepFloyd IF's pipelines, a folder or hub id
    (id@revision) for each stage: a published stage I brings its stage II."""
    sr: tuple[str, ...] = ()
    """Super-resolution behind them: runs, or stages of other cascades, in the order of their sizes."""
    text: str | None = None
    """A directory or hub id of the text encoder, in place of the weights' own."""
    variant: str | None = None
    """Which files of a pipeline to read: fp16, for those with this in their name."""
    clean: bool = True
    """Clean captions for DeepFloyd IF as those that it was trained with."""

    @property
    def places(self) -> tuple[str, ...]:
        return (*self.weights, *self.sr)

    @property
    def names(self) -> list[str]:
        """Of the weights, for files: without the place where this package is installed."""
        return ["shipped" if place == str(SHIPPED) else place for place in self.places]

    def load(self, tasks: Mapping[str, Task], dtype: str | None = None, text: TextEncoder | None = None) -> Pipeline:
        """The pipeline, with `text` in place of its text encoder. ValueError or FileNotFoundError naming a folder."""
        if (own := self.own(tasks)) is not None:
            return own
        # Large weights take minutes to read; small ones are there before the bar is. Only for people who watch.
        with tqdm(desc="load", unit="B", unit_scale=True, delay=2, disable=None) as bar:

            def place(array: np.ndarray) -> jax.Array:
                bar.update(array.nbytes)
                return jnp.asarray(array)

            options = {"dtype": dtype, "variant": self.variant, "clean": self.clean, "place": place}
            if text is None and self.text is not None:
                text = self.load_text(dtype)
            return imagen.with_dtype(imagen.load(self.places, text=text, **options), dtype)

    def own(self, tasks: Mapping[str, Task]) -> Pipeline | None:
        """The pipeline of a run whose task makes its own; None for what the library loads."""
        task = _task(self.places[0], tasks)
        return None if task is None else task.pipeline(self.places)

    def load_text(self, dtype: str | None = None) -> TextEncoder:
        """The text encoder alone."""
        if self.text is None:
            return load_text(self.weights, dtype=dtype, variant=self.variant, clean=self.clean)
        return load_text_encoder(self.text, imagen.text_length(self.weights))


def _task(place: str, tasks: Mapping[str, Task]) -> Task | None:
    """The task of which a folder is a run; None for anything else."""
    path = Path(place) / settings_file.NAME
    return tasks.get(settings_file.read(path)[0]) if path.is_file() else None

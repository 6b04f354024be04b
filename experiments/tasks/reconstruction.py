"""Tasks that train on images alone, and reconstruct them: the autoencoders of latent diffusion and of DALL·E 1."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import TrainSettings
from experiments.tasks.held_out import held_out_source
from experiments.tasks.streams import stream
from experiments.tasks.task import Start, Task, Work
from jaxdiff.data import grids, sources
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import Batches, DataConfig, image_batches
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.dvae import DVAEModel, TrainedDVAE
from jaxdiff.training.distributed import once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.state import Params

SHOWN = 8
"""Images of a sample grid."""
AnyModel = AutoencoderModel | DVAEModel
AnyTrained = TrainedAutoencoder | TrainedDVAE


@dataclass(frozen=True)
class ReconstructionTask(Task):
    """A model of images that reconstructs them."""

    takes_init: ClassVar[bool] = True

    @abstractmethod
    def trained_model(self, settings: Any) -> Any:
        """The preset with the changes of the command line."""

    @abstractmethod
    def initial(self, settings: Any, model: Any) -> tuple[Params, Any]:
        """The parameters and `extra` of the run that `--init` names, on the host."""

    @abstractmethod
    def saved(self, settings: Any, model: Any, source: Source, trained: Any) -> str:
        """Write OUT/model; returns a line about it."""

    def resized(self, model: Any, side: int) -> Any:
        return dataclasses.replace(model, side=side)

    def prepare(self, settings: TrainSettings, start: Start) -> Work:
        model, data = self.trained_model(settings), settings.dataset
        plain = dataclasses.replace(model, network=dataclasses.replace(model.network, dtype="float32"))
        source = once(data.data_dir, lambda: sources.open(data.spec(), model.side, "train", data.data_dir))
        source = spread(source, data.limit) if data.limit else source
        stream = _batches(settings, model, source)
        held_out = held_out_source(settings, model.side)
        some = None if held_out is None else spread(held_out, min(data.evaluate_n, len(held_out)))
        shown = Reconstructions(model, source if some is None else some, settings.out / "samples")

        def finish(params: Params, extra: Any) -> str:
            return self.saved(settings, model, source, plain.trained(params, extra))

        contents = {"data": data.shown, "batch": settings.run.batch, "side": model.side, "examples": len(source)}
        begins_anew = settings.run.init is None or settings.resumes
        initial, extra = (None, None) if begins_anew else self.initial(settings, model)
        return Work(
            model,
            stream,
            contents,
            finish,
            initial=initial,
            initial_extra=extra,
            sample_hook=shown,
            held_out=_held_out(settings, model, some),
        )


def _batches(settings: TrainSettings, model: AnyModel, source: Source, **order: bool) -> Batches:
    return stream(settings, source, model.side, **order)


def _held_out(settings: TrainSettings, model: AnyModel, source: Source | None) -> HeldOutBatches | None:
    if source is None:
        return None
    return lambda: _batches(settings, model, source, shuffle=False, repeat=False)


class Reconstructions:
    """A sample hook of the training loop: writes fixed images above their reconstructions."""

    def __init__(self, model: AnyModel, source: Source, folder: Path) -> None:
        config = DataConfig(model.side, SHOWN, shuffle=False, repeat=False)
        self._images = next(image_batches(spread(source, min(SHOWN, len(source))), config))["image"]
        self._model, self._folder = model, folder

    def __call__(self, step: int, params: dict, extra: Any) -> None:
        trained: AnyTrained = self._model.trained(params, extra)
        codes: Any = trained.encode(jnp.asarray(self._images))
        again = np.asarray(jnp.clip(trained.decoded(codes), -1.0, 1.0))
        captions = ["image"] * len(again) + ["reconstruction"] * len(again)
        sheet = grids.grid([*self._images, *again], captions, max(128, self._model.side), len(again))
        grids.write(self._folder / f"{step:07d}.png", sheet)
        tqdm.write(f"samples: {self._folder / f'{step:07d}.png'}")

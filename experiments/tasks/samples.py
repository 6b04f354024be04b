"""Sample grids of a training run: fixed captions, or fixed low-resolution images."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff.data import grids
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source, captions
from jaxdiff.data.mixture import Spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.diffusion import noise
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.distributed import gathered


class Samples:
    """A sample hook of the training loop: writes a grid of fixed captions or low-resolution images."""

    COUNT = 8

    def __init__(
        self,
        model: TrainedModel,
        source: Source,
        embeddings: Embeddings | None,
        folder: Path,
        decode: Callable[[jax.Array], jax.Array] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """decode: the images of the model's samples, if they are latents. given: other conditions of the examples
        `Spread(source, COUNT)`, as in `SampleRequest`."""
        self._given = given or {}
        self._model, self._folder, self._decode, stage = model, folder, decode, model.model
        self._captions, self._text, self._low_res = [], None, None
        shown, indices = Spread(source, self.COUNT), range(self.COUNT)
        if stage.low_res is not None:
            config = DataConfig(
                stage.side,
                self.COUNT,
                low_resolution=stage.side // stage.factor,
                crop=min(stage.side, 256),
                captions=True,
                caption_optional=True,
                shuffle=False,
            )
            batch = next(image_batches(shown, config))
            self._low_res, indices = jnp.asarray(batch["low_res"]), batch["index"]
        if embeddings is not None:
            texts = list(captions(shown))
            self._captions = [texts[i] or "" for i in indices]
            text, mask, _ = zip(*(embeddings[shown.place(int(i))] for i in indices))
            self._text = TextEmbedding(np.stack(text).astype(np.float32), np.stack(mask))

    def __call__(self, step: int, params: dict, extra: Any = ()) -> None:
        stage = self._model.model
        keys = noise.sample_keys(jax.random.key(0), jnp.arange(self.COUNT))
        side = stage.side if self._low_res is None else self._low_res.shape[1] * stage.factor
        # A progress callback splits sampling into several programs, so that a signal is handled sooner.
        request = SampleRequest(keys, (side, side), self._text, progress=lambda done: None, given=self._given)
        samples = dataclasses.replace(self._model, params=params).decode(self._low_res, request)
        images = gathered(samples if self._decode is None else self._decode(samples))
        if images is None:
            return
        shown, captions = list(images), self._captions or [f"step {step}"] * self.COUNT
        if self._low_res is not None:
            shown, captions = [*np.asarray(self._low_res), *images], ["input"] * self.COUNT + list(captions)
        sheet = grids.grid(shown, captions, 256 if self._low_res is not None else 128, self.COUNT // 2)
        grids.write(self._folder / f"{step:07d}.png", sheet)
        tqdm.write(f"samples: {self._folder / f'{step:07d}.png'}")

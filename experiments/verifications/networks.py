"""A diffusion network of jaxdiff, called at several noise levels."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verifications.inputs import Inputs, entries
from jaxdiff.models.conditioner import SampleInputs, joined
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.text.encoder import TextEmbedding, TextEncoder


class Texts(NamedTuple):
    """The embeddings of the prompts, and of the negative prompt once for each of them."""

    prompts: TextEmbedding
    negative: TextEmbedding

    def of(self, trained: TrainedModel, inputs: Inputs) -> tuple[TextEmbedding, TextEmbedding | None]:
        """What a model reads; None: its own null text, as in `Pipeline.sample`."""
        return self.prompts, self.negative if inputs.negative.strip() or trained.reads_padding else None


def embedded(encoder: TextEncoder, inputs: Inputs) -> Texts:
    count = len(inputs.prompts)
    every = encoder.encode([*inputs.prompts, *[inputs.negative] * count])
    return Texts(jax.tree.map(lambda a: a[:count], every), jax.tree.map(lambda a: a[count:], every))


def conditioning(model: DiffusionModel, given: SampleInputs, keys: jax.Array, size: tuple[int, int]) -> Conditioning:
    """Of both branches of guidance, the conditional one first."""
    branches = [conditioner.sampling(given, keys, size) for conditioner in model.conditioners]
    both = (joined([branch.conditional for branch in branches]), joined([branch.unconditional for branch in branches]))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *both)


def outputs(trained: TrainedModel, x: jax.Array, given: Conditioning) -> list[np.ndarray]:
    """The network's output in both branches, at each of `entries` of its schedule. x: of one branch."""
    model, twice = trained.model, jnp.concatenate([x, x])
    times = [model.schedule.time(float(entry)) for entry in entries(model.schedule)]  # type: ignore[union-attr]
    return [np.asarray(_predict(model, trained.params, twice, jnp.full(len(twice), t), given)) for t in times]


@partial(jax.jit, static_argnums=0)
def _predict(model: DiffusionModel, params: Any, x: jax.Array, t: jax.Array, given: Conditioning) -> jax.Array:
    return model.predict(params, x, t, given)

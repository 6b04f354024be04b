"""Training a classifier of attributes, whose features stand in for Inception's on sets that it does not know."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.classifier import Classifier, ClassifierConfig


@dataclass(frozen=True)
class ClassifierTraining(SingleOptimizer):
    """The stage: each attribute's cross-entropy, the same weight for all.

    noise: the standard deviation of the noise on the images, up to which (at random) they are spoilt: features that
    hang on single grey levels would judge those.
    """

    config: ClassifierConfig
    noise: float = 0.1

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        side = self.config.side
        return Classifier(self.config).init(key, jnp.zeros((1, side, side, 3)))["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """`batch`: image (b s s 3) in [-1, 1] and labels (b a), a class of each attribute or -1 for none, which costs
        nothing. Metrics: the accuracy of each attribute among the labelled."""
        image, labels = batch["image"], batch["labels"]
        level, noise = jax.random.split(key)
        image += self.noise * jax.random.uniform(level, (len(image), 1, 1, 1)) * jax.random.normal(noise, image.shape)
        _, logits = Classifier(self.config).apply({"params": params}, image)
        losses, metrics = [], {}
        for number, name in enumerate(self.config.names):
            wanted = labels[:, number]
            known = (wanted >= 0).astype(jnp.float32)
            count = jnp.maximum(known.sum(), 1.0)
            each = optax.softmax_cross_entropy_with_integer_labels(logits[name], jnp.maximum(wanted, 0))
            losses.append((each * known).sum() / count)
            metrics[name] = ((logits[name].argmax(-1) == wanted) * known).sum() / count
        return sum(losses) / len(losses), (metrics, extra)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch; `side` is that of `config`."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
            "labels": jax.ShapeDtypeStruct((batch_size, len(self.config.names)), jnp.int32),
        }


def of_size_one(config: ClassifierConfig, params: dict, image: Float[Array, "b s s 3"]) -> dict:
    """The same classifier with features whose mean square over these images is 1: distances of features depend on
    their size, which training leaves to chance. What it says of images stays as it is, because features pass a ReLU
    alone on their way to the logits."""
    features, _ = Classifier(config).apply({"params": params}, image)
    size = jnp.sqrt((features**2).mean())
    heads = {name: {**params[name], "kernel": params[name]["kernel"] * size} for name in params if "head_" in name}
    return {**params, **heads, "features": jax.tree.map(lambda leaf: leaf / size, params["features"])}

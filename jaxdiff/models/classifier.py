"""Training of an attribute classifier, whose features replace Inception's on datasets outside its domain."""

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
    """Cross-entropy of each attribute, equally weighted.

    noise: maximum standard deviation of the noise added to the images (uniform from 0), so that the features do not
    depend on single grey levels.
    """

    config: ClassifierConfig
    noise: float = 0.1

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        side = self.config.side
        return Classifier(self.config).init(key, jnp.zeros((1, side, side, 3)))["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict[str, Array], tuple]]:
        """batch: image (b s s 3) in [-1, 1] and labels (b a), the class of each attribute, or -1 (unlabelled,
        ignored). Metrics: the accuracy of each attribute on the labelled images."""
        image, labels = batch["image"], batch["labels"]
        level, noise = jax.random.split(key)
        image += self.noise * jax.random.uniform(level, (len(image), 1, 1, 1)) * jax.random.normal(noise, image.shape)
        _, logits = Classifier(self.config).apply({"params": params}, image)
        losses, metrics = [], {}
        for number, name in enumerate(self.config.names):
            target = labels[:, number]
            known = (target >= 0).astype(jnp.float32)
            count = jnp.maximum(known.sum(), 1.0)
            each = optax.softmax_cross_entropy_with_integer_labels(logits[name], jnp.maximum(target, 0))
            losses.append((each * known).sum() / count)
            metrics[name] = ((logits[name].argmax(-1) == target) * known).sum() / count
        return sum(losses) / len(losses), (metrics, extra)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch; `side` is that of `config`."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
            "labels": jax.ShapeDtypeStruct((batch_size, len(self.config.names)), jnp.int32),
        }


def of_size_one(config: ClassifierConfig, params: dict, image: Float[Array, "b s s 3"]) -> dict:
    """Rescale the features to a mean square of 1 over these images: feature distances depend on the scale, which
    training does not determine. The logits are unchanged, as only a ReLU lies between the features and the heads."""
    features, _ = Classifier(config).apply({"params": params}, image)
    size = jnp.sqrt((features**2).mean())
    heads = {name: {**params[name], "kernel": params[name]["kernel"] * size} for name in params if "head_" in name}
    return {**params, **heads, "features": jax.tree.map(lambda leaf: leaf / size, params["features"])}

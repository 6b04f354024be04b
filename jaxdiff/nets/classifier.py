"""A small convolutional multi-attribute classifier. Its features serve metrics on datasets outside the domain of large
pre-trained networks."""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float


@dataclass(frozen=True)
class ClassifierConfig:
    """side: side of the input images. channels: widths of the convolutions, each of which halves the sides.
    features: width of the features. names: the attributes. classes: number of classes of each attribute."""

    side: int = 64
    channels: tuple[int, ...] = (16, 32, 64, 128)
    features: int = 64
    names: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.side % 2 ** len(self.channels):
            raise ValueError(f"side {self.side} cannot be halved {len(self.channels)} times")
        if len(self.names) != len(self.classes) or not self.names:
            raise ValueError(f"{len(self.names)} attributes with {len(self.classes)} numbers of classes")


class Classifier(nn.Module):
    """Maps images (b s s 3) in [-1, 1] to non-negative features (b f) and the logits (b c) of each attribute."""

    config: ClassifierConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b s s 3"]) -> tuple[Float[Array, "b f"], dict[str, Float[Array, "b c"]]]:
        x = image
        for i, width in enumerate(self.config.channels):
            x = nn.Conv(width, (5, 5) if i == 0 else (3, 3), strides=2, name=f"conv_{i}")(x)
            x = nn.silu(nn.GroupNorm(num_groups=4, name=f"norm_{i}")(x))
        x = nn.relu(nn.Dense(self.config.features, name="features")(x.reshape(len(x), -1)))
        heads = zip(self.config.names, self.config.classes, strict=True)
        return x, {name: nn.Dense(count, name=f"head_{name}")(x) for name, count in heads}

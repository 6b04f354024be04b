"""The boxes of unCLIP (arXiv 2204.06125): priors of embeddings, and a decoder of them.

`RankedPrior` is the paper's, `StandardizedPrior` that of public weights.
"""

from dataclasses import dataclass, field, fields, replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import SampleRequest, TrainedModel


@dataclass(frozen=True, eq=False)
class RankedPrior(TrainedModel):
    """A diffusion prior that samples `candidates` image embeddings for each caption and keeps the one with the largest
    dot product with the caption's embedding (2.2: two). Without a caption it keeps the first.

    The kept embedding is scaled to the length of the training data's. ValueError unless the model is one of
    embeddings.
    """

    candidates: int = 2

    def __post_init__(self):
        if not isinstance(self.model.product, EmbeddingSpec):
            raise ValueError(f"a prior produces embeddings, this model {self.model.product}")
        if self.candidates < 1:
            raise ValueError(f"candidates {self.candidates}: at least 1")

    @property
    def steps(self) -> int:
        return self.candidates * self.sampling.steps

    @property
    def takes_init(self) -> bool:
        return False

    def check(self, size: tuple[int, int]) -> None:
        """ValueError for another size than that of an embedding."""
        if tuple(size) != (1, 1):
            raise ValueError(
                f"the prior samples embeddings, which are no grid of {size[0]}×{size[1]}: this system samples one size"
            )
        super().check(size)

    def generate(self, request: SampleRequest) -> Float[Array, "b 1 1 e"]:
        samples = jnp.stack([self._sample(request, number) for number in range(self.candidates)], axis=1)
        spec = self.model.product
        assert isinstance(spec, EmbeddingSpec)  # see __post_init__
        if request.text is None or request.text.pooled is None:
            return spec.normalized(samples[:, 0])
        scores = jnp.einsum("bnhwe,be->bn", samples, request.text.pooled)
        best = scores.argmax(1)[:, None, None, None, None]
        return spec.normalized(jnp.take_along_axis(samples, best, axis=1)[:, 0])

    def _sample(self, request: SampleRequest, number: int) -> Float[Array, "b 1 1 e"]:
        """Candidate `number`, each sample with its own key."""
        progress, before = request.progress, number * self.sampling.steps
        report = None if progress is None else (lambda done: progress(before + done))
        keys = noise.fold(request.keys, number)
        return super().generate(replace(request, keys=keys, progress=report))


@dataclass(frozen=True, eq=False)
class StandardizedPrior(TrainedModel):
    """A prior that was trained on embeddings with mean 0 and deviation 1 in each number, as Karlo's and Kandinsky's.

    mean, deviation: those of CLIP's embeddings. ValueError for other widths than the model's.
    """

    mean: Float[Array, " e"] = field(kw_only=True)
    deviation: Float[Array, " e"] = field(kw_only=True)

    def __post_init__(self):
        width = self.model.product.channels
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if values.shape != (width,):
                raise ValueError(f"the {name} of {values.shape[-1]} numbers is not one of embeddings of width {width}")

    def generate(self, request: SampleRequest) -> Float[Array, "b 1 1 e"]:
        """Embeddings as CLIP gives them, not normalized. ValueError as from `TrainedModel.decode`."""
        return self.restored(super().generate(request))

    def restored(self, embeddings: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """CLIP's embeddings of standardized ones."""
        return self.mean.astype(jnp.float32) + self.deviation.astype(jnp.float32) * embeddings

    def standardized(self, embeddings: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """The inverse of `restored`: what the prior is trained on."""
        return (embeddings - self.mean.astype(jnp.float32)) / self.deviation.astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class EmbeddingDecoder(TrainedModel):
    """A diffusion model of images, conditioned on an image embedding, as a decoder of embeddings (2.1).

    image_encoder: CLIP's image tower, for `encode`; None if it is not loaded. ValueError for a model that is not
    conditioned on one embedding, and for an image tower of another width.
    """

    image_encoder: CLIPImageEncoder | None = None

    def __post_init__(self):
        conditioner = embedding_of(self.model)
        if conditioner is None or conditioner.length != 1:
            raise ValueError("a decoder of embeddings is conditioned on one embedding")
        encoder = self.image_encoder
        if encoder is not None and encoder.width != conditioner.width:
            raise ValueError(
                f"the decoder reads embeddings of width {conditioner.width}, this CLIP gives {encoder.width}"
            )

    @property
    def consumes(self) -> EmbeddingSpec:
        conditioner = embedding_of(self.model)
        assert conditioner is not None  # see __post_init__
        return conditioner.product

    @property
    def factor(self) -> int:
        return self.side

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(name for name in super().conditions if name != EmbeddingConditioner.entry)

    def decode(self, product: Float[Array, "b 1 1 e"] | None, request: SampleRequest) -> Float[Array, "b h w c"]:
        """Images of these embeddings. ValueError without them."""
        if product is None:
            raise ValueError("a decoder of embeddings needs them")
        conditioner = embedding_of(self.model)
        assert conditioner is not None  # see __post_init__
        given = {**request.given, conditioner.entry: product.reshape(len(product), *conditioner.shape)}
        return super().decode(None, replace(request, given=given))

    @classmethod
    def of(cls, trained: TrainedModel, image_encoder: CLIPImageEncoder | None = None) -> "EmbeddingDecoder":
        """The box of a trained model."""
        parts = {each.name: getattr(trained, each.name) for each in fields(TrainedModel)}
        return cls(**parts, image_encoder=image_encoder)

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b 1 1 e"]:
        """The embeddings of images in [-1, 1], of any size. ValueError without the image tower."""
        if self.image_encoder is None:
            raise ValueError("this decoder was loaded without CLIP's image tower (Karlo: image_encoder/ in its folder)")
        return self.consumes.normalized(self.image_encoder.encode(image))[:, None, None]


def embedding_of(model: DiffusionModel) -> EmbeddingConditioner | None:
    """The conditioner of a model that reads an image embedding; None if it has none."""
    return next((each for each in model.conditioners if isinstance(each, EmbeddingConditioner)), None)

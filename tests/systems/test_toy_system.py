"""A system that the library does not know, from boxes of a few lines: constant latents, and a decoder that doubles."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import EmbeddingSpec, ImageSpec, LatentSpec, TokenSpec
from jaxdiff.models.boxes import Decoder, Generator
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import INPUT, After, Pipeline, SampleOptions


@dataclass(frozen=True, eq=False)
class Constant(Generator):
    """Latents of one value, or of the mean of what they begin with."""

    produces: object = LatentSpec(channels=2, stride=2)
    side: int = 4
    takes_init: bool = True

    def generate(self, request):
        shape = (len(request.keys), *request.size, 2)
        if request.init is not None:
            return jnp.broadcast_to(request.init.value.mean((1, 2), keepdims=True), shape)
        return jnp.full(shape, 0.25)


@dataclass(frozen=True, eq=False)
class Doubled(Decoder):
    """Twice the value and twice the size; three channels of the first."""

    consumes: object = LatentSpec(channels=2, stride=2)
    produces: object = ImageSpec()
    side: int = 8
    factor: int = 2

    def decode(self, product, request):
        assert request.size == tuple(2 * side for side in product.shape[1:3])
        return 2 * jnp.repeat(product.repeat(2, 1).repeat(2, 2)[..., :1], 3, -1)

    def encode(self, image):
        return jnp.repeat(image[:, ::2, ::2, :1], 2, -1) / 2


TOY = Pipeline(None, Constant(), (Doubled(),))


def test_it_samples():
    latents, images = TOY.sample(["a", "b", "c"], SampleOptions(batch=2, size=(4, 6)))
    assert latents.shape == (3, 4, 6, 2) and images.shape == (3, 8, 12, 3)
    np.testing.assert_array_equal(images, 0.5)
    assert TOY.sides == (4, 8)


def test_it_goes_on_from_latents_and_begins_with_an_image():
    (images,) = TOY.sample(["a"], SampleOptions(after=After(0, np.full((1, 4, 4, 2), 0.5, np.float32))))
    np.testing.assert_array_equal(images, 1.0)
    init = InitImage(np.full((16, 16, 3), 0.5, np.float32), strengths=(1.0,))
    latents, images = TOY.sample(["a"], SampleOptions(init=init))
    np.testing.assert_allclose(latents, 0.25, atol=1e-6)  # as the decoder encodes the image
    np.testing.assert_allclose(images, 0.5, atol=1e-6)


def test_a_decoder_alone_starts_from_its_product():
    """As an upscaler does, whose text is not all that it reads."""
    alone = Pipeline(None, Doubled())
    given = np.full((2, 3, 5, 2), 0.5, np.float32)
    (images,) = alone.sample(["a", "b"], SampleOptions(after=After(INPUT, given)))
    assert images.shape == (2, 6, 10, 3)
    np.testing.assert_array_equal(images, 1.0)
    with pytest.raises(ValueError, match="starts from latents of 2 channels: pass a batch of them, `after=After"):
        alone.sample(["a"])
    with pytest.raises(ValueError, match="2×3×5×1, which is not a batch of latents of 2 channels"):
        alone.sample(["a", "b"], SampleOptions(after=After(INPUT, given[..., :1])))
    with pytest.raises(ValueError, match="no box -1"):
        TOY.sample(["a"], SampleOptions(after=After(INPUT, given[:1])))


class Mute(Decoder):
    """A decoder that cannot encode."""

    consumes, produces, side, factor = LatentSpec(channels=2, stride=2), ImageSpec(), 8, 2

    def decode(self, product, request):
        return product


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the 8 stage decodes latents of 2 channels, the one before it"):
        Pipeline(None, Constant(LatentSpec(channels=4)), (Doubled(),))
    with pytest.raises(ValueError, match="the 8 stage enlarges 4 pixels, but the stage before it produces 8"):
        Pipeline(None, Constant(side=8), (Doubled(),))
    with pytest.raises(ValueError, match="1×4×4×3, which is not a batch of latents of 2 channels"):
        TOY.sample(["a"], SampleOptions(after=After(0, np.zeros((1, 4, 4, 3), np.float32))))
    init = InitImage(np.zeros((8, 8, 3), np.float32), (1.0,))
    with pytest.raises(ValueError, match="produces latents of 2 channels, and no decoder encodes an image to them"):
        Pipeline(None, Constant(), (Mute(),)).sample(["a"], SampleOptions(init=init))


@pytest.mark.parametrize("spec", [TokenSpec(16), EmbeddingSpec(8), ImageSpec(1), LatentSpec(4)], ids=str)
def test_products_of_every_kind_are_told_apart(spec):
    for other in (TokenSpec(16), EmbeddingSpec(8), ImageSpec(1), LatentSpec(4)):
        boxes = Constant(spec), (Doubled(other),)
        if other == spec:
            assert Pipeline(None, *boxes).sides == (4, 8)
        else:
            with pytest.raises(ValueError, match="the one before it produces"):
                Pipeline(None, *boxes)

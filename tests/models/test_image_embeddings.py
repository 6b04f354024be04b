"""CLIP's image tower as an encoder, and spherical moves between embeddings."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import small_clip

from jaxdiff.models.clip import normalised
from jaxdiff.models.image_embeddings import CLIPImageEncoder, slerp, text_diff
from jaxdiff.nets.clip import CLIP

A, B = jnp.asarray([3.0, 0.0, 0.0]), jnp.asarray([0.0, 5.0, 0.0])
RNG = np.random.default_rng(0)


def angle(a, b):
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return np.arccos((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_slerp_on_a_circle(fraction):
    """Between two axes the point at a fraction of the right angle is known; the length is the first one's."""
    angle = fraction * np.pi / 2
    np.testing.assert_allclose(slerp(A, B, fraction), 3 * np.asarray([np.cos(angle), np.sin(angle), 0.0]), atol=1e-6)


def test_slerp_in_many_dimensions():
    """The angles to both ends are fractions of the angle between them, whatever the lengths; batches are rows."""
    a, b = (jnp.asarray(RNG.normal(size=(7, 64)), jnp.float32) for _ in range(2))
    fraction = jnp.asarray(RNG.uniform(0.1, 0.9, size=7), jnp.float32)
    found = slerp(a, b, fraction)
    np.testing.assert_allclose(angle(a, found), fraction * angle(a, b), atol=1e-5)
    np.testing.assert_allclose(angle(found, b), (1 - fraction) * angle(a, b), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), jnp.linalg.norm(a, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(slerp(a[2], b[2], fraction[2]), found[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slerp(a, 4.0 * b, fraction), found, rtol=1e-4, atol=1e-5)


def test_slerp_of_equal_and_opposite_directions():
    for other in (A, 2 * A, -A):
        np.testing.assert_allclose(slerp(A, other, 0.3), A, atol=1e-6)


def test_text_diff():
    """The image at fraction 0; at 1 the direction of the difference of the directions, at the image's length."""
    image, before, after = (jnp.asarray(RNG.normal(size=16), jnp.float32) for _ in range(3))
    np.testing.assert_allclose(text_diff(image, before, after, 0.0), image, rtol=1e-5)
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    wanted = np.linalg.norm(image) * unit(unit(after) - unit(before))
    np.testing.assert_allclose(text_diff(image, before, after, 1.0), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        text_diff(image, 9 * before, after, 0.4), text_diff(image, before, 2 * after, 0.4), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="same embedding"):
        text_diff(image, before, 2 * before, 0.4)


def test_the_image_tower():
    """Its embeddings are the network's; images of other sizes are resized first, constant ones without a change."""
    config = replace(small_clip.OPENAI, text=None)
    params = {"image": small_clip.init(small_clip.OPENAI)["image"]}
    encoder = CLIPImageEncoder(config, params)
    image = jnp.asarray(RNG.uniform(-1, 1, (2, 28, 28, 3)), jnp.float32)
    found = encoder.encode(image)
    assert found.shape == (2, encoder.width) and encoder.resolution == 28
    wanted = CLIP(config).apply({"params": params}, normalised(image), method="embed_image").embedding
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    flat = jnp.full((1, 50, 40, 3), 0.25)
    np.testing.assert_allclose(encoder.encode(flat), encoder.encode(flat[:, :28, :28]), rtol=1e-3, atol=1e-3)
    other = {"image": small_clip.init(small_clip.OPEN)["image"] | {"first": params["image"]["first"] + 1}}
    assert encoder.fingerprint != CLIPImageEncoder(config, other).fingerprint
    with pytest.raises(ValueError, match="no image tower"):
        CLIPImageEncoder(replace(small_clip.OPENAI, image=None), {})

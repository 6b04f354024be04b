"""Degradations of low-resolution images: closed forms, Pillow's JPEG, one key per image."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.degradation import BSRDegradation, GaussianBlur, blur, gaussian_kernel, jpeg, rescaled

RNG = np.random.default_rng(0)
KEYS = noise.sample_keys(jax.random.key(0), jnp.arange(4))


def smooth(height, width):
    """An image with edges and slopes, in [-1, 1]."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([np.sin(x / 5), np.cos(y / 7), np.where(x > width / 2, 0.8, -0.6)], -1)
    return jnp.asarray(image + 0.05 * RNG.normal(size=image.shape), jnp.float32).clip(-1, 1)


def test_the_papers_blur():
    """Weights of a Gaussian at distances 0, 1 and √2 around a point; flat areas and borders stay."""
    point = jnp.zeros((1, 5, 5, 3)).at[0, 2, 2].set(1.0)
    found = GaussianBlur().apply(point, KEYS[:1])[0, ..., 1]
    weights = np.exp(-np.asarray([0.0, 1.0, 2.0]) / (2 * 0.36))
    wanted = weights / (weights @ np.asarray([1.0, 4.0, 4.0]))
    np.testing.assert_allclose([found[2, 2], found[2, 3], found[1, 1]], wanted, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5) and not found[0].any()
    flat = jnp.full((2, 6, 7, 3), -0.3)
    np.testing.assert_allclose(GaussianBlur(2.0, 5).apply(flat, KEYS[:2]), flat, atol=1e-6)


def test_a_turned_kernel():
    """Wide along its direction: its second moments are those of the turned ellipse."""
    angle = 0.6
    kernel = np.asarray(gaussian_kernel(41, jnp.float32(4.0), jnp.float32(1.5), jnp.float32(angle)))
    offset = np.arange(41) - 20
    y, x = np.meshgrid(offset, offset, indexing="ij")
    moments = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    turn = np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(moments, turn @ np.diag([16.0, 2.25]) @ turn.T, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(blur(smooth(9, 8), jnp.ones((1, 1))), smooth(9, 8), atol=0.5)


@pytest.mark.parametrize("quality", [20, 50, 75, 95])
def test_jpeg_against_pillow(quality):
    """Most pixels are equal but for the rounding to 8 bits; coefficients at a tie are rounded either way."""
    image = smooth(43, 61)
    pixels = np.asarray(jnp.round(127.5 * (image + 1)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    wanted = np.asarray(Image.open(file), np.float32)
    found = 127.5 * (np.asarray(jpeg(jnp.asarray(pixels / 127.5 - 1, jnp.float32), float(quality))) + 1)
    assert np.abs(found - wanted).mean() < 0.3 * np.abs(wanted - pixels).mean()
    assert np.median(np.abs(found - wanted)) < 0.5


def test_rescaled():
    image = smooth(32, 24)
    assert rescaled(image, 1.0) is image
    assert np.abs(rescaled(image, 0.5) - image).mean() > 1e-2
    flat = jnp.full((10, 6, 3), 0.4)
    np.testing.assert_allclose(rescaled(flat, 0.5), flat, atol=1e-6)


def test_each_image_has_its_own_degradation():
    image = jnp.broadcast_to(smooth(20, 16), (4, 20, 16, 3))
    degrade = BSRDegradation()
    found = np.asarray(degrade.apply(image, KEYS))
    assert found.shape == image.shape and np.abs(found).max() <= 1.0
    assert all(np.abs(found[i] - found[j]).max() > 0.01 for i in range(4) for j in range(i))
    np.testing.assert_allclose(degrade.apply(image[:1], KEYS[2:3])[0], found[2], atol=1e-5)


@pytest.mark.parametrize(
    "only",
    [{"sigmas": (1.5, 1.5)}, {"scales": (0.5,)}, {"noise": 0.3}, {"jpeg": 1.0}],
    ids=lambda each: next(iter(each)),
)
def test_every_part_counts(only):
    """With the others off, each part changes the image; with all off nothing does."""
    none = {"sigmas": (0.01, 0.01), "scales": (1.0,), "noise": 0.0, "qualities": (30.0, 40.0), "jpeg": 0.0}
    image = smooth(16, 16)[None]
    np.testing.assert_allclose(BSRDegradation(**none).apply(image, KEYS[:1]), image, atol=1e-6)
    assert np.abs(BSRDegradation(**none | only).apply(image, KEYS[:1]) - image).mean() > 1e-3


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (GaussianBlur, {"kernel": 4}, "an odd kernel"),
        (GaussianBlur, {"sigma": 0.0}, "sigma above 0"),
        (BSRDegradation, {"sigmas": (2.0, 1.0)}, "sigmas above 0"),
        (BSRDegradation, {"scales": ()}, "at least one"),
        (BSRDegradation, {"noise": -0.1}, "at least 0"),
        (BSRDegradation, {"qualities": (0.0, 50.0)}, "within 1 to 100"),
    ],
)
def test_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)
    with pytest.raises(ValueError, match="three channels"):
        BSRDegradation().apply(jnp.zeros((1, 8, 8, 1)), KEYS[:1])

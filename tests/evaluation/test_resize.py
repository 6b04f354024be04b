"""The two ways to a judge's size: Pillow's own, TensorFlow 1's by its definition, and what they do to edges."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.evaluation.resize import Resize, resized


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)


@pytest.mark.parametrize("side", [20, 299])
def test_clean_is_pillows_bicubic_on_floats(picture, side):
    found = resized(picture, side, Resize.CLEAN)
    for channel in range(3):
        image = Image.fromarray(picture[..., channel].astype(np.float32))
        wanted = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[..., channel], wanted.clip(0, 255), atol=1e-4)
        assert side == 20 or wanted.max() > 255 + 10  # where bicubic enlarges edges, it goes beyond
    eight = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
    # Of bytes Pillow rounds and clips after each axis, of noise (all edges) by much; elsewhere by little.
    assert np.median(np.abs(found - eight)) < 0.5


@pytest.mark.parametrize("side", [16, 64, 299])
def test_legacy_by_its_definition(picture, side):
    """Output pixel i is read at i · scale between its two neighbours, the last ones repeated."""
    found = resized(picture, side, Resize.LEGACY)
    values = picture.astype(np.float64)
    for i, j in [(0, 0), (1, 2), (side // 2, side // 3), (side - 1, side - 1)]:
        y, x = i * 40 / side, j * 56 / side
        a, b = int(y), int(x)
        c, d = min(a + 1, 39), min(b + 1, 55)
        top = values[a, b] * (1 - x + b) + values[a, d] * (x - b)
        bottom = values[c, b] * (1 - x + b) + values[c, d] * (x - b)
        np.testing.assert_allclose(found[i, j], top * (1 - y + a) + bottom * (y - a), atol=1e-2)


def test_the_size_it_has_is_not_touched(picture):
    square = picture[:40, :40]
    for how in Resize:
        assert (resized(square, 40, how) == square).all()


def test_legacy_aliases_and_clean_does_not():
    """Stripes of one pixel, shrunk fourfold: one way to grey, the other to whatever lines it happens to read."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resized(stripes, 16, Resize.CLEAN)[2:-2, 2:-2]) < 1
    assert np.abs(resized(stripes, 16, Resize.CLEAN)[2:-2, 2:-2] - 127.5).max() < 1
    assert (resized(stripes, 16, Resize.LEGACY) == 255).all()


@pytest.mark.parametrize("height, width, side", [(40, 56, 16), (37, 81, 299), (81, 37, 64), (64, 65, 299), (1, 300, 9)])
def test_pytorch_is_torchs_interpolation(height, width, side):
    """Of floats from 0 to 1, as pytorch-fid has them."""
    torch = pytest.importorskip("torch", reason="PyTorch's own interpolation")
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = resized(picture, side, Resize.PYTORCH)
    image = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
    wanted = torch.nn.functional.interpolate(image, (side, side), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found / 255, wanted[0].permute(1, 2, 0), atol=2e-5)
    assert found.dtype == np.float32


def test_pytorch_is_symmetric_and_aliases():
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[12:20, 12:20] = 255
    found = resized(dot, 48, Resize.PYTORCH)
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-3)
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resized(stripes, 20, Resize.PYTORCH)) == 255  # whatever lines it happens to read


def test_legacy_shifts_to_the_top_left():
    """A symmetric image stays symmetric only in the clean way."""
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[12:20, 12:20] = 255
    clean, legacy = (resized(dot, 48, how)[..., 0] for how in (Resize.CLEAN, Resize.LEGACY))
    np.testing.assert_allclose(clean, clean[::-1, ::-1], atol=1e-3)
    assert np.abs(legacy - legacy[::-1, ::-1]).max() > 50

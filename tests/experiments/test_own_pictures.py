"""The user's own images: upright and in 8-bit RGB whatever their format, before anything is computed with them."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_cascade import BASE, SR_256, WIDTH

from experiments.options.init_image import InitImageOptions, enlarged, read
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder

# Upright it is 24 wide and 16 high, its left half white; stored as a camera on its side does, it is 16 wide.
UPRIGHT = np.zeros((16, 24, 3), np.uint8)
UPRIGHT[:, :12] = 255
SIDEWAYS = {
    "jpg": {"format": "JPEG"},
    "mpo": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (16, 24))]},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "tiff": {"format": "TIFF"},
}


@pytest.fixture(scope="module")
def model() -> Pipeline:
    """No parameters: nothing is drawn."""
    text = PrecomputedTextEncoder(("",), TextEmbedding(jnp.zeros((1, 16, WIDTH)), jnp.zeros((1, 16), bool)))
    return imagen(text, TrainedModel(BASE, {}, SamplingConfig()), TrainedModel(SR_256, {}, SamplingConfig()))


def saved(path, options: dict):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(UPRIGHT))).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("kind", SIDEWAYS)
def test_image_mask_and_enlarge_are_turned_upright(kind, model, tmp_path):
    path = saved(tmp_path / f"photo.{kind}", SIDEWAYS[kind])
    own = InitImageOptions(image=path, mask=path)
    own.check()
    begun = own.begin(model)
    assert begun.image.shape == (16, 24, 3) and begun.mask.shape == (16, 24)
    assert begun.image[:, :10].min() > 0.8 and begun.image[:, 14:].max() < -0.8
    assert begun.mask[:, :10].all() and not begun.mask[:, 14:].any()
    assert own.size(model) == (64, 96)
    enlarging = enlarged(InitImageOptions(enlarge=path), model)
    assert (enlarging.height, enlarging.width) == (16, 24)


def test_a_mask_that_stands_upright_fits_a_photograph_on_its_side(model, tmp_path):
    photo = saved(tmp_path / "photo.jpg", SIDEWAYS["mpo"])
    Image.fromarray(UPRIGHT).save(tmp_path / "mask.png")
    begun = InitImageOptions(image=photo, mask=tmp_path / "mask.png").begin(model)
    assert begun.mask.shape == begun.image.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_mask_of_any_mode_is_the_same(mode, model, tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "photo.png")
    grey = Image.fromarray(UPRIGHT[..., 0])
    grey = Image.fromarray(UPRIGHT[..., 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    grey.save(tmp_path / "mask.png")
    begun = InitImageOptions(image=tmp_path / "photo.png", mask=tmp_path / "mask.png").begin(model)
    np.testing.assert_array_equal(begun.mask, UPRIGHT[..., 0] > 0)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"photo\.png: "):
        InitImageOptions(enlarge=tmp_path / "photo.png").check()
    Image.new("F", (2, 2)).save(tmp_path / "photo.tiff")
    with pytest.raises(ValueError, match=r"photo\.tiff: pixels of mode F, whose range is not known"):
        read(tmp_path / "photo.tiff")

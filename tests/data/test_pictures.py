"""Decoding, the one filter, aligned windows."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import pictures


def test_resize_is_pillows_antialiased_bicubic():
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pictures.resize(picture, 24), expected)


def test_resize_averages_what_it_shrinks():
    """A one-pixel checkerboard is grey from afar; a filter without antialiasing picks black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    assert np.abs(pictures.resize(picture, 16).astype(int) - 127).max() <= 3


def test_resize_keeps_the_centre_of_the_long_side():
    """As if the whole picture had been resized, then cut: the filter sees beyond the cut."""
    picture = np.random.default_rng(4).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    whole = Image.fromarray(picture).resize((30, 10), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((10, 0, 20, 10)))
    np.testing.assert_array_equal(pictures.resize(picture, 10), expected)
    sideways = pictures.resize(picture.transpose(1, 0, 2).copy(), 10).transpose(1, 0, 2).astype(int)
    assert np.abs(sideways - expected).max() <= 2  # Pillow rounds between its two passes


def test_resize_is_centred_for_odd_differences():
    picture = np.random.default_rng(1).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    mirrored = pictures.resize(picture[:, ::-1].copy(), 8)[:, ::-1]
    assert np.abs(pictures.resize(picture, 8).astype(int) - mirrored).max() <= 1


def test_resize_leaves_the_right_size_alone():
    picture = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.resize(picture, 16), picture)


def test_windows_are_aligned_and_go_everywhere():
    """Pixels that hold their own place in the small picture: the two windows must tell of the same places."""
    factor = 4
    small = np.stack([*np.mgrid[0:8, 0:8], np.zeros((8, 8), int)], -1).astype(np.uint8)
    large = small.repeat(factor, 0).repeat(factor, 1)
    corners = set()
    for seed in range(300):
        high, low = pictures.aligned_crops(large, small, 12, np.random.default_rng(seed))
        assert high.shape == (12, 12, 3) and low.shape == (3, 3, 3)
        np.testing.assert_array_equal(high, low.repeat(factor, 0).repeat(factor, 1))
        corners.add(tuple(low[0, 0, :2]))
    assert len(corners) == 36  # 6 × 6 positions of a window of 3 in 8


def test_float_and_back():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    values = pictures.to_float(every)
    assert values.dtype == np.float32 and values.min() == -1 and values.max() == 1
    np.testing.assert_array_equal(pictures.to_uint8(values), every)
    np.testing.assert_array_equal(pictures.to_uint8(np.full((1, 1, 3), 7.0)), 255)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "RGB"])
def test_decode_reads_any_mode(mode):
    image = Image.new("RGB", (5, 4), "white").convert(mode)
    np.testing.assert_array_equal(pictures.decode(encoded(image)), np.full((4, 5, 3), 255))


def test_decode_lays_transparency_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    np.testing.assert_array_equal(pictures.decode(encoded(image)), [[[255, 0, 0], [255, 255, 255]]])


def test_decode_turns_photographs_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right-hand side
    image = Image.new("RGB", (16, 32), "black")
    image.paste("white", (0, 0, 16, 8))
    upright = pictures.decode(encoded(image, "JPEG", exif=exif))
    assert upright.shape == (16, 32, 3)
    assert upright[:, -4:].min() > 200 and upright[:, :20].max() < 50


@pytest.mark.parametrize("picture", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 1), np.uint8)])
def test_decode_takes_arrays(picture):
    assert pictures.decode(picture).shape == (4, 5, 3)


def test_decode_says_what_is_damaged():
    whole = pictures.encode_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for broken in (b"", b"no picture at all", whole[:200], whole[:40] + b"\0" * 40 + whole[80:]):
        with pytest.raises(pictures.Unreadable):
            pictures.decode(broken)


def test_decode_scales_sixteen_bits():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = pictures.decode(encoded(Image.fromarray(ramp)))
    np.testing.assert_array_equal(decoded, np.arange(256).repeat(3).reshape(16, 16, 3))
    with pytest.raises(pictures.Unreadable, match="mode F"):
        pictures.decode(encoded(Image.new("F", (2, 2)), "TIFF"))

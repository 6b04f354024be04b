"""Decoding, the one filter, aligned windows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from jaxdiff.data import images


def test_resize_is_pillows_antialiased_bicubic():
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(images.resize(picture, 24), expected)


def test_resize_averages_what_it_shrinks():
    """A one-pixel checkerboard is grey from afar; a filter without antialiasing picks black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    assert np.abs(images.resize(picture, 16).astype(int) - 127).max() <= 3


def test_resize_keeps_the_centre_of_the_long_side():
    """As if the whole image had been resized, then cut: the filter sees beyond the cut."""
    picture = np.random.default_rng(4).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    whole = Image.fromarray(picture).resize((30, 10), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((10, 0, 20, 10)))
    np.testing.assert_array_equal(images.resize(picture, 10), expected)
    sideways = images.resize(picture.transpose(1, 0, 2).copy(), 10).transpose(1, 0, 2).astype(int)
    assert np.abs(sideways - expected).max() <= 2  # Pillow rounds between its two passes


def test_resize_is_centred_for_odd_differences():
    picture = np.random.default_rng(1).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    mirrored = images.resize(picture[:, ::-1].copy(), 8)[:, ::-1]
    assert np.abs(images.resize(picture, 8).astype(int) - mirrored).max() <= 1


def test_resize_leaves_the_right_size_alone():
    picture = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.resize(picture, 16), picture)


def test_windows_are_aligned_and_go_everywhere():
    """Pixels that hold their own place in the small image: the two windows must tell of the same places."""
    factor = 4
    small = np.stack([*np.mgrid[0:8, 0:8], np.zeros((8, 8), int)], -1).astype(np.uint8)
    large = small.repeat(factor, 0).repeat(factor, 1)
    corners = set()
    for seed in range(300):
        high, low = images.aligned_crops(large, small, 12, np.random.default_rng(seed))
        assert high.shape == (12, 12, 3) and low.shape == (3, 3, 3)
        np.testing.assert_array_equal(high, low.repeat(factor, 0).repeat(factor, 1))
        corners.add(tuple(low[0, 0, :2]))
    assert len(corners) == 36  # 6 × 6 positions of a window of 3 in 8


def test_float_and_back():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    values = images.to_float(every)
    assert values.dtype == np.float32 and values.min() == -1 and values.max() == 1
    np.testing.assert_array_equal(images.to_uint8(values), every)
    np.testing.assert_array_equal(images.to_uint8(np.full((1, 1, 3), 7.0)), 255)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "RGB"])
def test_decode_reads_any_mode(mode):
    image = Image.new("RGB", (5, 4), "white").convert(mode)
    np.testing.assert_array_equal(images.decode(encoded(image)), np.full((4, 5, 3), 255))


def test_decode_lays_transparency_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    np.testing.assert_array_equal(images.decode(encoded(image)), [[[255, 0, 0], [255, 255, 255]]])


# The corners of the upright image, one colour each: they tell all eight orientations apart.
CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :12], CORNERS[:8, 12:], CORNERS[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)

# What a camera has stored when its EXIF says so: the inverse of what has to be done.
STORED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1),
    6: np.rot90(CORNERS),
    7: CORNERS[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(CORNERS, -1),
}
FORMATS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0, "save_all": True, "append_images": [Image.new("RGB", (24, 16))]},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}


def sideways(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_format_is_turned_upright(kind, orientation, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    stored.save(tmp_path / "photo", kind, exif=sideways(orientation), **FORMATS[kind])
    content = (tmp_path / "photo").read_bytes()
    assert Image.open(io.BytesIO(content)).format == kind
    upright = images.decode(content)
    assert upright.shape == CORNERS.shape
    assert np.abs(upright.astype(int) - CORNERS)[2:-2, 2:10].max() < 30  # the seams may be blurred


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "I;16", "CMYK"])
def test_every_mode_is_turned_upright(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    ramp = np.linspace(0, 255, 6).astype(np.uint8).reshape(2, 3)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    as_stored = images.decode(encoded(image, kind))
    turned = images.decode(encoded(image, kind, exif=sideways(6)))
    np.testing.assert_array_equal(turned, np.rot90(as_stored, -1))


def test_orientation_in_xmp_counts():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    content = encoded(Image.fromarray(np.ascontiguousarray(STORED[8])), "JPEG", xmp=xmp)
    assert images.decode(content).shape == CORNERS.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no TIFF header at all",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01",  # cut off within the entry
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",  # a string
    ],
)
def test_damaged_exif_does_not_lose_the_image(kind, exif):
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = images.decode(encoded(Image.fromarray(CORNERS), kind, **options))
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(CORNERS), kind, exif=exif, **options)), plain)


@pytest.mark.parametrize("picture", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 1), np.uint8)])
def test_decode_takes_arrays(picture):
    assert images.decode(picture).shape == (4, 5, 3)


def test_decode_says_what_is_damaged():
    whole = images.encode_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for broken in (b"", b"no image at all", whole[:200], whole[:40] + b"\0" * 40 + whole[80:]):
        with pytest.raises(images.Unreadable):
            images.decode(broken)


def test_decode_scales_sixteen_bits():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = images.decode(encoded(Image.fromarray(ramp)))
    np.testing.assert_array_equal(decoded, np.arange(256).repeat(3).reshape(16, 16, 3))


PIXELS = np.array([[[255, 0, 0], [0, 0, 255]], [[128, 128, 128], [10, 200, 30]]], np.uint8)
GREY = np.array([[0, 77], [128, 255]], np.uint8)


def of_mode(mode: str) -> Image.Image:
    """PIXELS, or GREY, in one of Pillow's modes."""
    if mode in ("La", "RGBa"):
        return of_mode(mode.upper()).convert(mode)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(Image.fromarray(PIXELS), srgb, lab, outputMode="LAB")
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        return Image.frombytes(mode, (2, 2), (GREY.astype(np.uint16) * 257).astype(f"{order}u2").tobytes())
    if mode in ("L", "LA", "1"):
        return Image.fromarray(GREY).convert(mode)
    if mode in ("P", "PA"):
        return Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE).convert(mode)
    return Image.fromarray(PIXELS).convert(mode)


@pytest.mark.parametrize(
    "mode, tolerance",
    [
        *((mode, 0) for mode in ("L", "LA", "La", "I;16", "I;16L", "I;16B", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa")),
        ("CMYK", 1),
        ("YCbCr", 2),
        ("HSV", 3),
        ("LAB", 24),  # whole steps of a and b are coarse for saturated colours
    ],
)
def test_every_mode_becomes_rgb(mode, tolerance):
    image = of_mode(mode)
    assert image.mode == mode
    rgb = images._rgb(image)
    expected = GREY[..., None].repeat(3, -1) if mode in ("L", "LA", "La") or mode[0] == "I" else PIXELS
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_files(kind):
    """JPEG stores CMYK inverted, as Adobe does; TIFF does not."""
    image = Image.fromarray(np.kron(PIXELS, np.ones((16, 16, 1), np.uint8))).convert("CMYK")
    decoded = images.decode(encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert np.abs(decoded[8::16, 8::16].astype(int) - PIXELS).max() <= 4


def test_sixteen_bits_of_a_pgm():
    pgm = b"P5 2 2 65535\n" + (GREY.astype(">u2") * 257).tobytes()
    assert Image.open(io.BytesIO(pgm)).mode == "I"
    np.testing.assert_array_equal(images.decode(pgm)[..., 0], GREY)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_of_unknown_range_are_refused(mode):
    with pytest.raises(images.Unreadable, match=f"^pixels of mode {mode}, whose range is not known$"):
        images.decode(encoded(Image.new(mode, (2, 2)), "TIFF"))


def raw_png(depth: int, colour: int, row: bytes, **chunks: bytes) -> bytes:
    """One row of four pixels, of bit depths that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    rest = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, expected",
    [
        (raw_png(16, 0, struct.pack(">4H", 0, 7, 25700, 65535), tRNS=struct.pack(">H", 7)), [0, 255, 100, 255]),
        (raw_png(16, 0, struct.pack(">4H", 0, 7, 25700, 65535), tRNS=struct.pack(">H", 0)), [255, 0, 100, 255]),
        (raw_png(16, 4, struct.pack(">8H", 0, 65535, 25700, 65535, 7, 0, 65535, 65535)), [0, 100, 255, 255]),
        (raw_png(1, 0, b"\x90", tRNS=b"\0\1"), [255, 0, 0, 255]),
        (raw_png(1, 0, b"\x90", tRNS=b"\0\0"), [255, 255, 255, 255]),
        (raw_png(2, 0, b"\x1b", tRNS=b"\0\1"), [0, 255, 170, 255]),
        (raw_png(4, 0, b"\x0f\x7a", tRNS=b"\0\7"), [0, 255, 255, 170]),
        (raw_png(8, 0, bytes([0, 77, 128, 9]), tRNS=b"\0\x4d"), [0, 255, 128, 9]),
        (raw_png(4, 3, b"\x01\x10", PLTE=bytes([9] * 3 + [77] * 3), tRNS=b"\0"), [255, 77, 77, 255]),
        (raw_png(4, 3, b"\x01\x10", PLTE=bytes([9] * 3 + [77] * 3), tRNS=b"\xff\x80"), [9, 166, 166, 9]),
        (raw_png(8, 2, bytes([9, 9, 9, 77, 77, 77] * 2), tRNS=b"\0\x09" * 3), [255, 77, 255, 77]),
        (raw_png(16, 2, bytes([9, 9] * 3 + [77, 77] * 3) * 2, tRNS=b"\x09\x09" * 3), [255, 77, 255, 77]),
    ],
)
def test_transparency_of_every_depth_is_laid_on_white(content, expected):
    np.testing.assert_array_equal(images.decode(content), np.repeat(np.reshape(expected, (1, 4, 1)), 3, -1))
    assert images.has_transparency(Image.open(io.BytesIO(content)))


def test_an_alpha_channel_that_is_opaque_is_no_transparency():
    opaque = Image.new("RGBA", (3, 2), (1, 2, 3, 255))
    nearly = opaque.copy()
    nearly.putpixel((2, 1), (1, 2, 3, 254))
    palette = raw_png(4, 3, b"\x11\x11", PLTE=bytes(6), tRNS=b"\0")  # of a colour that no pixel has
    absent = raw_png(16, 0, struct.pack(">4H", 1, 2, 3, 4), tRNS=struct.pack(">H", 5))
    for image, expected in [
        (opaque, False),
        (nearly, True),
        (opaque.convert("LA"), False),
        (nearly.convert("RGBa"), True),
        (nearly.convert("LA").convert("La"), True),
    ]:
        assert images.has_transparency(image) == expected
    for content in (palette, absent, encoded(opaque), encoded(Image.new("RGB", (2, 2)))):
        assert not images.has_transparency(Image.open(io.BytesIO(content)))

"""Sizes from headers: the same as what decoding gives, without decoding; kept while the files stay as they are."""

import io
import os

import numpy as np
import pytest
from PIL import ExifTags, Image

from jaxdiff.data import images, records
from jaxdiff.data.folder import read as read_folder
from jaxdiff.data.image_sizes import read_sizes
from jaxdiff.data.mixture import MixtureSource, Spread


def encoded(form, size=(20, 12), orientation=None, mode="RGB", **options):
    buffer = io.BytesIO()
    image = Image.new(mode, size, 1)
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_the_header_says_what_decoding_gives(form, orientation):
    content = encoded(form, orientation=orientation)
    expected = images.decode(content).shape[:2]
    assert images.upright_size(content) == expected == ((20, 12) if (orientation or 1) > 4 else (12, 20))
    assert images.upright_size(io.BytesIO(content)) == expected


@pytest.mark.parametrize("form, mode", [("GIF", "P"), ("BMP", "RGB"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("PNG", "1")])
def test_other_formats(form, mode):
    content = encoded(form, mode=mode)
    assert images.upright_size(content) == images.decode(content).shape[:2] == (12, 20)


def test_orientation_in_xmp():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded("JPEG", xmp=xmp)
    assert images.upright_size(content) == images.decode(content).shape[:2] == (20, 12)


def test_arrays_have_their_own_size():
    assert images.upright_size(np.zeros((3, 5, 3), np.uint8)) == (3, 5)
    assert images.upright_size(np.zeros((3, 5), np.uint8)) == (3, 5)


@pytest.mark.parametrize(
    "content, message", [(b"", "not an image"), (b"nothing", "not an image"), (b"\x89PNG\r\n\x1a\n", "")]
)
def test_no_header_is_no_size(content, message):
    with pytest.raises(images.Unreadable, match=message):
        images.upright_size(content)
    with pytest.raises(images.Unreadable):
        images.upright_size(np.zeros(3, np.uint8))


@pytest.fixture
def photos(tmp_path):
    for i in range(130):
        (tmp_path / f"{i:03d}.png").write_bytes(encoded("PNG", (8 + i, 9)))
        (tmp_path / f"{i:03d}.txt").write_text(f"image {i}")
    return tmp_path


def test_all_sizes_of_a_source_without_decoding(photos, monkeypatch):
    """A file that is cut off behind its header has a size; the pixels are never asked for."""
    whole = (photos / "007.png").read_bytes()
    (photos / "007.png").write_bytes(whole[:60])
    monkeypatch.setattr(images, "decode", None)
    monkeypatch.setattr(Image.Image, "load", None)
    done = []
    found = read_sizes(read_folder(photos), threads=3, progress=done.append)
    assert found.sizes.tolist() == [[9, 8 + i] for i in range(130)] and not found.faults
    assert sum(done) == 130 and len(found) == 130


def test_what_cannot_be_read_is_named_and_costs_nothing_else(photos):
    source = read_folder(photos)
    (photos / "003.png").write_bytes(b"damaged")
    (photos / "100.png").unlink()
    found = read_sizes(source)
    assert np.flatnonzero(found.sizes[:, 0] == 0).tolist() == [3, 100]
    first, second = found.faults
    assert first == (str(photos / "003.png"), "not an image in any known format")
    assert second[0] == "example 100" and "100.png" in second[1]


def test_sizes_are_kept_until_a_file_changes(photos, tmp_path, monkeypatch):
    source, asked = read_folder(photos), []
    real = images.upright_size
    monkeypatch.setattr(images, "upright_size", lambda image: asked.append(image) or real(image))
    (photos / "005.png").write_bytes(b"damaged")
    first = read_sizes(source, tmp_path / "cache")
    assert len(asked) == 130
    again = read_sizes(read_folder(photos), tmp_path / "cache")
    assert len(asked) == 131 and again.faults == first.faults  # the damaged one is looked at again, for its reason
    np.testing.assert_array_equal(first.sizes, again.sizes)
    (photos / "005.png").write_bytes(encoded("PNG", (33, 44)))
    assert read_sizes(read_folder(photos), tmp_path / "cache").sizes[5].tolist() == [44, 33]
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 2 and all(file.suffix == ".npy" for file in kept)
    for file in kept:
        file.write_bytes(b"cut off")
    assert read_sizes(source, tmp_path / "cache").sizes[7].tolist() == [9, 15]


def test_other_sources(photos, make, tmp_path):
    folder = read_folder(photos)
    mixed = MixtureSource((folder, make(3, 5, 6)))
    sizes = read_sizes(mixed, tmp_path / "kept").sizes
    for index in range(len(mixed)):
        part, place = mixed.where(index)
        assert sizes[index].tolist() == ([5, 6] if part else [9, 8 + place])
    assert not (tmp_path / "kept").exists()  # one of them has nothing to go by
    assert read_sizes(Spread(folder, 13)).sizes.tolist() == [[9, 8 + 10 * i] for i in range(13)]
    with pytest.raises(ValueError, match="no examples"):
        read_sizes(make(0, 5, 5))


def test_converted_datasets_are_told_apart(tmp_path):
    from jaxdiff.data import convert

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "list.csv").write_text("path,caption\na.png,one\n")
    convert.convert([str(tmp_path / "list.csv")], tmp_path / "out")
    source = records.read(tmp_path / "out")
    said = source.fingerprint()
    assert read_sizes(source, tmp_path / "kept").sizes.tolist() == [[12, 20]]
    file = tmp_path / "out" / source.shards[0]
    os.utime(file, (1, 1))
    assert source.fingerprint() != said

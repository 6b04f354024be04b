"""The folder for the README's tour, on a made-up package."""

import io
import json
import tarfile

import numpy as np
import pytest

from experiments.recipes import openmoji
from jaxdiff.data import folder, images

ENTRIES = [
    {"annotation": "red apple", "group": "food-drink", "hexcode": "1F34E", "skintone": ""},
    {"annotation": "four o’clock", "group": "travel-places", "hexcode": "1F553", "skintone": ""},
    {"annotation": "flag: Wales", "group": "flags", "hexcode": "1F3F4", "skintone": ""},
    {"annotation": "person: dark", "group": "activities", "hexcode": "1F9D8", "skintone": 5},
]


@pytest.fixture
def packages(tmp_path):
    files = {"data/openmoji.json": json.dumps(ENTRIES)}
    for entry, colour in zip(ENTRIES, ("#f00", "#00f", "#0f0", "#0f0")):
        square = f'<path fill="{colour}" d="M18 18h36v36h-36z"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{square}</svg>'
        files[f"color/svg/{entry['hexcode']}.svg"] = svg
    place = tmp_path / "npm"
    place.mkdir()
    with tarfile.open(place / "openmoji-9.9.9.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return place


def test_it_is_a_folder_of_captioned_images(packages, tmp_path):
    openmoji.main(tmp_path / "photos", 2, 64, packages)
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == [
        "four-o-clock.png", "four-o-clock.txt", "red-apple.png", "red-apple.txt",
    ]  # fmt: skip
    source = folder.read(tmp_path / "photos")
    examples = {source[i]["caption"]: images.decode(source[i]["image"]) for i in range(len(source))}
    assert set(examples) == {"red apple", "four o’clock"}
    np.testing.assert_array_equal(examples["red apple"][32, 32], (255, 0, 0))
    np.testing.assert_array_equal(examples["red apple"][2, 2], (255, 255, 255))


def test_what_is_not_there_is_said(packages, tmp_path):
    with pytest.raises(ValueError, match="count 3: there are 2"):
        openmoji.main(tmp_path / "photos", 3, 64, packages)
    assert not (tmp_path / "photos").exists()
    (packages / "openmoji-9.9.9.tgz").write_bytes(b"no tarball")
    with pytest.raises(ValueError, match=r"openmoji-9\.9\.9\.tgz: not the npm package openmoji"):
        openmoji.main(tmp_path / "photos", 2, 64, packages)

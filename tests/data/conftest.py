"""Small captioned sources for the tests of this folder."""

import dataclasses
import json

import numpy as np
import pytest

from jaxdiff.data import emoji, images


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source held in memory."""

    examples: tuple

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(self.examples[index], Exception):
            raise self.examples[index]
        return self.examples[index]


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random image of low frequencies: shrinking it loses little."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 3) * x + rng.uniform(1, 3) * y + rng.uniform())) for _ in range(3)]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="session")
def listed():
    return Listed


@pytest.fixture(scope="session")
def source() -> Listed:
    """Eleven 32-pixel images with captions."""
    return make_source(11, 32, 32)


@pytest.fixture(scope="session")
def make():
    return make_source


def make_source(count: int, height: int, width: int) -> Listed:
    rng = np.random.default_rng(3)
    return Listed(
        tuple(
            {
                "image": images.encode_png(smooth(rng, height, width)),
                "caption": f"image number {i}",
                "name": f"set/{i}.png",
            }
            for i in range(count)
        )
    )


def _icon(colour: str) -> dict:
    return {"body": f'<path fill="{colour}" d="M16 16h96v96h-96z"/>'}


@pytest.fixture(scope="session")
def emoji_packages() -> dict[str, dict]:
    """Two npm packages, made up: three emoji to keep, and one of each sort to leave out."""
    names = [
        {"label": "green square", "hexcode": "1F7E9", "tags": ["grass"], "group": 8, "order": 2},
        {
            "label": "red hand",
            "hexcode": "270B",
            "tags": ["stop", "palm"],
            "group": 1,
            "order": 1,
            "skins": [{"label": "red hand: dark skin tone", "hexcode": "270B-1F3FF"}],
        },
        {"label": "blue heart", "hexcode": "2764-FE0F-1F525", "group": 0, "order": 3},
        {"label": "dark skin tone", "hexcode": "1F3FF", "group": 2, "order": 4},
        {"label": "white flag", "hexcode": "1F3F3", "group": 9, "order": 5},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "never drawn", "hexcode": "1F600", "group": 0, "order": 6},
    ]
    characters = {
        "1f7e9": "green-square",
        "270b": "hand",
        "270b-1f3ff": "hand-dark",
        "2764-1f525": "heart",
        "1f3ff": "dark",
        "1f3f3": "flag",
        "1f1e6": "letter",
    }
    icons = {
        "green-square": _icon("#00ff00"),
        "raised-hand": _icon("#ff0000"),
        "heart": {**_icon("#0000ff"), "left": 16, "top": 16, "width": 96, "height": 96},
        **{name: _icon("#123456") for name in ("hand-dark", "dark", "flag", "letter")},
    }
    artwork = {"width": 128, "height": 128, "icons": icons, "aliases": {"hand": {"parent": "raised-hand"}}}
    return {
        "noto": {"icons.json": artwork, "chars.json": characters, "package.json": {"version": "0"}},
        "emojibase": {"en/data.json": names, "package.json": {"version": "0"}},
    }


@pytest.fixture
def fake_emoji(data_dir, emoji_packages, tmp_path_factory):
    """The made-up emoji, prepared at 64 pixels in `data_dir`."""
    packages = tmp_path_factory.mktemp("packages")
    for name, files in emoji_packages.items():
        for file, content in files.items():
            target = packages / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(content))
    return emoji.prepare(64, data_dir, packages, progress=False)

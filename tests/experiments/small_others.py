"""Very small networks in place of the tiny CLIP and the tiny classifier."""

import dataclasses

import pytest

from experiments.table import TASKS
from jaxdiff.nets.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig

TEXT = TextTowerConfig(width=8, layers=1, heads=2, feed_forward=8, vocab=64, length=24, eos_id=1)


def shrink(monkeypatch: pytest.MonkeyPatch, side: int = 16) -> None:
    """For one test, under the name tiny."""
    image = ImageTowerConfig(width=8, layers=1, heads=2, feed_forward=8, resolution=side, patch=8)
    monkeypatch.setitem(TASKS["clip"].presets, "tiny", CLIPConfig(TEXT, image, width=6))
    presets = TASKS["classifier"].presets
    monkeypatch.setitem(presets, "tiny", dataclasses.replace(presets["tiny"], side=side, channels=(4, 8), features=6))

"""Very small networks that judge, with random parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.tasks.classifier import ATTRIBUTES
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.nets.classifier import Classifier, ClassifierConfig
from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.text.tokenizer import train_tokenizer
from jaxdiff.weights import classifier, clip


def write_judges(folder: Path) -> dict[str, Path]:
    """`{"clip": …, "classifier": …}`, folders as the training scripts write them."""
    classes = tuple(map(len, ATTRIBUTES.values()))
    config = ClassifierConfig(side=16, channels=(4, 8), features=6, names=tuple(ATTRIBUTES), classes=classes)
    params = Classifier(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    classifier.save(folder / "classifier", "shapes", config, params)
    words = train_tokenizer([caption.text for caption in held_out_captions(100)], 400)
    words.save_pretrained(str(folder / "clip"))
    text = TextTowerConfig(width=8, layers=1, heads=2, feed_forward=8, vocab=len(words), length=24, eos_id=1)
    image = ImageTowerConfig(width=8, layers=1, heads=2, feed_forward=8, resolution=16, patch=8)
    towers = CLIPConfig(text, image, width=6)
    params = CLIP(towers).init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 16, 16, 3)))["params"]
    clip.export(towers, params, folder / "clip")
    return {name: folder / name for name in ("clip", "classifier")}

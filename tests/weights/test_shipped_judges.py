"""The judges that the package ships: a CLIP that retrieves, a classifier that knows what it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.classifier import ATTRIBUTES, labels
from jaxdiff.data.images import to_float
from jaxdiff.data.shapes_caption import distinct_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.features import all_features, clip_image
from jaxdiff.evaluation.retrieval import retrieval
from jaxdiff.nets.classifier import Classifier
from jaxdiff.weights import classifier, clip
from jaxdiff.weights.imagen import SHIPPED


def r_at_1(examples):
    """Of images by their captions, of captions by their images; and the worse R@5."""
    scenes, captions = zip(*examples)
    image = clip_image(*clip.load_image(SHIPPED / "clip"))
    text = clip.load_text_encoder(SHIPPED / "clip").encode([caption.text for caption in captions]).pooled
    found = retrieval(np.asarray(text), all_features(image, [draw(s, image.side) for s in scenes]))
    return found.image[1], found.text[1], min(found.image[5], found.text[5])


def test_clip_finds_a_hundred_pictures_that_it_never_saw():
    """It was trained on the first 300,000; the captions of a hundred are true of one image each."""
    image, text, five = r_at_1(distinct_examples(100, "train", 10**6))
    assert image >= 0.95 and text >= 0.95
    assert five == 1


def test_clip_finds_a_hundred_pictures_of_combinations_that_it_never_saw():
    """No image of that kind, colour, fill and size together was in training."""
    image, text, five = r_at_1(distinct_examples(100))
    assert image >= 0.92 and text >= 0.92
    assert five >= 0.99


def test_the_classifier_reads_held_out_pictures():
    name, config, params = classifier.load(SHIPPED / "classifier")
    assert name == "shapes" and config.features <= 64
    scenes = [scene("held_out", i) for i in range(150)]
    pictures = np.stack([to_float(draw(s, config.side)) for s in scenes])
    _, logits = jax.jit(Classifier(config).apply)({"params": params}, jnp.asarray(pictures))
    wanted = np.array([labels(s) for s in scenes])
    for number, attribute in enumerate(ATTRIBUTES):
        known = wanted[:, number] >= 0
        right = (np.asarray(logits[attribute]).argmax(1) == wanted[:, number])[known]
        assert right.mean() == pytest.approx(1, abs=0.03), attribute

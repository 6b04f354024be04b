"""The judges that the package ships: a CLIP that retrieves, a classifier that knows what it sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.classifier import ATTRIBUTES, labels
from jaxdiff.data.pictures import to_float
from jaxdiff.data.shapes_caption import distinct_examples
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.features import all_features, clip_image
from jaxdiff.evaluation.retrieval import retrieval
from jaxdiff.nets.classifier import Classifier
from jaxdiff.text.clip import encode
from jaxdiff.weights import classifier, clip
from jaxdiff.weights.imagen import SHIPPED


def test_clip_finds_a_hundred_held_out_pictures_and_captions():
    scenes, captions = zip(*distinct_examples(100))
    image = clip_image(*clip.load_image(SHIPPED / "clip"))
    text = encode(clip.load_text_encoder(SHIPPED / "clip"), [caption.text for caption in captions]).embedding
    found = retrieval(np.asarray(text), all_features(image, [draw(s, image.side) for s in scenes]))
    assert found.image[1] >= 0.85 and found.text[1] >= 0.9
    assert min(found.image[5], found.text[5]) >= 0.98


def test_the_classifier_reads_held_out_pictures():
    name, config, params = classifier.load(SHIPPED / "classifier")
    assert name == "shapes" and config.features <= 64
    scenes = [scene("held_out", i) for i in range(300)]
    pictures = np.stack([to_float(draw(s, config.side)) for s in scenes])
    _, logits = Classifier(config).apply({"params": params}, jnp.asarray(pictures))
    wanted = np.array([labels(s) for s in scenes])
    for number, attribute in enumerate(ATTRIBUTES):
        known = wanted[:, number] >= 0
        right = (np.asarray(logits[attribute]).argmax(1) == wanted[:, number])[known]
        assert right.mean() == pytest.approx(1, abs=0.03), attribute

"""Features of a set: on eight devices as on one, whatever the batch; what tells networks apart."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.evaluation import features
from jaxdiff.evaluation.features import all_features, extract
from jaxdiff.evaluation.resize import Resize
from jaxdiff.evaluation.statistics import add, empty, merge
from jaxdiff.nets.classifier import Classifier, ClassifierConfig
from jaxdiff.nets.clip import CLIP, CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.nets.inception import InceptionOutputs
from jaxdiff.training.mesh import make_mesh

CONFIG = ClassifierConfig(side=16, channels=(4, 8), features=6, names=("kind", "colour", "size"), classes=(3, 4, 2))


@pytest.fixture(scope="module")
def network():
    params = Classifier(CONFIG).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return features.classifier("things", CONFIG, params)


@pytest.fixture(scope="module")
def shown():
    return np.random.default_rng(0).integers(0, 256, (29, 20, 20, 3)).astype(np.uint8)


def test_eight_devices_give_the_statistics_of_one(network, shown):
    one = add(empty(6), all_features(network, shown, batch=8))
    mesh = make_mesh(data=4, fsdp=2)
    parts = [add(empty(6), seen["features"]) for seen in extract(network, shown, batch=10, mesh=mesh)]
    assert [part.count for part in parts] == [16, 13]  # a batch that the devices divide
    eight = merge(*parts[::-1])
    assert one.count == eight.count == 29
    np.testing.assert_allclose(one.mean, eight.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.covariance, eight.covariance, rtol=1e-4, atol=1e-6)


def test_a_picture_is_seen_alike_whatever_is_beside_it(network, shown):
    whole = all_features(network, shown, batch=64)
    for batch in (1, 7):
        np.testing.assert_allclose(all_features(network, shown, batch=batch), whole, rtol=1e-5, atol=1e-6)
    assert whole.shape == (29, 6) and (whole >= 0).all()


def test_logits_are_those_of_two_attributes_together(network, shown):
    (seen,) = extract(network, shown)
    classes = np.exp(seen["logits"])
    assert classes.shape == (29, 12)
    np.testing.assert_allclose(classes.sum(1), 1, rtol=1e-5)


def test_clips_image_tower():
    config = CLIPConfig(
        TextTowerConfig(width=8, layers=1, heads=2, feed_forward=8, vocab=9, length=4),
        ImageTowerConfig(width=8, layers=1, heads=2, feed_forward=8, resolution=8, patch=4),
        width=5,
    )
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    params = CLIP(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 8, 8, 3)))
    params = params["params"]
    found = all_features(features.clip_image(config, params), picture)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = CLIP(config).apply(
        {"params": params}, jnp.asarray((picture / 255 - mean) / std, jnp.float32), method="embed_image"
    )
    np.testing.assert_allclose(found, wanted.embedding, rtol=1e-4, atol=1e-5)


def test_inception_sees_pixels_as_its_graph_scales_them(monkeypatch):
    """The graph of 2015 itself: minus 128, divided by 128."""

    class Sees:
        def apply(self, variables, pictures):
            return InceptionOutputs(pictures.mean((1, 2)), pictures.max((1, 2)), {64: pictures.min((1, 2))})

    monkeypatch.setattr(features, "Inception", Sees)
    grey = np.full((2, 299, 299, 3), 128, np.uint8)
    grey[1] = 192
    (seen,) = extract(features.inception({}), grey)
    np.testing.assert_allclose(seen["features"], [[0] * 3, [0.5] * 3], atol=1e-6)
    # pytorch-fid: twice what lies between 0 and 1, minus 1.
    (seen,) = extract(features.inception({}, Resize.PYTORCH), grey)
    np.testing.assert_allclose(seen["features"], [[2 * 128 / 255 - 1] * 3, [2 * 192 / 255 - 1] * 3], atol=2e-5)


def test_features_of_earlier_layers_have_another_name(monkeypatch):
    class Sees:
        def apply(self, variables, pictures):
            mean = pictures.mean((1, 2))
            return InceptionOutputs(mean, mean, {width: mean[:, :1] * width for width in (64, 192, 768)})

    monkeypatch.setattr(features, "Inception", Sees)
    picture = np.full((1, 299, 299, 3), 192, np.uint8)
    digests = set()
    for dims in (64, 192, 768):
        network = features.inception({}, dims=dims)
        (seen,) = extract(network, picture)
        assert seen["features"].tolist() == [[0.5 * dims]]
        assert network.name == f"inception-2015-12-05-{dims}"
        digests.add(network.digest)
    assert features.inception({}).name == features.inception({}, dims=2048).name == "inception-2015-12-05"
    digests |= {features.inception({}, how).digest for how in (Resize.CLEAN, Resize.PYTORCH)}
    assert len(digests) == 5  # CLEAN and LEGACY differ in their resize alone
    assert features.inception({}, Resize.LEGACY).digest == features.inception({}).digest
    with pytest.raises(ValueError, match="dims 128: Inception has features of 64, 192, 768, 2048"):
        features.inception({}, dims=128)


def test_settings_tell_networks_apart_too(network):
    other = features.classifier("things", replace(CONFIG, names=("sort", "colour", "size")), network.params)
    assert other.digest != network.digest == features.classifier("things", CONFIG, network.params).digest
    assert network.width == 6


def test_a_network_is_named_with_its_digest(network):
    assert str(network) == f"classifier-things {network.digest}"


def test_no_pictures(network):
    with pytest.raises(ValueError, match="no images"):
        all_features(network, [])

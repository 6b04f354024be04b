"""Conditioners of latent diffusion in training, and training on images instead of stored latents."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.core import trees
from jaxdiff.core.products import LatentSpec
from jaxdiff.data.latents import LatentBatches, stored_latents
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.conditioner import Conditioner, SampleInputs, joined
from jaxdiff.models.conditioners import MaskConditioner, NullText, SizeConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.latent import LatentTraining, encoded, on_autoencoder
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.stable_diffusion import SCHEDULE
from jaxdiff.text.encoder import TextEmbedding

COUNT = 400
KEYS = noise.sample_keys(jax.random.key(3), jnp.arange(COUNT))


def texts(count=COUNT):
    """No value is 0 or 1."""
    rng = np.random.default_rng(0)
    tokens, pooled = rng.uniform(2, 3, (count, 4, 6)), rng.uniform(4, 5, (count, 5))
    return {
        "text": tokens.astype("f4"),
        "text_mask": np.ones((count, 4), bool),
        "text_pooled": pooled.astype("f4"),
        "null_text": np.full((4, 6), 7, "f4"),
        "null_pooled": np.full(5, 8, "f4"),
    }


@pytest.mark.parametrize(("null", "values"), [(NullText.ZEROS, (0, 0)), (NullText.EMPTY, (7, 8))])
def test_tokens_and_pooled_text_are_dropped_together(null, values):
    conditioner, batch = TextConditioner(6, 4, dropout=0.25, null=null, pooled=5), texts()
    given = conditioner.training(batch, KEYS, (8, 8))
    dropped = (np.asarray(given.tokens) == values[0]).all((1, 2))
    np.testing.assert_array_equal(dropped, (np.asarray(given.vector) == values[1]).all(1))
    assert 60 < dropped.sum() < 140
    np.testing.assert_array_equal(np.asarray(given.vector)[~dropped], batch["text_pooled"][~dropped])
    spec = conditioner.batch_spec(2, 8)
    assert spec["text_pooled"].shape == (2, 5) and spec["text"].shape == (2, 4, 6)


def test_the_mean_of_the_tokens():
    """Of those that are not masked; zero without a caption."""
    conditioner, batch = TextConditioner(6, 4, dropout=0.25, mean=True), texts()
    batch["text_mask"][:, 2:] = False
    given = conditioner.training(batch, KEYS, (8, 8))
    dropped = ~np.asarray(given.token_mask).any(1)
    wanted = np.where(dropped[:, None], 0.0, batch["text"][:, :2].mean(1))
    assert 60 < dropped.sum() < 140
    np.testing.assert_allclose(given.vector, wanted, atol=1e-6)
    text = TextEmbedding(jnp.asarray(batch["text"]), jnp.asarray(batch["text_mask"]))
    one, other = conditioner.sampling(SampleInputs(text=text), KEYS, (8, 8))
    np.testing.assert_allclose(one.vector[~dropped], wanted[~dropped], atol=1e-6)
    np.testing.assert_array_equal(other.vector, 0)
    with pytest.raises(ValueError, match="one vector of the text: pooled or mean"):
        TextConditioner(6, 4, pooled=5, mean=True)


def test_pooled_text_in_sampling():
    """Of both branches; the null text is zeros, and a text encoder without it is an error that says so."""
    conditioner = TextConditioner(6, 4, pooled=5)
    batch = texts(2)
    text = TextEmbedding(*(jnp.asarray(batch[name]) for name in ("text", "text_mask", "text_pooled")))
    one, other = conditioner.sampling(SampleInputs(text=text), KEYS[:2], (8, 8))
    np.testing.assert_array_equal(one.vector, batch["text_pooled"])
    np.testing.assert_array_equal(other.vector, 0)
    with pytest.raises(ValueError, match="reads a pooled text of width 5, its text encoder gives none"):
        conditioner.sampling(SampleInputs(text=text._replace(pooled=None)), KEYS[:2], (8, 8))
    with pytest.raises(ValueError, match="a batch of this model needs text_pooled"):
        conditioner.training({"text": batch["text"], "text_mask": batch["text_mask"]}, KEYS[:2], (8, 8))


def test_sizes_are_embedded_by_sines():
    """Six numbers, cosines before sines, the slowest last; in sampling those of the image in pixels."""
    conditioner = SizeConditioner(frequencies=4, stride=8)
    given = conditioner.sampling(SampleInputs(), KEYS[:2], (4, 6)).conditional.vector
    assert given.shape == (2, 24)
    for number, size in enumerate((32, 48, 0, 0, 32, 48)):
        angles = size * np.asarray([1.0, 0.01])
        wanted = np.concatenate([np.cos(angles), np.sin(angles)])
        np.testing.assert_allclose(given[0, 4 * number : 4 * number + 4], wanted, atol=1e-5)
    trained = conditioner.training({"sizes": np.asarray([[32, 48, 0, 0, 32, 48]] * 2, "f4")}, KEYS[:2], (4, 6))
    np.testing.assert_allclose(trained.vector, given, atol=1e-6)


def test_masks():
    """Beside the network's input: mask, then masked product; some examples are wholly masked in training."""
    conditioner, rng = MaskConditioner(channels=2, dropout=0.25), np.random.default_rng(0)
    batch = {"mask": rng.integers(0, 2, (COUNT, 3, 3, 1)).astype("f4"), "masked": rng.uniform(2, 3, (COUNT, 3, 3, 2))}
    given = np.asarray(conditioner.training(batch, KEYS, (3, 3)).concat)
    whole = (given[..., 1:] == 0).all((1, 2, 3))
    assert 60 < whole.sum() < 140 and (given[whole][..., 0] == 1).all()
    np.testing.assert_array_equal(given[~whole][..., :1], batch["mask"][~whole])
    np.testing.assert_allclose(given[~whole][..., 1:], batch["masked"][~whole], rtol=1e-6)
    free = conditioner.sampling(SampleInputs(), KEYS[:2], (3, 3)).conditional.concat
    np.testing.assert_array_equal(free, np.broadcast_to([1, 0, 0], (2, 3, 3, 3)))
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"dropout {bad}"):
            MaskConditioner(dropout=bad)


def test_vectors_are_joined_in_order():
    """Pooled text before sizes, as SDXL's network reads them."""
    conditioners = TextConditioner(6, 4, pooled=5), SizeConditioner(2), MaskConditioner(3)
    assert all(isinstance(each, Conditioner) for each in conditioners)
    given = joined([each.example((4, 4)) for each in conditioners])
    assert given.vector.shape == (1, 5 + 12) and given.concat.shape == (1, 4, 4, 4)
    np.testing.assert_array_equal(given.vector[0, :5], 0)
    np.testing.assert_array_equal(given.vector[0, 5:7], [1, 0])  # the sines of 0


@pytest.fixture(scope="module")
def latent():
    """A model, its autoencoder, and a batch of images."""
    config = AutoencoderConfig(channels=(8, 8), blocks=1, latent_channels=2, norm_groups=4)
    trained = TrainedAutoencoder(config, nets.init(config, jax.random.key(0)), scale=0.5, side=16)
    one_level = {"multipliers": (1,), "blocks": (1,), "transformer_layers": (1,), "heads": (1,), "cross_only": (False,)}
    unet = LatentUNetConfig(channels=8, norm_groups=4, **one_level)
    model = DiffusionModel(unet, 8, LatentSpec(4, 8), (TextConditioner(6, 4),), SCHEDULE, prediction=Prediction.V)
    model = on_autoencoder(model, trained)
    assert model.product == LatentSpec(2, 2)
    image = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype("f4")
    batch = {"image": jnp.asarray(image)} | {name: jnp.asarray(texts(3)[name]) for name in ("text", "text_mask")}
    return model, trained, batch


def test_images_and_stored_latents_have_the_same_loss(latent):
    model, trained, batch = latent
    training = LatentTraining(model, trained.config, trained.scale)
    assert training.side == 16 and training.batch_spec(3, 16)["image"].shape == (3, 16, 16, 3)
    params, extra = jax.jit(training.init)(jax.random.key(1))
    # Zero layers at the end would hide everything.
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    stored = batch | {"image": trained.encode(batch["image"])}
    step = jnp.int32(0)

    @jax.jit
    def both(params, frozen, key):
        computed = lambda p, f: training.loss(p, extra, f, batch, key, step)[0]  # noqa: E731
        plain = lambda p: model.loss(p, extra, (), stored, key, step)[0]  # noqa: E731
        return jax.value_and_grad(computed, (0, 1))(params, frozen), jax.value_and_grad(plain)(params)

    (loss, (grad, to_frozen)), (wanted, wanted_grad) = both(params, trained.params, jax.random.key(2))
    assert loss > 0.1
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for name, leaf in trees.flatten(wanted_grad).items():
        np.testing.assert_allclose(trees.flatten(grad)[name], leaf, atol=1e-4 * np.abs(leaf).max() + 1e-7, err_msg=name)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(to_frozen))
    with pytest.raises(ValueError, match="one of latents of 4 channels, the autoencoder gives latents of 2"):
        LatentTraining(DiffusionModel(model.unet, 8, LatentSpec(4, 2), model.conditioners), trained.config, 1.0)


class Pictures:
    """A source of images of one shade each, as PNG bytes."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (int(index), 0, 0)).save(file, "PNG")
        return {"image": file.getvalue(), "caption": f"shade {index}", "name": str(index)}


def test_stored_latents(latent, tmp_path):
    """Each at the place of its image, whatever the order; computed once; a batch has them instead of its image."""
    _, trained, _ = latent
    calls = []

    def encode(image):
        calls.append(len(image))
        return encoded(trained.config, trained.scale, trained.params, jnp.asarray(image))

    source = Pictures(70)
    latents = stored_latents(source, 16, encode, tmp_path, "an encoder")
    assert latents.shape == (70, 8, 8, 2) and latents.dtype == np.float16 and calls == [64, 64]
    shade = np.zeros((1, 16, 16, 3), "f4") - 1
    shade[..., 0] = 69 / 127.5 - 1
    np.testing.assert_allclose(latents[69], trained.encode(jnp.asarray(shade))[0], atol=2e-3)
    again = stored_latents(source, 16, encode, tmp_path, "an encoder")
    np.testing.assert_array_equal(again, latents)
    assert calls == [64, 64]
    stored_latents(source, 16, encode, tmp_path, "another encoder")
    assert len(calls) == 4

    class Stream:
        skipped, buckets, varying_shapes, get_state, set_state = None, None, None, dict, dict

        def __next__(self):
            return {
                "image": np.zeros((2, 16, 16, 3)),
                "index": np.array([5, 1]),
                "caption": ["", ""],
                "text": np.ones(2),
            }

    batch = next(LatentBatches(Stream(), latents))
    assert batch.keys() == {"image", "text"}
    np.testing.assert_array_equal(batch["image"], latents[[5, 1]].astype("f4"))

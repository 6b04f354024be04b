"""Kandinsky's autoencoder, MoVQ: the same numbers and names as diffusers'; its norms read the code."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unclip

from jaxdiff.core import trees
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_tiles import SeamlessTiles
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, KLBottleneck, Part
from jaxdiff.weights import autoencoder, hub


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movq")
    outputs = small_unclip.write("movq", folder)
    return *autoencoder.load(folder), outputs


def box_of(settings, params, **change):
    return TrainedAutoencoder(settings.config, params, 1.0, side=32, quantized=False, **change)


def last(images):
    return jnp.asarray(np.moveaxis(images, 1, -1))


def check(ours, theirs, what):
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"{what} {error:.1e}")
    assert ours.shape == theirs.shape and error < 5e-4


def test_same_numbers(loaded):
    """Codes are decoded as they are, without the nearest entry of the codebook."""
    settings, params, wanted = loaded
    given, box = small_unclip.inputs("movq"), box_of(settings, params)
    assert settings.config.spatial_norm
    check(box.decoded(last(given["code"])), np.moveaxis(wanted["0"], 1, -1), "image")
    check(box.encode(last(given["image"])), np.moveaxis(wanted["1"], 1, -1), "codes")
    image = box.decode(last(given["code"]), SampleRequest(jax.random.split(jax.random.key(0), 2), (32, 16)))
    np.testing.assert_array_equal(image, jnp.clip(box.decoded(last(given["code"])), -1, 1))
    nearest = replace(box, quantized=True).decoded(last(given["code"]))
    assert np.abs(nearest - box.decoded(last(given["code"]))).max() > 1e-2


def test_the_kept_numbers_are_diffusers():
    small_unclip.check_kept("movq")


def test_public_names_and_shapes(tmp_path):
    """Of Kandinsky 2.2's: nothing left over on either side, and its settings come back."""
    model = small_unclip.public("movq")
    values = json.loads(model.to_json_string())
    settings = autoencoder.from_values(values, tmp_path / "config.json")
    shapes = jax.eval_shape(lambda: nets.init(settings.config, jax.random.key(0)))
    named = autoencoder.key_map(shapes)
    ours = {named[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    assert ours == small_unclip.shapes_of(model)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6:.2f} M, {len(ours)} tensors")
    written = autoencoder._hub_config(settings)
    assert {key: written[key] for key in values if key[0] != "_"} == {
        key: value for key, value in values.items() if key[0] != "_"
    }


def test_written_and_read(loaded, tmp_path):
    settings, params, _ = loaded
    autoencoder.export(settings, params, tmp_path)
    again, same = autoencoder.load(tmp_path)
    assert again == settings
    jax.tree.map(np.testing.assert_array_equal, same, params)
    torch, diffusers = small_unclip.torch_and_diffusers()
    state = diffusers.VQModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small_unclip.theirs("movq").state_dict().items())


def test_large_images(loaded):
    """In tiles that overlap each tile is normalized by its own codes; seamless tiles and parts are refused."""
    settings, params, _ = loaded
    code = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.float32)
    image = box_of(settings, params, tiles=Tiles(32, 16)).decoded(code)
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    with pytest.raises(ValueError, match="spatial_norm does not run in seamless tiles"):
        box_of(settings, params, tiles=SeamlessTiles(1024))
    with pytest.raises(ValueError, match="does not run in parts"):
        settings.config.module().apply({"params": params}, code, Part.COARSE, method="decode")


def test_what_diffusers_cannot_express(loaded):
    settings, _, _ = loaded
    for change, message in (
        ({"norm_groups": 16}, "spatial_norm has no norm_groups = 16"),
        ({"bottleneck": KLBottleneck()}, "AutoencoderKL has no spatial_norm"),
    ):
        with pytest.raises(ValueError, match=message):
            autoencoder._hub_config(settings._replace(config=replace(settings.config, **change)))
    values = autoencoder._hub_config(settings)
    with pytest.raises(ValueError, match=r"norm_num_groups = 16 .* only 32"):
        autoencoder.from_values(values | {"norm_num_groups": 16}, small_unclip.FIXTURE)
    with pytest.raises(ValueError, match="norm_type = 'layer'"):
        autoencoder.from_values(values | {"norm_type": "layer"}, small_unclip.FIXTURE)
    assert not AutoencoderConfig().spatial_norm

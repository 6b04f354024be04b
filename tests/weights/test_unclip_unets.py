"""unCLIP's decoders and upsamplers in diffusers' layout: the same numbers, names and settings."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unclip

from jaxdiff.core import trees
from jaxdiff.nets.conditioning import Conditioning, MaskedText
from jaxdiff.nets.experts import ExpertsConfig
from jaxdiff.nets.image_readers import ImageContext
from jaxdiff.systems import karlo
from jaxdiff.weights import hub, unclip_unet
from jaxdiff.weights.unclip_unet import Folders

KINDS = {
    "decoder": ("decoder", "projection"),
    "upsampler": ("upsampler",),
    "image decoder": ("image decoder",),
}
every = pytest.mark.parametrize("kind", KINDS)


def load(kind, directory, dtype="float32"):
    folders = Folders(*(directory / name for name in KINDS[kind]))
    if kind == "upsampler":
        return unclip_unet.load_upsampler(folders.unet, dtype)
    return unclip_unet.load_decoder(folders, dtype)


def written(kind, directory):
    """The network and its parameters, of folders from the kept file, and diffusers' outputs."""
    outputs = [small_unclip.write(name, directory / name) for name in KINDS[kind]]
    return *load(kind, directory), outputs


@partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    return module.apply({"params": params}, *inputs)


def check(ours, theirs, what):
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"{what} {error:.1e}")
    assert ours.shape == theirs.shape and error < 5e-4


def last(images):
    return np.moveaxis(images, 1, -1)


def test_projection(tmp_path):
    """Karlo's layers before the decoder, with and without an image; the caption's vector is the U-Net's own layer."""
    network, params, (_, wanted) = written("decoder", tmp_path)
    given = small_unclip.inputs("projection")
    image, known = np.concatenate([given["image_embeddings"]] * 2), np.arange(4) >= 2
    mask = np.ones((4, small_unclip.LENGTH), bool)
    module = ImageContext(24, 4, network.unet.conditioning.width)
    read = apply(module, params["text"], given["text_encoder_hidden_states"], mask, image, known)
    check(read.tokens, wanted["0"], "tokens")
    caption = given["prompt_embeds"] @ params["vector"]["kernel"] + params["vector"]["bias"]
    check(read.vector + caption, wanted["1"], "vector")
    assert read.mask.shape == (4, 11) and read.mask.all()
    assert np.abs(wanted["0"][0, :4] - wanted["0"][2, :4]).max() > 0.1 and np.ptp(wanted["1"]) > 1.0


def test_decoder(tmp_path):
    """The U-Net with tokens and a vector that are given; the reader is taken out."""
    network, params, (wanted, _) = written("decoder", tmp_path)
    given = small_unclip.inputs("decoder")
    plain = replace(network.unet, conditioning=replace(network.unet.conditioning, text=None))
    # The vector is added as it is: by a layer that changes nothing.
    params = {name: value for name, value in params.items() if name != "text"}
    params["vector"] = {"kernel": jnp.eye(128), "bias": jnp.zeros(128)}
    conditioning = Conditioning(given["encoder_hidden_states"], given["attention_mask"], given["class_labels"])
    found = apply(plain.module(), params, last(given["sample"]), given["timestep"].astype("f4"), conditioning)
    check(found, last(wanted["0"]), "decoder")
    other = conditioning._replace(token_mask=jnp.ones((2, 11), bool))
    changed = apply(plain.module(), params, last(given["sample"]), given["timestep"].astype("f4"), other)
    assert np.abs(changed[1] - found[1]).max() > 1e-3 and np.abs(changed[0] - found[0]).max() < 1e-5


def test_upsampler(tmp_path):
    network, params, (wanted,) = written("upsampler", tmp_path)
    given = small_unclip.inputs("upsampler")
    x, low = np.split(last(given["sample"]), 2, axis=-1)
    found = apply(network.unet.module(), params, x, given["timestep"].astype("f4"), Conditioning(concat=low))
    check(found, last(wanted["0"]), "upsampler")


def test_image_decoder(tmp_path):
    network, params, (wanted,) = written("image decoder", tmp_path)
    given = small_unclip.inputs("image decoder")
    conditioning = Conditioning(given["image_embeds"][:, None], jnp.ones((2, 1), bool))
    time = given["timestep"].astype("f4")
    found = apply(network.unet.module(), params, last(given["sample"]), time, conditioning)
    check(found, last(wanted["0"]), "image decoder")


@pytest.mark.parametrize("name", [name for names in KINDS.values() for name in names])
def test_the_kept_numbers_are_diffusers(name):
    small_unclip.check_kept(name)


MILLIONS = {"decoder": 900, "upsampler": 700, "image decoder": 1250}
"""As published: 0.9 B, 0.7 B; Kandinsky's file has 5.01 GB of float32."""


@every
def test_public_names_and_shapes(kind, tmp_path):
    """Of the whole public network: nothing left over on either side, and its settings come back."""
    models = [small_unclip.public(name) for name in KINDS[kind]]
    values = [json.loads(model.to_json_string()) for model in models]
    path = tmp_path / "config.json"
    if kind == "decoder":
        network = unclip_unet.read_decoder(*((each, path) for each in values))
    else:
        read = unclip_unet.read_upsampler if kind == "upsampler" else unclip_unet.read_image_decoder
        network = read(values[0], path)
    shapes = unclip_unet.shapes_of(network)
    for model, part in zip(models, unclip_unet._parts(network, shapes)):
        named = unclip_unet.key_map(network, part)
        ours = {named[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in trees.flatten(part).items()}
        assert ours == small_unclip.shapes_of(model)
    millions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    print(f"{kind} {millions:.2f} M, {len(jax.tree.leaves(shapes))} tensors")
    assert abs(millions / MILLIONS[kind] - 1) < 0.1
    for written, given in zip(unclip_unet.hub_configs(network), values):
        for key in given.keys() - {"_diffusers_version", "sample_size", "attention_head_dim"}:
            assert written[key] == given[key], key
    assert network.unet == {"decoder": karlo.DECODER.unet, "upsampler": karlo.UPSAMPLER_FIRST}.get(kind, network.unet)


@every
def test_written_and_read(kind, tmp_path):
    """Bit by bit, settings too; in either type."""
    network, params, _ = written(kind, tmp_path / "a")
    unclip_unet.export_unet(network, params, Folders(*(tmp_path / "b" / name for name in KINDS[kind])))
    again, same = load(kind, tmp_path / "b")
    assert again == network
    jax.tree.map(np.testing.assert_array_equal, same, params)
    half, low = load(kind, tmp_path / "b", "bfloat16")
    assert half.unet.execution.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    for name in KINDS[kind]:
        torch, _ = small_unclip.torch_and_diffusers()
        model = small_unclip.class_of(name).from_pretrained(tmp_path / "b" / name)
        for key, value in small_unclip.theirs(name).state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("decoder", "decoder", {"_class_name": "UNet2DModel"}, "_class_name = 'UNet2DModel'"),
        ("decoder", "decoder", {"unheard_of": 1}, "unknown settings of UNet2DConditionModel: unheard_of"),
        ("decoder", "decoder", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep' .* 'identity'"),
        ("decoder", "decoder", {"out_channels": 5}, "out_channels = 5 .* 6 or 3"),
        ("decoder", "decoder", {"cross_attention_norm": "group_norm"}, "cross_attention_norm"),
        ("decoder", "decoder", {"attention_head_dim": 24}, "attention_head_dim = 24 .* a divisor of 64"),
        ("decoder", "decoder", {"block_out_channels": [32, 48, 96, 128]}, "block_out_channels .* multiples"),
        ("decoder", "decoder", {"layers_per_block": 1}, r"does not fit the settings: \d+ unexpected"),
        ("decoder", "projection", {"time_embed_dim": 64}, "time_embed_dim = 64 is not supported, only 128"),
        ("decoder", "projection", {"cross_attention_dim": 25}, "cross_attention_dim = 25 .* only 24"),
        ("decoder", "projection", {"clip_extra_context_tokens": 0}, "clip_extra_context_tokens = 0"),
        ("decoder", "projection", {"clip_embeddings_dim": 13}, "of another shape"),
        ("upsampler", "upsampler", {"add_attention": True}, "add_attention = True"),
        ("upsampler", "upsampler", {"in_channels": 3}, "in_channels = 3 .* only 6"),
        ("upsampler", "upsampler", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ("upsampler", "upsampler", {"resnet_time_scale_shift": "scale_shift"}, "of another shape"),
        ("image decoder", "image decoder", {"addition_embed_type": "image_hint"}, "addition_embed_type"),
        ("image decoder", "image decoder", {"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type"),
    ],
)
def test_refused_folders(kind, name, change, message, tmp_path):
    for each in KINDS[kind]:
        small_unclip.write(each, tmp_path / each)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load(kind, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_diffusers_cannot_express(tmp_path):
    network, params, _ = written("upsampler", tmp_path / "a")
    experts = ExpertsConfig(**{name: getattr(network.unet, name) for name in network.unet.__dataclass_fields__})
    for unet, message in (
        (replace(network.unet, coordinates=True), "UNet2DModel of unCLIP has no coordinates = True"),
        (replace(network.unet, residual_scale=0.5), "no residual_scale = 0.5"),
        (experts, "no unet = ExpertsConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            unclip_unet.export_unet(network._replace(unet=unet), params, Folders(tmp_path / "b"))
    decoder, _, _ = written("decoder", tmp_path / "c")
    text = replace(decoder.unet.conditioning, text=MaskedText(24))
    for unet, message in (
        (replace(decoder.unet, conditioning=text), "have no conditioning.text = MaskedText"),
        (replace(decoder.unet, attention=replace(decoder.unet.attention, normalize_text=True)), "normalize_text"),
        (replace(decoder.unet, scale_shift=False), "no scale_shift = False"),
    ):
        with pytest.raises(ValueError, match=message):
            unclip_unet.hub_configs(decoder._replace(unet=unet))
    with pytest.raises(ValueError, match="the U-Net to export does not fit"):
        unclip_unet.export_unet(decoder, params, Folders(tmp_path / "b", tmp_path / "d"))
    assert not (tmp_path / "b").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no decoder at"):
        unclip_unet.load_decoder(Folders(tmp_path / "decoder", tmp_path / "projection"))
    small_unclip.write("decoder", tmp_path / "decoder")
    with pytest.raises(FileNotFoundError, match="no projections at"):
        unclip_unet.load_decoder(Folders(tmp_path / "decoder", tmp_path / "projection"))
    with pytest.raises(FileNotFoundError, match="no upsampler at"):
        unclip_unet.load_upsampler(tmp_path)

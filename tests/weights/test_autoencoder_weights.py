"""Autoencoders in diffusers' layout: nothing is lost on the way, and diffusers computes the same."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small
from safetensors.numpy import load_file, save_file

from jaxdiff.core import trees
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.weights import autoencoder, hub, sizes

FILE = autoencoder.FILE
every = pytest.mark.parametrize("name", small.NETWORKS)


@cache
def settings_of(name):
    return autoencoder.Settings(small.NETWORKS[name], 0.13025, name == "KL f8", 64)


@cache
def params_of(name):
    return small.random_params(small.NETWORKS[name], 3)


def export(name, directory, dtype="float32"):
    autoencoder.export(settings_of(name), params_of(name), directory, dtype)


def assert_equal(params, wanted, bound=0.0):
    params, wanted = trees.flatten(params), trees.flatten(wanted)
    assert params.keys() == wanted.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=bound, atol=bound * 1e-2, err_msg=name)


@every
def test_written_and_read(name, tmp_path):
    """Bit by bit, settings too; in either compute type, and from half precision."""
    export(name, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", FILE}
    settings, params = autoencoder.load(tmp_path)
    assert settings == settings_of(name)
    assert_equal(params, params_of(name))
    settings, params = autoencoder.load(tmp_path, "bfloat16")
    assert settings.config == replace(small.NETWORKS[name], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
    export(name, tmp_path, "float16")
    assert_equal(autoencoder.load(tmp_path)[1], params_of(name), 2**-10)


@pytest.mark.parametrize("name", ["KL f8", "VQ f8"])
def test_older_names_of_attention(name, tmp_path):
    """Files of both generations, but not a mixture."""
    export(name, tmp_path)
    tensors = load_file(tmp_path / FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in tensors.items():
        for new, older in old.items():
            key = key.replace(f".{new}.", f".{older}.")
        renamed[key] = tensor
    assert len(renamed.keys() - tensors.keys()) == 8 * (2 if name == "KL f8" else 7)
    save_file(renamed, tmp_path / FILE)
    assert_equal(autoencoder.load(tmp_path)[1], params_of(name))
    twice = "decoder.mid_block.attentions.0.query.weight"
    save_file(tensors | {twice: renamed[twice]}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"does not fit the settings: 1 unexpected \({twice}\)"):
        autoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("KL f8", {"shift_factor": 0.1}, "shift_factor = 0.1 is not supported, only None"),
        ("KL f8", {"latents_mean": [0.0]}, r"latents_mean = \[0.0\] is not supported"),
        ("KL f8", {"latents_std": [1.0]}, r"latents_std = \[1.0\] is not supported"),
        ("KL f8", {"act_fn": "relu"}, "act_fn = 'relu' is not supported, only 'silu'"),
        ("KL f8", {"_class_name": "AutoencoderTiny"}, "_class_name = 'AutoencoderTiny' is not supported"),
        ("KL f8", {"temperature": 1}, "unknown settings of AutoencoderKL: temperature"),
        ("KL f8", {"num_vq_embeddings": 4}, "unknown settings of AutoencoderKL: num_vq_embeddings"),
        ("KL f8", {"out_channels": 4}, "out_channels = 4 is not supported, only 3"),
        ("KL f8", {"block_out_channels": [8, 6, 16, 16]}, "block_out_channels = .* only multiples of norm_num_groups"),
        ("KL f8", {"block_out_channels": []}, "block_out_channels"),
        ("KL f8", {"block_out_channels": 8}, "block_out_channels"),
        ("KL f8", {"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types"),
        ("KL f8", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ("KL f8", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("KL f8", {"scaling_factor": True}, "scaling_factor = True"),
        ("KL f8", {"sample_size": [64, 32]}, "sample_size"),
        ("KL f8", {"use_quant_conv": 1}, "use_quant_conv = 1"),
        ("KL f8", {"layers_per_block": 10**6}, "layers_per_block"),
        ("VQ f8", {"norm_type": "layer"}, "norm_type = 'layer' is not supported, only 'group' or 'spatial'"),
        ("VQ f8", {"lookup_from_codebook": True}, "lookup_from_codebook = True"),
        ("VQ f8", {"up_block_types": ["UpDecoderBlock2D"] * 4}, "up_block_types = .* only those that mirror"),
        ("VQ f8", {"vq_embed_dim": 0}, "vq_embed_dim = 0"),
        ("VQ f8", {"shift_factor": None}, "unknown settings of VQModel: shift_factor"),
    ],
)
def test_settings_that_are_refused(name, changes, message, tmp_path):
    values = autoencoder.described(settings_of(name), params_of(name)) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as refused:
        autoencoder.read_config(tmp_path / "config.json")
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_missing_settings_are_those_of_diffusers(tmp_path):
    """A file with nothing else has the class's own defaults; nulls are the same."""
    empty = autoencoder.from_values({"_class_name": "AutoencoderKL", "sample_size": None}, tmp_path)
    assert empty == autoencoder.Settings(AutoencoderConfig((64,), 1), 0.18215, True, 32)
    empty = autoencoder.from_values({"_class_name": "VQModel", "sample_size": [48, 48]}, tmp_path)
    wanted = AutoencoderConfig((64,), 1, latent_channels=3, bottleneck=VQBottleneck(256, 3))
    assert empty == autoencoder.Settings(wanted, 0.18215, False, 48)


@pytest.mark.parametrize("changes", [{"norm_groups": 0}, {"norm_groups": 2, "local_encoder": True}])
def test_settings_of_ours_alone(changes, tmp_path):
    config = AutoencoderConfig((6, 10), 1, 3, bottleneck=VQBottleneck(9, 3), **changes)
    params = small.random_params(config)
    autoencoder.export(autoencoder.Settings(config), params, tmp_path)
    settings, read = autoencoder.load(tmp_path)
    assert settings.config == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    with pytest.raises(ValueError, match=r"no layer norm: norm_groups = 0|no local_encoder = True"):
        autoencoder.check_public(config)


def test_what_cannot_be_exported(tmp_path):
    """Refused before anything is written."""
    with pytest.raises(ValueError, match=r"the autoencoder to export does not fit the settings: \d+ missing"):
        autoencoder.export(settings_of("KL f8"), params_of("KL f4"), tmp_path)
    config = AutoencoderConfig((8,), 1, 3, norm_groups=4, bottleneck=VQBottleneck(9, 3), quant_conv=False)
    with pytest.raises(ValueError, match="VQModel has both 1×1 convolutions"):
        autoencoder.export(autoencoder.Settings(config), small.random_params(config), tmp_path)
    assert not list(tmp_path.iterdir())


# Beside diffusers


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("diffusers", reason="the independent autoencoder is diffusers'")
    return pytest.importorskip("torch", reason="diffusers' autoencoders are PyTorch's")


@partial(jax.jit, static_argnums=0)
def run(config, params, image):
    """The encoder's output and the image of its mean, or of its nearest codes."""
    module, network = config.module(), {"params": params}
    output = module.apply(network, image, method="encode")
    if "codebook" not in params:
        return output, None, module.apply(network, nets.gaussian(output).mean, method="decode")
    code, indices = nets.quantize(output, params["codebook"])
    return output, indices, module.apply(network, code, method="decode")


def assert_same(config, params, model, torch):
    """Of a random image that is not square."""
    image = small.image(32, 48)
    with torch.no_grad():
        theirs = torch.tensor(image).permute(0, 3, 1, 2)
        if "codebook" in params:
            encoded = model.encode(theirs).latents
            indices = model.quantize(encoded)[2][2].reshape(2, *encoded.shape[2:]).numpy()
            decoded = model.decode(encoded).sample
        else:
            distribution, indices = model.encode(theirs).latent_dist, None
            encoded, decoded = distribution.parameters, model.decode(distribution.mode()).sample
            logvar = distribution.logvar
    ours = run(config, params, image)
    for mine, other in ((ours[0], encoded), (ours[2], decoded)):
        other = other.permute(0, 2, 3, 1).numpy()
        assert mine.shape == other.shape and np.abs(other).max() > 0.1
        error = np.abs(mine - other).max() / np.abs(other).max()
        print(f"{error:.1e}")
        assert error < 5e-4
    if indices is not None:
        np.testing.assert_array_equal(ours[1], indices)
        assert len(np.unique(indices)) > 5
    else:
        clipped = nets.gaussian(50.0 * ours[0]).logvar  # far beyond both limits
        limited = torch.clamp(50.0 * torch.chunk(encoded, 2, dim=1)[1], -30.0, 20.0).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(clipped, limited, atol=0.05)
        assert (limited == -30).any() and (limited == 20).any()
        np.testing.assert_allclose(nets.gaussian(ours[0]).logvar, logvar.permute(0, 2, 3, 1), atol=1e-3)


@every
def test_diffusers_opens_what_is_exported(name, torch, tmp_path):
    import diffusers

    export(name, tmp_path)
    kind = getattr(diffusers, "VQModel" if name.startswith("VQ") else "AutoencoderKL")
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert dict(model.config)["scaling_factor"] == 0.13025 and model.config.sample_size == 64
    assert_same(small.NETWORKS[name], params_of(name), model.eval(), torch)


@pytest.mark.parametrize("name", ["KL f4", "VQ f8"])
def test_what_diffusers_saves(name, torch, tmp_path):
    """Its own initial parameters and settings."""
    torch.manual_seed(0)
    model = small.diffusers_model(small.NETWORKS[name], sample_size=128, scaling_factor=0.5, force_upcast=False)
    model.save_pretrained(tmp_path)
    settings, params = autoencoder.load(tmp_path)
    assert settings == autoencoder.Settings(small.NETWORKS[name], 0.5, False, 128)
    assert set(hub.open_tensors(tmp_path)) == set(autoencoder.key_map(params).values())
    model.save_pretrained(tmp_path, variant="fp16")
    assert_equal(autoencoder.load(tmp_path, variant="fp16")[1], params)


def test_without_convolutions_and_attention(torch, tmp_path):
    """Other settings of the public class: no 1×1 convolutions, no attention, one level, grey images."""
    config = AutoencoderConfig(
        (8, 12),
        1,
        2,
        image_channels=1,
        norm_groups=2,
        quant_conv=False,
        post_quant_conv=False,
        middle_attention=False,
    )
    params = small.random_params(config)
    autoencoder.export(autoencoder.Settings(config), params, tmp_path)
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(tmp_path).eval()
    image = small.image(8, 10)[..., :1]
    with torch.no_grad():
        moments = model.encode(torch.tensor(image).permute(0, 3, 1, 2)).latent_dist.parameters
    np.testing.assert_allclose(run(config, params, image)[0], moments.permute(0, 2, 3, 1), atol=1e-4)
    assert autoencoder.load(tmp_path)[0] == autoencoder.Settings(config)


PUBLISHED = {
    "SD 1": AutoencoderConfig(),
    "x4 upscaler": AutoencoderConfig((128, 256, 512)),
    "LDM VQ f4": AutoencoderConfig((128, 256, 512), latent_channels=3, bottleneck=VQBottleneck(8192, 3)),
    "LDM VQ f8": AutoencoderConfig((128, 256, 256, 512), attention_levels=(3,), bottleneck=VQBottleneck(16384, 4)),
}
PARAMETERS = {"SD 1": 83_653_863, "LDM VQ f4": 55_322_782}


@pytest.mark.parametrize("name", ["SD 1", "x4 upscaler", "LDM VQ f4", "LDM VQ f8"])
def test_published_sizes(name, torch):
    """Names and shapes of all parameters, without their memory."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = small.diffusers_model(config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = sizes.shapes_of(autoencoder._init, config)
    named, leaves = autoencoder.key_map(shapes), trees.flatten(shapes)
    assert {named[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in leaves.items()} == wanted
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    assert count == PARAMETERS.get(name, count)

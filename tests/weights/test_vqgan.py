"""VQGAN in Flax's layout: against PyTorch's layers with taming-transformers' names, files, the published network."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder
from flax import serialization

from jaxdiff.core.trees import flatten
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, KLBottleneck, VQBottleneck
from jaxdiff.weights import dalle, flax_files, vqgan

CONFIG = AutoencoderConfig(
    channels=(32, 32, 64), blocks=1, latent_channels=8, bottleneck=VQBottleneck(20, 6), attention_levels=(2,)
)
TRAINED = TrainedAutoencoder(CONFIG, small_autoencoder.random_params(CONFIG), 1.0, side=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    vqgan.export(TRAINED, folder)
    return folder


class Taming:
    """The network of the paper's code by its description, with PyTorch's functions, from the tensors of a file."""

    def __init__(self, torch, path, levels, blocks, attended):
        tensors = flatten(serialization.msgpack_restore(path.read_bytes()))
        self.weights = {name: torch.tensor(np.asarray(array, np.float64)) for name, array in tensors.items()}
        self.torch, self.functions = torch, torch.nn.functional
        self.levels, self.blocks, self.attended, self.read = levels, blocks, attended, set()

    def get(self, name):
        self.read.add(name)
        return self.weights[name]

    def conv(self, x, name, **options):
        kernel = self.get(f"{name}/kernel").permute(3, 2, 0, 1)
        return self.functions.conv2d(x, kernel, self.get(f"{name}/bias"), **options)

    def norm(self, x, name):
        return self.functions.group_norm(x, 32, self.get(f"{name}/scale"), self.get(f"{name}/bias"), 1e-6)

    def block(self, x, name):
        y = self.conv(self.functions.silu(self.norm(x, f"{name}/norm1")), f"{name}/conv1", padding=1)
        y = self.conv(self.functions.silu(self.norm(y, f"{name}/norm2")), f"{name}/conv2", padding=1)
        return y + (x if x.shape == y.shape else self.conv(x, f"{name}/nin_shortcut"))

    def attention(self, x, name):
        y = self.norm(x, f"{name}/norm")
        q, k, v = (self.conv(y, f"{name}/{letter}").flatten(2) for letter in "qkv")
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv((v @ weights.mT).reshape(x.shape), f"{name}/proj_out")

    def level(self, x, name, count, level):
        for i in range(count):
            x = self.block(x, f"{name}/block_{i}")
            x = self.attention(x, f"{name}/attn_{i}") if level in self.attended else x
        return x

    def middle(self, x, half):
        x = self.attention(self.block(x, f"{half}/mid/block_1"), f"{half}/mid/attn_1")
        return self.block(x, f"{half}/mid/block_2")

    def end(self, x, half):
        return self.conv(self.functions.silu(self.norm(x, f"{half}/norm_out")), f"{half}/conv_out", padding=1)

    def encode(self, image):
        x = self.conv(self.torch.tensor(image).double().permute(0, 3, 1, 2), "encoder/conv_in", padding=1)
        for level in range(self.levels):
            x = self.level(x, f"encoder/down_{level}", self.blocks, level)
            if level < self.levels - 1:
                padded = self.functions.pad(x, (0, 1, 0, 1))
                x = self.conv(padded, f"encoder/down_{level}/downsample/conv", stride=2)
        x = self.conv(self.end(self.middle(x, "encoder"), "encoder"), "quant_conv")
        return x.permute(0, 2, 3, 1).numpy()

    def decode(self, codes):
        x = self.get("quantize/embedding/embedding")[self.torch.tensor(codes)].permute(0, 3, 1, 2)
        x = self.middle(self.conv(self.conv(x, "post_quant_conv"), "decoder/conv_in", padding=1), "decoder")
        for level in reversed(range(self.levels)):
            x = self.level(x, f"decoder/up_{level}", self.blocks + 1, level)
            if level:
                x = self.functions.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(x, f"decoder/up_{level}/upsample/conv", padding=1)
        return self.end(x, "decoder").permute(0, 2, 3, 1).numpy()


def test_parity(folder):
    torch = pytest.importorskip("torch", reason="compared with PyTorch's layers")
    reference = Taming(torch, folder / flax_files.FILE, 3, 1, (2,))
    image = small_autoencoder.image(16, 24)
    wanted = reference.encode(image)
    trained = vqgan.load(folder)
    latents = trained.encode(jnp.asarray(image))
    codes = np.random.default_rng(0).integers(0, 20, (2, 4, 6))
    decoded, again = VQCodes(trained).decoded(jnp.asarray(codes)), reference.decode(codes)
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in ((latents, wanted), (decoded, again))]
    print("largest errors relative to the largest value: " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors) < 1e-4
    assert reference.read == reference.weights.keys()  # nothing is left over
    near = ((wanted[..., None, :] - np.asarray(trained.params["codebook"])) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(VQCodes(trained).encode(jnp.asarray(image)), near)


def test_round_trip(folder, tmp_path):
    trained = dalle.load_decoder(folder)
    assert isinstance(trained, VQCodes) and trained.autoencoder.config == CONFIG and trained.side == 16
    jax.tree.map(np.testing.assert_array_equal, trained.autoencoder.params, TRAINED.params)
    vqgan.export(trained.autoencoder, tmp_path, "float16")
    half = vqgan.load(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), half.params, TRAINED.params)
    assert half.params["codebook"].dtype == jnp.float32
    codes = jnp.zeros((1, 4, 4), int)
    image = VQCodes(half).decode(codes, SampleRequest(jax.random.split(jax.random.key(0), 1), (16, 16), None))
    assert image.shape == (1, 16, 16, 3) and vqgan.load(folder, "bfloat16").config.dtype == "bfloat16"


def published():
    """Names and shapes of vqgan_imagenet_f16_16384: width 128·[1, 1, 2, 2, 4], attention at 16."""
    shapes = {"quantize/embedding/embedding": (16384, 256)}

    def conv(name, i, o, side=3):
        shapes.update({f"{name}/kernel": (side, side, i, o), f"{name}/bias": (o,)})

    def norm(name, width):
        shapes.update({f"{name}/scale": (width,), f"{name}/bias": (width,)})

    def block(name, i, o):
        norm(f"{name}/norm1", i), conv(f"{name}/conv1", i, o), norm(f"{name}/norm2", o), conv(f"{name}/conv2", o, o)
        if i != o:
            conv(f"{name}/nin_shortcut", i, o, 1)

    def attention(name):
        norm(f"{name}/norm", 512)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{name}/{layer}", 512, 512, 1)

    widths = [128, 128, 256, 256, 512]
    conv("quant_conv", 256, 256, 1), conv("post_quant_conv", 256, 256, 1)
    conv("encoder/conv_in", 3, 128), conv("encoder/conv_out", 512, 256), norm("encoder/norm_out", 512)
    conv("decoder/conv_in", 256, 512), conv("decoder/conv_out", 128, 3), norm("decoder/norm_out", 128)
    for half in ("encoder", "decoder"):
        block(f"{half}/mid/block_1", 512, 512), block(f"{half}/mid/block_2", 512, 512), attention(f"{half}/mid/attn_1")
    for level, width in enumerate(widths):
        for i in range(2):
            block(f"encoder/down_{level}/block_{i}", width if i else widths[max(level - 1, 0)], width)
        for i in range(3):
            block(f"decoder/up_{level}/block_{i}", width if i else widths[min(level + 1, 4)], width)
        if level < 4:
            conv(f"encoder/down_{level}/downsample/conv", width, width)
        if level > 0:
            conv(f"decoder/up_{level}/upsample/conv", width, width)
    for i in range(2):
        attention(f"encoder/down_4/attn_{i}")
    for i in range(3):
        attention(f"decoder/up_4/attn_{i}")
    return shapes


def test_published(tmp_path):
    """Its settings give all names and shapes, and nothing is left over."""
    values = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "n_embed": 16384, "attn_resolutions": [16], "resolution": 256}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, side = vqgan.read_config(tmp_path / "config.json")
    assert config == vqgan.IMAGENET_F16_16384 and side == 256 and config.stride == 16
    shapes = jax.eval_shape(lambda: nets.init(config, jax.random.key(0)))
    named = vqgan.key_map(shapes)
    ours = {named[path]: leaf.shape for path, leaf in flatten(shapes).items()}
    wanted = published()
    assert ours.keys() == wanted.keys()
    different = {name for name, shape in wanted.items() if ours[name] not in (shape, shape[2:])}
    assert not different


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, "double_z = True is not supported"),
        ({"ch": 33}, "ch = 33 is not supported, only a multiple of 32"),
        ({"ch_mult": []}, "ch_mult = "),
        ({"ch_mult": [1, 0]}, "ch_mult = "),
        ({"resolution": 18}, "attn_resolutions"),
        ({"n_embed": 2**30}, "n_embed"),
        ({"out_ch": 4}, "out_ch = 4"),
        ({"embed_dim": 5}, "of another shape"),
        ({"num_res_blocks": 2}, "missing"),
        ({"attn_resolutions": []}, "unexpected"),
    ],
)
def test_refused(change, message, folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    (tmp_path / flax_files.FILE).symlink_to(folder / flax_files.FILE)
    with pytest.raises(ValueError, match=message) as raised:
        vqgan.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_another_network_is_not_written(tmp_path):
    for change, message in (
        ({"bottleneck": KLBottleneck()}, "KL"),
        ({"norm_groups": 16}, "32 groups"),
        ({"middle_attention": False}, "attention in the middle"),
        ({"local_encoder": True}, "no local_encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            vqgan.export(replace(TRAINED, config=replace(CONFIG, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not vqgan.is_vqgan(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        vqgan.load(tmp_path)

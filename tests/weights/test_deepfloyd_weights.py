"""DeepFloyd IF's U-Nets in diffusers' layout: nothing is lost on the way, and diffusers computes the same."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_if
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from small import executed

from jaxdiff.core import trees
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.conditioning import Conditioning, MaskedText, WholeText
from jaxdiff.nets.unet import ConditioningConfig, EfficientUNetConfig, UNetConfig
from jaxdiff.training.mesh import make_mesh
from jaxdiff.weights import deepfloyd, hub

BASE, SR = small_if.NETWORKS
NETWORKS = {
    "stage I": BASE,
    "stage II": SR,
    "other": deepfloyd.Network(
        replace(
            BASE.unet,
            multipliers=(1, 3),
            blocks=(2, 1),
            conditioning=ConditioningConfig(64, WholeText(32, pool_heads=3), frequencies=32),
            learned_variance=False,
            activation=Activation.SILU,
        ),
        text_width=48,
        low_res=False,
    ),
}
every = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
FILE = "diffusion_pytorch_model.safetensors"


@cache
def params_of(network):
    return small_if.random_params(deepfloyd._shapes(network), 3)


def export(network, directory, dtype="float32"):
    """With random parameters."""
    deepfloyd.export_unet(network, params_of(network), directory, dtype)


def assert_equal(found, wanted, bound=0.0):
    found, wanted = trees.flatten(found), trees.flatten(wanted)
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=bound, atol=bound * 1e-2, err_msg=name)


def rewrite(folder, change):
    """config.json, changed."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@every
def test_written_and_read(network, tmp_path):
    """Bit by bit, settings too; in either compute type."""
    export(network, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", FILE}
    found, params = deepfloyd.load_unet(tmp_path)
    assert found == network
    assert_equal(params, params_of(network))
    found, params = deepfloyd.load_unet(tmp_path, "bfloat16")
    assert found == network._replace(unet=executed(network.unet, dtype="bfloat16"))
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(params_of(network))):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, not float16"):
        deepfloyd.load_unet(tmp_path, "float16")


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_files(dtype, bound, tmp_path):
    export(SR, tmp_path, dtype)
    size, count = (tmp_path / FILE).stat().st_size, sum(leaf.size for leaf in jax.tree.leaves(params_of(SR)))
    assert 2 * count < size < 2.3 * count
    _, params = deepfloyd.load_unet(tmp_path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert_equal(params, params_of(SR), bound)


def test_shards_and_variants(tmp_path):
    """Two shards with an index, of the variant fp16; and a whole file of other numbers beside them."""
    export(BASE, tmp_path)
    tensors = load_file(tmp_path / FILE)
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors"
        save_file({name: (2 * tensors[name]).astype("f2") for name in part}, tmp_path / shard)
        index |= dict.fromkeys(part, shard)
    told = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(told)
    twice = jax.tree.map(lambda a: 2 * a, params_of(BASE))
    assert_equal(deepfloyd.load_unet(tmp_path)[1], params_of(BASE))
    assert_equal(deepfloyd.load_unet(tmp_path, variant="fp16")[1], twice, 2**-10)
    with pytest.raises(FileNotFoundError, match="bf16"):
        deepfloyd.load_unet(tmp_path, variant="bf16")
    (tmp_path / FILE).unlink()
    assert_equal(deepfloyd.load_unet(tmp_path)[1], twice, 2**-10)


def test_placed_on_devices(tmp_path):
    """Each tensor by its shape over eight devices; none has all of it."""
    export(SR, tmp_path)
    mesh = make_mesh(fsdp=8)

    def place(array):
        axes = [axis for axis, size in enumerate(array.shape) if size % 8 == 0]
        spec = [None] * array.ndim
        if axes:
            spec[max(axes, key=lambda axis: array.shape[axis])] = "fsdp"
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    _, params = deepfloyd.load_unet(tmp_path, "bfloat16", place=place)
    assert_equal(params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of(SR)))
    leaves = jax.tree.leaves(params)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert on_one < 0.16 * sum(leaf.nbytes for leaf in leaves)


def test_tensors_that_are_none_of_the_network(tmp_path):
    export(BASE, tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["unheard.of"] = tensors.pop("conv_in.weight")
    tensors["conv_out.bias"] = np.zeros(5, "f4")
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError) as refused:
        deepfloyd.load_unet(tmp_path)
    message = str(refused.value)
    assert "\n" not in message and str(tmp_path) in message
    for part in ("1 missing (conv_in.weight)", "1 unexpected (unheard.of)", "conv_out.bias (5,), not (6,)"):
        assert part in message
    # Settings of another size tell of themselves in the same way.
    export(BASE, tmp_path)
    rewrite(tmp_path, lambda values: values.update(layers_per_block=2))
    with pytest.raises(ValueError, match=r"does not fit the settings: \d+ missing \(down_blocks.0.resnets.1"):
        deepfloyd.load_unet(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning": ConditioningConfig(64, MaskedText(32), 32)},
            r"no conditioning.text = MaskedText\(.*: it has to be WholeText",
        ),
        ({"conditioning": ConditioningConfig(64, None, 32)}, "no conditioning.text = None: it has to be WholeText"),
        ({"conditioning": ConditioningConfig(64, WholeText(32, pool=False), 32)}, "no conditioning.text.pool = False"),
        ({"norm_groups": 0}, "no norm_groups = 0: it has to be 32"),
        (
            {"conditioning": ConditioningConfig(64, WholeText(32), 64)},
            "no conditioning.frequencies = 64: .* of channels",
        ),
        ({"attention": {"heads": 2}}, "no attention.heads = 2: it has to be 0"),
        ({"attention": {"feed_forward": 2}}, "no attention.feed_forward = 2: it has to be 0"),
        ({"attention": {"group_text": False}}, "no attention.group_text = False: it has to be True"),
        ({"patch": 2}, "no patch = 2"),
        ({"skip_scale": 0.5}, "no skip_scale = 0.5"),
        ({"coordinates": True}, "no coordinates = True"),
        ({"conditioned_head": True}, "no conditioned_head = True"),
        ({"input_skip": True, "learned_variance": False}, "no input_skip = True"),
        ({"multipliers": (2, 2)}, r"no multipliers = \(2, 2\)"),
        ({"attention": {"self_attention": (True, False)}}, r"no attention.cross_attention = \(False, False\)"),
        ({"attention": {"cross_attention": (True, False)}}, r"no attention.cross_attention = \(True, False\)"),
    ],
)
def test_networks_that_are_not_ifs(changes, message, tmp_path):
    """Refused before anything is written."""
    if isinstance(changes.get("attention"), dict):
        changes = {"attention": replace(BASE.unet.attention, **changes["attention"])}
    with pytest.raises(ValueError, match=message) as refused:
        deepfloyd.export_unet(BASE._replace(unet=replace(BASE.unet, **changes)), params_of(BASE), tmp_path / "unet")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_parameters_of_another_network(tmp_path):
    with pytest.raises(ValueError, match=r"the U-Net to export does not fit the settings: \d+ missing \(aug_level"):
        deepfloyd.export_unet(SR, params_of(BASE), tmp_path / "unet")
    shared = {name: getattr(BASE.unet, name) for name in UNetConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match="no unet = EfficientUNetConfig"):
        deepfloyd.export_unet(BASE._replace(unet=EfficientUNetConfig(**shared)), params_of(BASE), tmp_path / "unet")
    assert not list(tmp_path.iterdir())


# Beside diffusers


@pytest.fixture
def theirs():
    pytest.importorskip("torch", reason="diffusers' U-Net is PyTorch's")
    return pytest.importorskip("diffusers", reason="IF's U-Net is diffusers'").UNet2DConditionModel


@partial(jax.jit, static_argnums=0)
def apply(config, params, x, entry, given):
    return config.module().apply({"params": params}, x, entry, given)


def assert_same(network, params, model):
    """Outputs at two entries, of different texts, sizes and levels of noise."""
    import torch

    rng = np.random.default_rng(5)
    x, low_res = rng.normal(size=(2, 2, 8, 12, 3)).astype("f4")
    text, entry = rng.normal(size=(2, 7, network.text_width)).astype("f4"), np.array([3.0, 977.0], "f4")
    given, labels = Conditioning(text, np.ones((2, 7), bool)), {}
    if network.low_res:
        given = given._replace(concat=low_res, aug_level=np.array([0.25, 0.04], "f4"))
        labels["class_labels"] = torch.tensor([250, 40])
    picture = torch.tensor(np.concatenate([x, low_res], -1) if network.low_res else x).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = model(picture, torch.tensor([3, 977]), torch.tensor(text), **labels).sample
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    found = np.asarray(apply(network.unet, params, x, entry, given))
    assert found.shape == wanted.shape == (2, 8, 12, 6 if network.unet.learned_variance else 3)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"{error:.1e}")
    assert error < 5e-4 and np.abs(wanted[0] - wanted[1]).max() > 0.1 * np.abs(wanted).max()


@every
def test_diffusers_opens_what_is_exported(network, theirs, tmp_path):
    export(network, tmp_path)
    model, told = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert_same(network, params_of(network), model.eval())


@pytest.mark.parametrize("network", [BASE, SR], ids=["stage I", "stage II"])
@pytest.mark.parametrize("shards", [False, True])
def test_what_diffusers_saves(network, shards, theirs, tmp_path):
    """Whole and in shards, and the variant fp16 of the same; its own initial parameters."""
    import torch

    torch.manual_seed(0)
    settings = {name: value for name, value in deepfloyd._hub_config(network).items() if not name.startswith("_")}
    model = theirs(**settings).eval()
    options = {"max_shard_size": "500KB"} if shards else {}
    model.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > (2 if shards else 0)
    found, params = deepfloyd.load_unet(tmp_path)
    assert found == network
    assert_same(network, params, model)
    model.half().save_pretrained(tmp_path, variant="fp16", **options)
    _, halves = deepfloyd.load_unet(tmp_path, variant="fp16")
    assert_equal(halves, jax.tree.map(lambda a: np.asarray(a).astype("f2").astype("f4"), params))
    assert set(hub.open_tensors(tmp_path, "fp16")) == set(hub.open_tensors(tmp_path))

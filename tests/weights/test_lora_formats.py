"""LoRA files in all public formats, as an independent writer makes them, and back."""

import functools
import json

import jax.numpy as jnp
import lora_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.core import trees
from jaxdiff.models import lora
from jaxdiff.weights import clip, hub, latent_unet
from jaxdiff.weights import lora as files
from jaxdiff.weights.lora_names import Networks

UNETS = pytest.mark.parametrize("world", ["SD 1", "SDXL"], indirect=True)
BOTH = {"unet": "model", "text_encoder": "text", "text_encoder_2": "text_2"}


class World:
    """The networks of a small model in torch and ours, and a LoRA of every layer."""

    def __init__(self, name, folder):
        self.name = name
        self.theirs = {"unet": lora_files.torch_unet(lora_files.SMALL[name])}
        if name == "SDXL":
            self.theirs |= {"text_encoder": lora_files.torch_text(False), "text_encoder_2": lora_files.torch_text(True)}
        else:
            self.theirs |= {"text_encoder": lora_files.torch_text(False)}
        for part, network in self.theirs.items():
            network.save_pretrained(folder / part)
        unet, self.params = latent_unet.load_unet(folder / "unet")
        towers = [clip.load_text(folder / part) for part in self.theirs if part != "unet"]
        self.networks = Networks(unet, tuple(config for config, _ in towers))
        self.loras = {
            part: lora_files.random_lora(lora_files.layers(network), seed)
            for seed, (part, network) in enumerate(self.theirs.items())
        }
        named = {"model": latent_unet.key_map(unet, self.params)}
        named |= {ours: clip.key_map(params) for ours, (_, params) in zip(("text", "text_2"), towers)}
        self.names = {
            ours: {path: name[: -len(".weight")] for path, name in own.items()} for ours, own in named.items()
        }

    def check(self, loaded, without=lambda part, name: False, alpha=None, tolerance=1e-6):
        """That each layer has its difference, and no other layer has one."""
        for part, layers in self.loras.items():
            wanted = {text_model(part, name): layer for name, layer in layers.items() if not without(part, name)}
            modules = lora.modules(loaded.get(BOTH[part], {}))
            assert {self.names[BOTH[part]][path] for path in modules} == set(wanted)
            for path, module in modules.items():
                layer = wanted[self.names[BOTH[part]][path]]
                got = hub.theirs("kernel", np.asarray(lora.difference(module)))
                np.testing.assert_allclose(
                    got, lora_files.change(layer, alpha and alpha(part, layer)), rtol=tolerance, atol=tolerance
                )


def equal(first, second):
    first, second = trees.flatten(first), trees.flatten(second)
    assert set(first) == set(second)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def load(*args, **options):
    return files.load(*args, place=np.asarray, **options)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By name; pytest makes a fixture with parameters anew whenever they alternate."""
    return functools.cache(lambda name: World(name, tmp_path_factory.mktemp("world")))


@pytest.fixture
def world(request, worlds):
    return worlds(request.param)


def text_model(part, name):
    """The name of a text tower's layer with `text_model`, as transformers 4 has it everywhere."""
    return name if part == "unet" or name.startswith("text_") else f"text_model.{name}"


ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def processor(part, name, way):
    """The oldest names: attention processors."""
    before, after = name, None
    for new, old in (ATTENTION if part == "unet" else TEXT_ATTENTION).items():
        if name.endswith(f".{new}"):
            before, after = name[: -len(new) - 1], old
    middle = ".processor" if part == "unet" else ""
    return None if after is None else f"{part}.{before}{middle}.{after}_lora.{way}.weight"


def sgm(name):
    """The name in a single file of a small SDXL, whose levels have one block."""
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    for diffusers, single in blocks.items():
        if name == diffusers or name.startswith(f"{diffusers}."):
            name = single + name[len(diffusers) :]
            break
    inner = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    last = name.rpartition(".")[2]
    return name[: -len(last)] + inner[last] if last in inner else name


def kohya(part, name, way, rename=lambda name: name):
    towers = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    name = text_model(part, name)
    prefix = "lora_unet_" if part == "unet" else towers[part]
    name = prefix + (rename(name) if part == "unet" else name).replace(".", "_")
    return f"{name}.alpha" if way == "alpha" else f"{name}.lora_{way}.weight"


FORMATS = {
    "processors": processor,
    "processors of a U-Net alone": lambda part, name, way: (
        processor(part, name, way).removeprefix("unet.") if part == "unet" and processor(part, name, way) else None
    ),
    "diffusers": lambda part, name, way: (
        f"unet.{name}.lora.{way}.weight" if part == "unet"
        else f"{part}.{text_model(part, name)}.lora_linear_layer.{way}.weight"
    ),
    "PEFT": lambda part, name, way: f"{part}.{name}.lora_{'A' if way == 'down' else 'B'}.weight",
    "PEFT's own": lambda part, name, way: (
        f"{part}.base_model.model.{text_model(part, name)}.lora_{'A' if way == 'down' else 'B'}.default.weight"
    ),
    "a U-Net of PEFT alone": lambda part, name, way: (
        f"base_model.model.{name}.lora_{'A' if way == 'down' else 'B'}.weight" if part == "unet" else None
    ),
    "kohya": kohya,
    "dotted kohya": lambda part, name, way: f"{part}.{name}.lora_{way}.weight",
}  # fmt: skip
"""The key of a layer's down or up; None where the format has no such layer."""
SDXL_FORMATS = {
    "kohya for SDXL": lambda part, name, way: kohya(part, name, way, sgm),
    "single file's names": lambda part, name, way: (
        f"diffusion_model.{sgm(name)}.lora_{way}.weight" if part == "unet" else None
    ),
}
CASES = [(world, each) for world in ("SD 1", "SDXL") for each in FORMATS] + [("SDXL", each) for each in SDXL_FORMATS]


def tensors_of(world, key, alpha=None, dtype="float32"):
    result = {}
    for part, layers in world.loras.items():
        for name, layer in layers.items():
            if key(part, name, "down") is not None:
                for way in ("down", "up"):
                    result[key(part, name, way)] = getattr(layer, way).astype(jnp.dtype(dtype))
                if alpha is not None:
                    result[alpha(part, name)] = np.asarray(layer.alpha, jnp.dtype(dtype))
    return result


@pytest.mark.parametrize(("world", "case"), CASES, indirect=["world"])
@pytest.mark.filterwarnings("error")
def test_reads(world, case, tmp_path):
    """Every format, without alpha: the scale is 1."""
    key = (FORMATS | SDXL_FORMATS)[case]
    save_file(tensors_of(world, key), tmp_path / "a.safetensors")
    loaded = load(tmp_path, world.networks, strict=True)
    world.check(loaded, lambda part, name: key(part, name, "down") is None, lambda part, layer: layer.rank)


@UNETS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_alpha_in_tensors(world, dtype, tmp_path):
    tensors = tensors_of(world, kohya, lambda part, name: kohya(part, name, "alpha"), dtype)
    if world.name == "SD 1":  # kohya's prefix where there is one tower
        tensors = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", world.networks, strict=True)
    world.check(loaded, tolerance={"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype])
    assert all(leaf.dtype == jnp.float32 for leaf in trees.flatten(loaded).values())


@UNETS
def test_alpha_in_the_metadata(world, tmp_path):
    """diffusers' metadata: some modules by patterns, rsLoRA in one network."""
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 5,
        "unet.alpha_pattern": {r"^conv_in": 7.0, "to_q": 3},
        "unet.rank_pattern": {},
    }
    config |= {"text_encoder.lora_alpha": 4, "text_encoder.use_rslora": True, "text_encoder.alpha_pattern": None}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors_of(world, FORMATS["PEFT"]), path, {"lora_adapter_metadata": json.dumps(config)})
    loaded = load(tmp_path, world.networks, strict=True)
    alphas = {id(layer): name for layers in world.loras.values() for name, layer in layers.items()}

    def alpha(part, layer):
        if part == "unet":
            name = alphas[id(layer)]
            return 7 if name == "conv_in" else 3 if name.endswith("to_q") else 5
        return 4 * layer.rank**0.5 if part == "text_encoder" else layer.rank

    world.check(loaded, alpha=alpha)


@UNETS
def test_alpha_of_pefts_folder(world, tmp_path):
    """adapter_config.json beside adapter_model.safetensors."""
    save_file(tensors_of(world, FORMATS["a U-Net of PEFT alone"]), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    loaded = load(tmp_path, world.networks, strict=True)
    world.check(loaded, lambda part, name: part != "unet", lambda part, layer: 6)


@UNETS
@pytest.mark.parametrize("layout", files.Layout)
def test_written_files_are_read_again(world, layout, tmp_path):
    save_file(tensors_of(world, kohya, lambda part, name: kohya(part, name, "alpha")), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", world.networks)
    files.export(loaded, world.networks, tmp_path / "b.safetensors", layout)
    again = load(tmp_path / "b.safetensors", world.networks, strict=True)
    equal(loaded, again)


@UNETS
def test_written_keys(world, tmp_path):
    """Exactly those of the independent writer, with its numbers."""
    names = {"SD 1": kohya, "SDXL": SDXL_FORMATS["kohya for SDXL"]}[world.name]
    wanted = tensors_of(world, names, lambda part, name: names(part, name, "alpha"))
    layout = files.Layout.KOHYA_SGM
    if world.name == "SD 1":
        wanted = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in wanted.items()}
        layout = files.Layout.KOHYA
    save_file(wanted, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", world.networks, strict=True)
    files.export(loaded, world.networks, tmp_path / "b.safetensors", layout)
    written = load_file(tmp_path / "b.safetensors")
    assert set(written) == set(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(written[key], tensor)

"""A LoRA's effect on the network: merged here, beside the layers in torch, and loaded by diffusers and PEFT."""

import copy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import lora_files
import numpy as np
import pytest

from jaxdiff.core import trees
from jaxdiff.models import lora
from jaxdiff.nets.clip import CLIP
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.weights import clip, hub, latent_unet
from jaxdiff.weights import lora as files
from jaxdiff.weights.lora_names import Networks

VECTOR = 20 + 6 * 8


@pytest.fixture(scope="module", params=["SD 1", "SDXL"])
def case(request, tmp_path_factory):
    """A network of diffusers and ours, a LoRA of all layers, and one of attention."""
    folder = tmp_path_factory.mktemp("unet")
    theirs = lora_files.torch_unet(lora_files.SMALL[request.param])
    theirs.save_pretrained(folder)
    network, params = latent_unet.load_unet(folder)
    named = {name.removesuffix(".weight"): path for path, name in latent_unet.key_map(network, params).items()}
    everywhere = lora_files.random_lora(lora_files.layers(theirs), 1)
    attention = {name: layer for name, layer in lora_files.layers(theirs).items() if "attn" in name}
    rng = np.random.default_rng(1)
    x, tokens, vector = (
        rng.normal(size=shape).astype("f4") for shape in ((2, 4, 4, 4), (2, 3, network.text_width), (2, 20))
    )
    sizes, extra, given = np.full((2, 6), 4.0, "f4"), {}, Conditioning(tokens=jnp.asarray(tokens))
    if network.vector is not None:
        import torch

        from jaxdiff.nets.blocks import sinusoidal

        extra = {"added_cond_kwargs": {"text_embeds": torch.tensor(vector), "time_ids": torch.tensor(sizes)}}
        embedded = sinusoidal(jnp.asarray(sizes.reshape(-1)), 8).reshape(2, -1)
        given = given._replace(vector=jnp.concatenate([jnp.asarray(vector), embedded], -1))

    def run_theirs(network):
        import torch

        with torch.no_grad():
            image = torch.tensor(x.transpose(0, 3, 1, 2))
            output = network(image, torch.tensor([3.0, 801.0]), torch.tensor(tokens), **extra).sample
        return output.numpy().transpose(0, 2, 3, 1)

    time = jnp.asarray([3.0, 801.0])
    forward = jax.jit(lambda params: network.unet.module().apply({"params": params}, jnp.asarray(x), time, given))

    def run(loras, weights):
        return forward(lora.merged(params, list(zip(loras, weights))))

    return SimpleNamespace(
        name=request.param, theirs=theirs, network=network, params=params, run=run, run_theirs=run_theirs,
        loras=[ours(named, everywhere), ours(named, lora_files.random_lora(attention, 2, (4,), (4.0, 3.0)))],
        random=[everywhere, lora_files.random_lora(attention, 2, (4,), (4.0, 3.0))],
    )  # fmt: skip


def ours(named, random):
    """The tree of a LoRA in torch's layout."""
    flat = {}
    for name, layer in random.items():
        flat |= {f"{named[name]}/{part}": hub.ours("kernel", getattr(layer, part)) for part in ("down", "up")}
        flat[f"{named[name]}/alpha"] = np.float32(layer.alpha)
    return trees.unflatten(flat)


def close(got, wanted, tolerance=1e-4):
    assert np.abs(np.asarray(got) - wanted).max() < tolerance * np.abs(wanted).max()


def test_merged_is_beside(case):
    """Two LoRAs with weights, as `torch` adds their outputs to those of the layers."""
    base = case.run_theirs(case.theirs)
    close(case.run(case.loras, (0.0, 0.0)), base)
    for weights in ((1.0, 0.0), (0.7, -0.5)):
        hooks = [
            hook
            for random, weight in zip(case.random, weights)
            for hook in lora_files.hooked(case.theirs, random, weight)
        ]
        wanted = case.run_theirs(case.theirs)
        for hook in hooks:
            hook.remove()
        close(case.run(case.loras, weights), wanted)
        assert np.abs(wanted - base).max() > 0.05 * np.abs(base).max()


@pytest.mark.parametrize("number", [0, 1])
def test_diffusers_loads_written_files(case, number, tmp_path):
    """In every layout that it reads: names of single files for SDXL only."""
    pytest.importorskip("peft", reason="diffusers loads LoRAs by PEFT")
    for layout in files.Layout:
        if case.name == "SDXL" or layout is not files.Layout.KOHYA_SGM:
            same_in_diffusers(case, layout, number, tmp_path)


def same_in_diffusers(case, layout, number, tmp_path):
    """Its network gives the numbers of ours.

    Of kohya's files diffusers 0.42 ignores alphas that differ between attention layers, and SDXL's `add_embedding`
    under diffusers' name.
    """
    from diffusers import loaders

    tree = dict(trees.flatten(case.loras[number]))
    if layout is not files.Layout.DIFFUSERS:
        tree = {
            path: np.float32(2) if path.endswith("alpha") else leaf
            for path, leaf in tree.items()
            if not (path.startswith("vector") and layout is files.Layout.KOHYA)
        }
    tree, networks = trees.unflatten(tree), Networks(case.network)
    files.export({"model": tree}, networks, tmp_path / "a.safetensors", layout)
    kind = loaders.StableDiffusionXLLoraLoaderMixin if case.name == "SDXL" else loaders.StableDiffusionLoraLoaderMixin
    theirs = copy.deepcopy(case.theirs)
    state, alphas, metadata = kind.lora_state_dict(
        tmp_path, weight_name="a.safetensors", unet_config=theirs.config, return_lora_metadata=True
    )
    kind.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, metadata=metadata, adapter_name="a")
    theirs.set_adapters("a", 0.7)
    wanted = case.run_theirs(theirs)
    close(case.run([tree], [0.7]), wanted)
    assert np.abs(wanted - case.run_theirs(case.theirs)).max() > 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("projected", [False, True])
def test_text_towers(projected, tmp_path):
    """Of transformers: beside the layers, and as diffusers loads a written file."""
    theirs = lora_files.torch_text(projected)
    import torch

    theirs.save_pretrained(tmp_path)
    config, params = clip.load_text(tmp_path)
    named = {name.removesuffix(".weight"): path for path, name in clip.key_map(params).items()}
    random = lora_files.random_lora(lora_files.layers(theirs), 3, alphas=(1.5, 3.0))
    in_ours = {name if name.startswith("text_") else f"text_model.{name}": layer for name, layer in random.items()}
    tree, ids = ours(named, in_ours), np.asarray([[48, 3, 7, 49, 49], [48, 9, 4, 1, 49]])

    def run_theirs():
        with torch.no_grad():
            output = theirs(input_ids=torch.tensor(ids))
        return output.last_hidden_state.numpy(), (output.text_embeds if projected else output.pooler_output).numpy()

    merged = lora.merged(params, [(tree, 1.0)])
    output = CLIP(config).apply({"params": merged}, jnp.asarray(ids), method="embed_text")
    hooks = lora_files.hooked(theirs, random, 1.0)
    states, vectors = run_theirs()
    for hook in hooks:
        hook.remove()
    close(output.states, states)
    close(output.embedding if projected else output.pooled, vectors)

    pytest.importorskip("peft", reason="diffusers loads LoRAs by PEFT")
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as kind

    number = int(projected)
    networks, name = Networks(None, (None,) * number + (config,)), ("text", "text_2")[number]
    files.export({name: tree}, networks, tmp_path / "a" / "a.safetensors")
    state, alphas, metadata = kind.lora_state_dict(
        tmp_path / "a", weight_name="a.safetensors", return_lora_metadata=True
    )
    prefix = ("text_encoder", "text_encoder_2")[number]
    kind.load_lora_into_text_encoder(state, alphas, theirs, prefix=prefix, metadata=metadata)
    for got, wanted in zip(run_theirs(), (states, vectors)):
        close(got, wanted)

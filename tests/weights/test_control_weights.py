"""ControlNet in diffusers' layout: the same residuals, alone and in the U-Net, the same names, every setting read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core import trees
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.control import with_controls
from jaxdiff.models.hints import HintImage
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.nets.blocks import sinusoidal
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.systems import stable_diffusion
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.weights import control, hub, latent_unet, single_file_families

SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UPSCALER = {
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
    "num_class_embeds": 1000,
    "conditioning_embedding_out_channels": [64, 128, 256],
}
PUBLIC = {"SD 1.5": {"cross_attention_dim": 768}, "SD 2.1": SD2, "SDXL canny": SDXL, "upscaler": UPSCALER}
"""Of lllyasviel's and diffusers' ControlNets, without the settings that have diffusers' defaults."""
SMALL = {
    "SD 1.5": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 24},
    "SDXL": SDXL
    | {
        "block_out_channels": [32, 64, 64],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 40,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 20 + 6 * 16,
    },
    "two levels": {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 24,
    },
}
"""Of these the numbers are compared: the published topologies at a small width, and one for sampling."""
HINT = {"conditioning_embedding_out_channels": [4, 8, 8, 16]}


def torch_model(kind, config, device="cpu", seed=0):
    """diffusers' network; random parameters none of which is 0."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' network")
    diffusers = pytest.importorskip("diffusers")
    with torch.device(device):
        network = getattr(diffusers, kind)(**config).eval()
    if device == "cpu":
        generator = torch.Generator().manual_seed(seed)
        for name, value in network.named_parameters():
            spread = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.data = torch.randn(value.shape, generator=generator) * spread
            value.data += value.ndim == 1 and name.endswith("weight")
    return network


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_shapes(name, tmp_path):
    """Of the whole public network: nothing left over on either side, and its settings come back."""
    theirs = torch_model("ControlNetModel", PUBLIC[name], "meta")
    values = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    network = control.read_config(values, tmp_path / "config.json")
    shapes = control.shapes_of(network)
    named = control.key_map(network, shapes)
    ours = {named[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    assert ours == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    written = control.hub_config(network)
    assert written.keys() - {"_class_name"} == values.keys()
    assert control.read_config(written, tmp_path) == network
    # Two are also given for levels without attention, where they mean nothing.
    for key in values.keys() - {"transformer_layers_per_block", "only_cross_attention"}:
        assert written[key] == (list(values[key]) if isinstance(values[key], tuple) else values[key]), key


@pytest.mark.parametrize("family", ["SD_1", "SDXL"])
def test_settings_of_single_files(family, tmp_path):
    """The settings that go with the tensors of a single file are those of the folder."""
    values = single_file_families.controlnet(getattr(single_file_families, family))
    network = control.read_config(values, tmp_path / "config.json")
    assert network == control.read_config(PUBLIC["SD 1.5" if family == "SD_1" else "SDXL canny"], tmp_path)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


@pytest.fixture(scope="module", params=SMALL)
def case(request, tmp_path_factory):
    """A small U-Net with two ControlNets, diffusers' and ours of their files, with the same inputs for both."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' network")
    folder, config = tmp_path_factory.mktemp("control"), SMALL[request.param]
    up = [kind.replace("Down", "Up") for kind in config.get("down_block_types", [])][::-1]
    unet = torch_model("UNet2DConditionModel", config | ({"up_block_types": up} if up else {}))
    nets = [torch_model("ControlNetModel", config | HINT, seed=seed) for seed in (1, 2)]
    for name, network in {"unet": unet, "0": nets[0], "1": nets[1]}.items():
        network.save_pretrained(folder / name)
    base, params = latent_unet.load_unet(folder / "unet")
    ours = [control.load_control(folder / str(i)) for i in range(2)]
    x, tokens, time = random(1, 2, 16, 8, 4), random(2, 2, 5, base.text_width), np.asarray([3.0, 801.0], "f4")
    hints = [np.random.default_rng(i).uniform(size=(2, 128, 64, 3)).astype("f4") for i in range(2)]
    given, extra = Conditioning(tokens=jnp.asarray(tokens)), {}
    if base.vector is not None:
        pooled, numbers = random(3, 2, 20), np.asarray([[64, 48, 0, 5, 64, 32], [128, 64, 8, 0, 64, 64]], "f4")
        embedded = sinusoidal(jnp.asarray(numbers.reshape(-1)), base.vector.frequencies).reshape(2, -1)
        given = given._replace(vector=jnp.concatenate([jnp.asarray(pooled), embedded], -1))
        extra = {"added_cond_kwargs": {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(numbers)}}

    @jax.jit
    def run(params, hints):
        """The residuals of both ControlNets."""
        module, inputs = ours[0][0].control.module(), (jnp.asarray(x), jnp.asarray(time))
        apply = jax.vmap(lambda params, hint: module.apply({"params": params}, *inputs, hint, given))
        return apply(jax.tree.map(lambda *pair: jnp.stack(pair), *params), jnp.stack(hints))

    inputs = channels_first(x), torch.tensor(time), torch.tensor(tokens)
    return SimpleNamespace(
        unet=unet, nets=nets, inputs=inputs, hints=hints, extra=extra, base=base, params=params, ours=ours,
        run=lambda: run([p for _, p in ours], hints),
    )  # fmt: skip


def channels_first(array):
    import torch

    return torch.tensor(np.asarray(array).transpose(0, 3, 1, 2))


def error(got, wanted):
    """The largest, relative to the largest value."""
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


def test_same_residuals(case):
    import torch

    for each, net, hint in zip(zip(*case.run()), case.nets, case.hints):
        with torch.no_grad():
            down, middle = net(*case.inputs, channels_first(hint), **case.extra, return_dict=False)
        assert len(each) == len(down) + 1
        assert max(map(error, each, (*down, middle))) < 1e-5


@pytest.mark.parametrize("case", ["two levels"], indirect=True)
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_same_samples_with_two(case, guess):
    """As diffusers' pipeline with two ControlNets, each with a weight and in some steps only, guided."""
    import diffusers
    import torch

    weights, starts, ends = (0.7, 1.6), (0.0, 0.25), (0.5, 1.0)
    model = stable_diffusion.latent_model(case.base.unet, 16).reading(5, case.base.text_width)
    sampling = replace(stable_diffusion.SAMPLING, steps=4, guidance=Guidance(3.0))
    trained = with_controls(
        TrainedModel(model, case.params, sampling), [(network.control, params) for network, params in case.ours]
    )
    keys, mask = noise.sample_keys(jax.random.key(1), jnp.arange(1)), jnp.ones((1, 5), bool)
    text, negative = (TextEmbedding(jnp.asarray(random(i, 1, 5, case.base.text_width)), mask) for i in (5, 6))
    given = tuple(HintImage(hint[0], *each, guess=guess) for hint, *each in zip(case.hints, weights, starts, ends))
    got = trained.generate(SampleRequest(keys, (16, 8), text, negative, hints=given))
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        *(None, None, None, case.unet, case.nets),
        diffusers.DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False),
        *(None, None, None, False),
    )
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        prompt_embeds=torch.tensor(np.asarray(text.tokens)),
        negative_prompt_embeds=torch.tensor(np.asarray(negative.tokens)),
        image=[channels_first(hint[:1]) for hint in case.hints],
        latents=channels_first(noise.normal_like(noise.fold(keys, 0), (16, 8, 4))),
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=list(weights),
        control_guidance_start=list(starts),
        control_guidance_end=list(ends),
        guess_mode=guess,
        output_type="latent",
    ).images
    assert error(got, wanted) < 2e-5


def test_written_for_diffusers(case, tmp_path):
    import diffusers
    import torch

    network, params = case.ours[0]
    control.export_control(network, params, tmp_path)
    again = diffusers.ControlNetModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    wanted = case.nets[0].state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unheard_of": 1}, "unknown settings of ControlNetModel: unheard_of"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "unknown settings of ControlNetModel: up_block_types"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "controlnet_conditioning_channel_order = 'bgr'"),
        ({"global_pool_conditions": True}, "global_pool_conditions = True"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D'"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels"),
        ({"conditioning_embedding_out_channels": [16, 0]}, "conditioning_embedding_out_channels"),
        ({"conditioning_embedding_out_channels": 16}, "conditioning_embedding_out_channels"),
        ({"conditioning_channels": 0}, "conditioning_channels = 0"),
        ({"block_out_channels": [320, 640]}, "down_block_types"),
        ({"block_out_channels": 320}, "block_out_channels = 320"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block = 0"),
        ({"attention_head_dim": 7}, "7 heads do not divide a width of 320 at level 0"),
        ({"_class_name": "ControlNetXSAdapter"}, "_class_name"),
    ],
)
def test_refused_settings(change, message, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=message) as error:
        control.read_config(PUBLIC["SD 1.5"] | change, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ControlNet"):
        control.load_control(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["SD 1.5"]))
    with pytest.raises(FileNotFoundError, match="no weights"):
        control.load_control(tmp_path)
    network = control.read_config(SMALL["SD 1.5"] | HINT, tmp_path)
    with pytest.raises(ValueError, match="the ControlNet to export"):
        control.export_control(network, {"stem": {"kernel": np.zeros(3)}}, tmp_path / "x")
    uneven = replace(network.control, unet=replace(network.control.unet, blocks=(1, 2, 2, 2)))
    with pytest.raises(ValueError, match="as many blocks at each level"):
        control.hub_config(network._replace(control=uneven))
    with pytest.raises(ValueError, match=r"here does not fit the settings: .* missing"):
        control.load_tensors(network, {}, "float32", jnp.asarray, "here")
    assert not (tmp_path / "x").exists()

"""Single files of Stable Diffusion: recognised by their tensors, opened without reading, written for diffusers."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.weights import lazy, single_file, single_file_kinds, tree
from jaxdiff.weights import single_file_families as families

UNET, CONTEXT = "model.diffusion_model.", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
VECTOR = "label_emb.0.0.weight"


def zeros(*shape, dtype=np.float16):
    return np.broadcast_to(np.zeros((), dtype), shape)


def write(path, tensors, metadata=None):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
    return path


def unet(first=(320, 4), context=(320, 768), **others):
    """The tensors that tell one U-Net from another, and one more."""
    named = {"input_blocks.0.0.weight": zeros(*first, 3, 3), CONTEXT: zeros(*context), "out.2.bias": zeros(4)}
    return {UNET + name: array for name, array in {**named, **others}.items()}


XL = {"context": (640, 2048), VECTOR: zeros(1280, 2816)}
PUBLISHED = {
    "1": (unet(), families.SD_1),
    "1 inpainting": (unet((320, 9)), families.SD_1_INPAINTING),
    "2": (unet(context=(320, 1024)), families.SD_2_V),
    "2 inpainting": (unet((320, 9), (320, 1024)), families.SD_2_INPAINTING),
    "x4": (unet((256, 7), (512, 1024), **{"label_emb.weight": zeros(1000, 1024)}), families.X4_UPSCALER),
    "XL": (unet(**XL), families.SDXL),
    "XL inpainting": (unet((320, 9), **XL), families.SDXL_INPAINTING),
    "refiner": (unet((384, 4), (768, 1280), **{VECTOR: zeros(1536, 2560)}), families.SDXL_REFINER),
}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "ss_seed": "1"}], ids=["none", "empty", "other"])
@pytest.mark.parametrize(("tensors", "family"), PUBLISHED.values(), ids=PUBLISHED)
def test_recognised_without_metadata(tmp_path, tensors, family, metadata):
    opened = single_file.open_file(write(tmp_path / "model.safetensors", tensors, metadata))
    assert opened.family is family
    assert opened.component("unet")["conv_out.bias"].shape == (4,)
    assert opened.ignored == ()


@pytest.mark.parametrize(
    ("title", "metadata", "extra", "given", "family"),
    [
        ("2", {"modelspec.prediction_type": "epsilon"}, {}, None, families.SD_2_BASE),
        ("2", {"modelspec.prediction_type": "v"}, {}, None, families.SD_2_V),
        ("2", {"modelspec.architecture": "stable-diffusion-v2-512"}, {}, None, families.SD_2_BASE),
        ("2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, None, families.SD_2_V),
        ("2", {"modelspec.prediction_type": "nonsense"}, {}, None, families.SD_2_V),
        ("2", {}, {"global_step": np.array(875000)}, None, families.SD_2_BASE),
        ("2", {}, {"global_step": np.array([140000])}, None, families.SD_2_V),
        ("2", {}, {}, Prediction.EPSILON, families.SD_2_BASE),
        ("2", {"modelspec.prediction_type": "epsilon"}, {}, Prediction.V, families.SD_2_V),
        ("XL", {"modelspec.prediction_type": "epsilon"}, {}, None, families.SDXL),
        ("1", {"modelspec.prediction_type": "epsilon"}, {"v_pred": zeros(0)}, None, families.SD_1),
        ("XL", {}, {"v_pred": zeros(0)}, None, families.SDXL.with_prediction(Prediction.V)),
        ("1", {}, {}, Prediction.V, families.SD_1.with_prediction(Prediction.V)),
    ],
)
def test_the_prediction(tmp_path, title, metadata, extra, given, family):
    """Given, else stated, else that of the family: v for version 2."""
    path = write(tmp_path / "model.safetensors", PUBLISHED[title][0] | extra, metadata)
    found = single_file.open_file(path, prediction=given).family
    assert replace(found, title="").__dict__ == replace(family, title="").__dict__
    assert found.prediction is family.prediction


def test_schedules_that_end_in_noise(tmp_path):
    """As some files of XL that predict v state it, and as we write it."""
    tensors = PUBLISHED["XL"][0] | {"v_pred": zeros(0), "ztsnr": zeros(0)}
    opened = single_file.open_file(write(tmp_path / "model.safetensors", tensors))
    assert opened.family.scheduler == families.SDXL.scheduler | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    assert opened.ignored == () and opened.family.architecture == families.SDXL.architecture
    assert single_file_kinds.markers(opened.family) == ("v_pred", "ztsnr")
    assert not any(map(single_file_kinds.markers, families.FAMILIES))


def test_a_prediction_that_no_family_has():
    with pytest.raises(ValueError, match=r"Stable Diffusion 1 is Prediction\.EPSILON or Prediction\.V"):
        families.SD_1.with_prediction(Prediction.VELOCITY)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHERS = {
    "a LoRA with kohya's": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a LoRA with kohya's names": ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"],
    "a LoRA with PEFT's": [f"unet.{BLOCK}.lora_A.weight", f"unet.{BLOCK}.lora_B.default.weight"],
    "a LoRA with diffusers'": [f"unet.{BLOCK}.lora.up.weight"],
    "a LoRA with diffusers' names": ["down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight"],
    "a LyCORIS": ["lora_unet_down_blocks_0.hada_w1_a", "lora_unet_down_blocks_0.alpha"],
    "open_controlnet": ["control_model.time_embed.0.weight", f"{UNET}input_blocks.0.0.weight"],
    "a ControlNet in diffusers'": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"],
    "an autoencoder alone: pass it as vae=": ["encoder.down.0.block.0.conv1.weight", "loss.logvar"],
    "an autoencoder alone": ["first_stage_model.encoder.conv_in.weight"],
    "an autoencoder in diffusers'": ["decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"],
    "TAESD": ["encoder.layers.0.weight", "decoder.layers.1.weight"],
    "a U-Net in diffusers'": [f"{BLOCK}.weight", "conv_in.weight"],
    "a U-Net alone": ["input_blocks.0.0.weight", "out.2.bias"],
    "a text encoder alone": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "with OpenCLIP's": ["transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight"],
    "a T5": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "Stable Diffusion 3": [f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.encoder.conv_in.bias"],
    "FLUX": ["double_blocks.0.img_attn.qkv.weight"],
    "that is not Stable Diffusion's": [f"{UNET}layers.0.attention.qkv.weight"],
    "averaged": ["model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.encoder.conv_in.weight"],
    "textual inversion": ["emb_params"],
    "of jaxdiff": ["stem/kernel", "head/bias"],
    r"2 tensors of an unknown kind \(a, b\)": ["b", "a"],
}


@pytest.mark.parametrize(("message", "names"), OTHERS.items(), ids=OTHERS)
def test_what_else_a_file_is(tmp_path, message, names):
    path = write(tmp_path / "model.safetensors", {name: zeros(1) for name in names})
    with pytest.raises(ValueError, match=rf"not a single file of Stable Diffusion: it holds .*{message}") as error:
        single_file.open_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "tensors"),
    {
        "InstructPix2Pix": unet((320, 8)),
        "depth-to-image": unet((320, 5), (320, 1024)),
        "unCLIP": unet(context=(320, 1024), **{VECTOR: zeros(1280, 2048)}),
        "Playground": unet(**XL) | {"edm_mean": zeros(4)},
        "CosXL": unet(**XL) | {"edm_vpred.sigma_max": zeros(1)},
        "U-Net of 4 input channels and text of width 32": unet((128, 4), (128, 32)),
        "text of width 0, with a vector of 7": unet(context=(320, 0), **{VECTOR: zeros(8, 7)}),
    }.items(),
)
def test_networks_of_other_kinds(tmp_path, message, tensors):
    with pytest.raises(ValueError, match=message):
        single_file.open_file(write(tmp_path / "model.safetensors", tensors))


def test_no_tensors_no_file_and_pickles(tmp_path):
    with pytest.raises(ValueError, match="it holds no tensors"):
        single_file.open_file(write(tmp_path / "model.safetensors", {}))
    with pytest.raises(FileNotFoundError, match="no weights at"):
        single_file.open_file(tmp_path / "absent.safetensors")
    (tmp_path / "sd.ckpt").write_bytes(b"PK\x03\x04" + bytes(32))
    with pytest.raises(ValueError, match=r"is a pickle.*sd\.safetensors"):
        single_file.open_file(tmp_path / "sd.ckpt")


def test_names_that_are_not_of_the_network(tmp_path):
    wrong = unet(**{"input_blocks.40.0.in_layers.0.weight": zeros(1)})
    with pytest.raises(ValueError, match=r"the U-Net: 1 tensors are not of this network \(input_blocks\.40"):
        single_file.open_file(write(tmp_path / "model.safetensors", wrong))


def test_missing_components(tmp_path):
    opened = single_file.open_file(write(tmp_path / "model.safetensors", unet()))
    with pytest.raises(ValueError, match=r"holds no autoencoder \(first_stage_model\.…\): pass vae=, a file with one"):
        opened.component("vae")
    with pytest.raises(ValueError, match=r"holds no text encoder \(cond_stage_model\.transformer\.…\)"):
        opened.component("text_encoder")
    with pytest.raises(ValueError, match="Stable Diffusion 1 has no text_encoder_2"):
        opened.component("text_encoder_2")
    with pytest.raises(
        ValueError, match=r"no averaged \(EMA\) weights for 3 tensors \(model_ema\.diffusion_modelinput_"
    ):
        single_file.open_file(opened.path, ema=True)
    with pytest.raises(ValueError, match="is made of text_encoder, unet, vae, not of unet"):
        single_file.join({"unet": opened.component("unet")}, opened.family)


LAYOUTS = {
    "alone": ("", "norm_out", "mid.attn_1.q.weight", (4, 4, 1, 1)),
    "in a model": ("first_stage_model.", "norm_out", "mid.attn_1.q.weight", (4, 4, 1, 1)),
    "of ComfyUI": ("vae.", "norm_out", "mid.attn_1.q.weight", (4, 4)),
    "of diffusers": ("", "conv_norm_out", "mid_block.attentions.0.to_q.weight", (4, 4)),
}


@pytest.mark.parametrize(("prefix", "norm", "query", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_an_autoencoder_from_another_file(tmp_path, prefix, norm, query, shape):
    names = {f"{half}.{name}": (4,) for half in ("encoder", "decoder") for name in (f"{norm}.weight", "conv_in.weight")}
    tensors = {prefix + name: zeros(*size) for name, size in {**names, f"decoder.{query}": shape}.items()}
    other = write(tmp_path / "vae.safetensors", tensors | {"model_ema.decay": zeros(1)} if prefix else tensors)
    opened = single_file.open_file(write(tmp_path / "model.safetensors", unet()), vae=other)
    found = {name: tensor.shape for name, tensor in opened.component("vae").items()}
    assert found == {
        **{f"{half}.{name}.weight": (4,) for half in ("encoder", "decoder") for name in ("conv_norm_out", "conv_in")},
        "decoder.mid_block.attentions.0.to_q.weight": (4, 4),
    }
    with pytest.raises(ValueError, match=r"holds no autoencoder: it holds a U-Net of Stable Diffusion"):
        single_file.open_file(opened.path, vae=opened.path)


WIDTHS = {"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 32}
VAE = WIDTHS | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40, "bos_token_id": None}


def small(family):
    """A family of the same kind with tiny networks."""
    width = {"text_encoder": 16, "text_encoder_2": 24}
    encoders = {
        name: replace(
            encoder,
            config=encoder.config
            | TEXT
            | {"num_hidden_layers": 10, "hidden_size": width[name], "projection_dim": width[name], "pad_token_id": 0},
        )
        for name, encoder in family.text_encoders.items()
    }
    levels = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": 2}
    levels |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": 1}
    config = family.unet | WIDTHS | levels | {"cross_attention_dim": sum(width[name] for name in encoders)}
    if config["addition_embed_type"]:
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8}
    return replace(family, unet=config, vae=family.vae | VAE, text_encoders=encoders)


TINY = {family.architecture: small(family) for family in (families.SD_1, families.SD_2_BASE, families.SDXL)}


@pytest.fixture(scope="module", params=TINY.values(), ids=TINY)
def written(request, tmp_path_factory):
    """A family, PyTorch's models with random weights, and the single file of them."""
    torch = pytest.importorskip("torch", reason="diffusers' models are PyTorch's")
    diffusers = pytest.importorskip("diffusers", reason="files are compared with diffusers'")
    transformers = pytest.importorskip("transformers")
    family = request.param
    torch.manual_seed(0)
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(family.unet),
        "vae": diffusers.AutoencoderKL.from_config(family.vae),
    }
    for name, encoder in family.text_encoders.items():
        kind = getattr(transformers, encoder.config["architectures"][0])
        models[name] = kind(transformers.CLIPTextConfig(**encoder.config))
    folder = tmp_path_factory.mktemp("single")
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
    states = {n: {k: t.numpy() for k, t in model.state_dict().items()} for n, model in models.items()}
    components = {name: {k: lazy.held(array) for k, array in state.items()} for name, state in states.items()}
    single_file.save(folder / "model.safetensors", components, family)
    single_file.save(folder / "half.safetensors", components, family, "float16")
    return family, states, folder


def test_our_files_come_back(written, monkeypatch):
    """In both types, with no tensor read before it is asked for."""
    family, states, folder = written
    reads = []
    read = tree.Stored.read
    monkeypatch.setattr(tree.Stored, "read", lambda *arguments: reads.append(arguments[0].key) or read(*arguments))
    for name, dtype in (("model", np.float32), ("half", np.float16)):
        opened = single_file.open_file(folder / f"{name}.safetensors", among=(family,))
        assert reads == [] and opened.family is family and opened.ignored == ()
        for component, state in states.items():
            found = {k.removeprefix("text_model."): t.read() for k, t in opened.component(component).items()}
            wanted = {k.removeprefix("text_model."): array.astype(dtype) for k, array in state.items()}
            assert found.keys() == wanted.keys()
            for key, array in found.items():
                np.testing.assert_array_equal(array, wanted[key], strict=True)
        assert reads != []
        reads.clear()


def test_names_of_both_versions_of_clip(written):
    """Some files lack the prefix text_model., and some have the temperature."""
    family, _, folder = written
    wanted = single_file.open_file(folder / "model.safetensors", among=(family,)).components
    stored, _ = tree.read_header(folder / "model.safetensors")
    renamed = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in stored.items()}
    unused = [f"{encoder.prefix}logit_scale" for encoder in family.text_encoders.values()]
    opened = single_file.split(renamed | dict(zip(unused, stored.values())), family, folder)
    assert opened.ignored == tuple(sorted(unused))
    for name, tensors in wanted.items():
        assert opened.component(name).keys() == tensors.keys()


def test_diffusers_opens_our_files(written):
    """Each component with equal weights."""
    import diffusers
    import torch
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    family, states, folder = written
    options = {"config": str(folder), "local_files_only": True}
    for name, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        model = kind.from_single_file(str(folder / "model.safetensors"), subfolder=name, **options)
        assert_equal(model.state_dict(), states[name])
    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    for name, encoder in family.text_encoders.items():
        kind = getattr(transformers, encoder.config["architectures"][0])
        model = create_diffusers_clip_model_from_ldm(kind, tensors, subfolder=name, **options)
        assert_equal(model.state_dict(), states[name])


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.float().numpy(), wanted[name], err_msg=name)


def test_the_metadata_states_the_prediction(tmp_path):
    described = single_file.described(families.SD_2_BASE)
    path = write(tmp_path / "model.safetensors", PUBLISHED["2"][0], described)
    assert single_file.open_file(path).family is families.SD_2_BASE


def test_a_type_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, not int8"):
        single_file.save(tmp_path / "model.safetensors", {}, families.SD_1, "int8")


CONTROL = {
    "of the file": ("control_model.", "input_blocks.0.0", "input_hint_block.14", CONTEXT),
    "without the prefix": ("", "input_blocks.0.0", "input_hint_block.14", CONTEXT),
    "of diffusers": (
        "",
        "conv_in",
        "controlnet_cond_embedding.conv_out",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    ),
}


@pytest.mark.parametrize(("prefix", "first", "hint", "context"), CONTROL.values(), ids=CONTROL)
def test_controlnets_are_recognised(tmp_path, prefix, first, hint, context):
    """Of versions 1, 2 and XL, by the width of the text."""
    for family, width in ((families.SD_1, 768), (families.SD_2_V, 1024), (families.SDXL, 2048)):
        tensors = {f"{first}.weight": zeros(320, 4, 3, 3), f"{hint}.bias": zeros(320), context: zeros(320, width)}
        path = write(tmp_path / "control.safetensors", {prefix + name: array for name, array in tensors.items()})
        config, found = single_file.open_controlnet(path)
        assert config == families.controlnet(family)
        assert found["controlnet_cond_embedding.conv_out.bias"].shape == (320,)
        assert found["conv_in.weight"].shape == (320, 4, 3, 3)


def test_what_is_no_controlnet(tmp_path):
    with pytest.raises(ValueError, match="is not a ControlNet: it holds a U-Net of Stable Diffusion"):
        single_file.open_controlnet(write(tmp_path / "model.safetensors", unet()))
    tensors = {"conv_in.weight": zeros(8, 4, 3, 3), "controlnet_cond_embedding.conv_in.bias": zeros(1)}
    with pytest.raises(ValueError, match="is a ControlNet of an unknown model"):
        single_file.open_controlnet(write(tmp_path / "model.safetensors", tensors))

"""LoRA files with a fault, and files of other models: one clear line."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.models import lora
from jaxdiff.nets.clip import CLIPConfig, TextTowerConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.weights import hub, latent_unet
from jaxdiff.weights import lora as files
from jaxdiff.weights.lora_names import Networks

UNET = LatentUNetConfig(
    channels=8, multipliers=(1,), blocks=(1,), transformer_layers=(1,), heads=(2,), cross_only=(False,), norm_groups=4
)
NETWORK = latent_unet.Network(UNET, 4, 0, 768)
TOWER = CLIPConfig(TextTowerConfig(width=8, layers=1, heads=2, feed_forward=12, vocab=10, length=4), None, None)
NETWORKS = Networks(NETWORK, (TOWER, TOWER))
K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + K.replace(".", "_")


def pair(key="unet." + K, width=768, out=8, rank=2, names=("lora_A", "lora_B")):
    return {
        f"{key}.{names[0]}.weight": np.ones((rank, width), "f4"),
        f"{key}.{names[1]}.weight": np.ones((out, rank), "f4"),
    }


def kohya(key=KOHYA, **sizes):
    return pair(key, **sizes, names=("lora_down", "lora_up"))


def saved(folder, tensors, metadata=None, name="a.safetensors"):
    save_file(tensors, folder / name, metadata)
    return folder / name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(width=2048), r"attn2.to_k has down \(2, 2048\) and up \(8, 2\), .* weight \(8, 768\); .* a LoRA of SDXL"),
        (pair(width=1024), "a LoRA of Stable Diffusion 2"),
        (pair(out=9), r"up \(9, 2\)"),
        (pair(rank=0), r"down \(0, 768\)"),
        ({**pair(), f"unet.{K}.lora_B.weight": np.ones((8, 3), "f4")}, r"up \(8, 3\)"),
        (kohya("lora_unet_double_blocks_0_img_attn_proj"), "no LoRA of this network: 2 of 2 .* a LoRA of Flux"),
        (pair("unet.nothing.like_it"), r"this network: 2 of 2 tensors are not used \(unet.nothing.like_it.lora_A"),
        ({"unet.conv_in.weight": np.ones((8, 4, 3, 3), "f4")}, "no LoRA of this network"),
        ({f"unet.{K}.lora_A.weight": np.ones((2, 768), "f4")}, "attn2.to_k has no up tensor"),
        ({f"unet.{K}.lora_B.weight": np.ones((8, 2), "f4")}, "attn2.to_k has no down tensor"),
        (pair() | kohya(), "are the same tensor of a module"),
        (kohya() | {f"{KOHYA}.alpha": np.ones(2, "f4")}, "alpha is not one number"),
        (kohya() | {f"{KOHYA}.alpha": np.float32(np.nan)[None]}, "alpha is nan"),
        (kohya() | {f"{KOHYA}.dora_scale": np.ones(8, "f4")}, "holds DoRA .*dora_scale.*only LoRA"),
        ({f"{KOHYA}.hada_w1_a": np.ones((8, 2), "f4")}, "holds LoHa"),
        (kohya() | {f"{KOHYA}.lora_mid.weight": np.ones((2, 2), "f4")}, "lora_mid"),
        ({name: tensor.astype("i4") for name, tensor in pair().items()}, "holds I32, only floats"),
        (pair("encoder.layers.0.self_attn.q_proj", 8, 8), "may be of text or text_2: load it for one of them"),
        ({}, "no LoRA of this network: 0 of 0"),
    ],
)  # fmt: skip
def test_faults(tensors, message, tmp_path):
    path = saved(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as error:
        files.load(path, NETWORKS)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unet.use_dora": True}, "use_dora"),
        ({"unet.lora_alpha": "4"}, "lora_alpha = '4' is not a number"),
        ({"unet.lora_alpha": float("inf")}, "lora_alpha = inf is not a number"),
        ({"unet.alpha_pattern": {"(a+)+$": 4}}, r"alpha_pattern has \(a\+\)\+\$: only names"),
        ({"unet.alpha_pattern": [4]}, r"alpha_pattern = \[4\]"),
        ({"unet.peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ],
)
def test_faults_of_settings(config, message, tmp_path):
    path = saved(tmp_path, pair(), {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=message) as error:
        files.load(path, NETWORKS)
    assert str(path) in str(error.value)


def test_of_which_model_the_metadata_says(tmp_path):
    path = saved(tmp_path, pair("unet.other"), {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(ValueError, match=r"looks like that of another model \(sdxl_base_v1-0 in its metadata\)"):
        files.load(path, NETWORKS)


def test_unknown_tensors_are_named_in_one_warning(tmp_path):
    tensors = (
        pair() | pair("unet.other") | {"lora_unet_x.alpha": np.ones((), "f4"), f"{KOHYA}0.alpha": np.ones((), "f4")}
    )
    path = saved(tmp_path, tensors)
    with pytest.warns(UserWarning, match=r"4 of 6 tensors are not used \(lora_unet_.*unet.other.lora_A") as caught:
        loaded = files.load(path, NETWORKS)
    assert len(caught) == 1 and list(loaded) == ["model"]
    with pytest.raises(ValueError, match="4 of 6 tensors are not used"):
        files.load(path, NETWORKS, strict=True)
    saved(tmp_path, pair() | pair("text_encoder.encoder.layers.0.mlp.fc1", 8, 12))
    with pytest.warns(UserWarning, match="2 of 4 tensors are not used"):
        files.load(path, Networks(NETWORK))


def test_an_alpha_alone_is_not_used(tmp_path):
    path = saved(tmp_path, kohya() | {"lora_unet_conv_in.alpha": np.ones((), "f4")})
    with pytest.warns(UserWarning, match=r"1 of 3 tensors are not used \(lora_unet_conv_in.alpha\)"):
        assert list(lora.modules(files.load(path, NETWORKS)["model"])) == ["down_0_0_attention/block_0/cross/k/kernel"]


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [
        (np.int64(4), 4.0),
        (np.float16(0.5)[None], 0.5),
        (np.asarray(3, ml_dtypes.bfloat16), 3.0),
        (np.float32(0), 2.0),  # the rank, as in kohya's scripts
        (np.float32(-1), -1.0),
    ],
)
def test_alphas(alpha, wanted, tmp_path):
    path = saved(tmp_path, kohya() | {f"{KOHYA}.alpha": np.asarray(alpha)})
    [module] = lora.modules(files.load(path, NETWORKS, "bfloat16")["model"]).values()
    assert module["alpha"] == wanted and module["alpha"].dtype == np.float32
    assert module["down"].dtype == module["up"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("side", [(), (1, 1)])
def test_matrices_and_convolutions_of_one_pixel(side, tmp_path):
    """Files have either for either: the projections of the transformers are convolutions in some networks."""
    tensors = {}
    for key, width, out in ((KOHYA, 768, 8), ("lora_unet_down_blocks_0_attentions_0_proj_in", 8, 8)):
        tensors |= {
            name: tensor.reshape(*tensor.shape, *side) for name, tensor in kohya(key, width=width, out=out).items()
        }
    loaded = lora.modules(files.load(saved(tmp_path, tensors), NETWORKS, strict=True)["model"])
    assert loaded["down_0_0_attention/block_0/cross/k/kernel"]["down"].shape == (768, 2)
    assert loaded["down_0_0_attention/in/kernel"]["down"].shape == (1, 1, 8, 2)


def test_only_the_second_tower(tmp_path):
    """The SDXL refiner has the second text tower of SDXL alone."""
    networks = Networks(None, (None, TOWER))
    path = saved(tmp_path, kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", width=8, out=12))
    loaded = files.load(path, networks, strict=True)
    assert list(loaded) == ["text_2"]
    files.export(loaded, networks, tmp_path / "b.safetensors", files.Layout.KOHYA)
    assert list(files.load(tmp_path / "b.safetensors", networks, strict=True)) == ["text_2"]


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        files.load(tmp_path, NETWORKS)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        files.load(tmp_path / "a.safetensors", NETWORKS)
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*nothing: not a directory"):
        files.load(tmp_path / "nothing", NETWORKS)
    (tmp_path / "style.pt").write_bytes(b"PK\x03\x04")
    for path in (tmp_path, tmp_path / "style.pt"):
        with pytest.raises(ValueError, match=r"style.pt is a pickle"):
            files.load(path, NETWORKS)
    saved(tmp_path, pair())
    assert list(files.load(tmp_path, NETWORKS)) == ["model"]
    saved(tmp_path, pair(), name="b.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 files \(a.safetensors, b.safetensors\): pass one"):
        files.load(tmp_path, NETWORKS)


def test_hub_ids(tmp_path, monkeypatch):
    """The file of a repository, with its name in diffusers, or the only one."""
    saved(tmp_path, pair(), name="style.safetensors")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **how: asked.append(name) or str(tmp_path))
    assert list(files.load("someone/style-v1.5", NETWORKS)) == ["model"]
    saved(tmp_path, pair(rank=3), name="pytorch_lora_weights.safetensors")
    [module] = lora.modules(files.load("someone/style-v1.5", NETWORKS)["model"]).values()
    assert module["up"].shape == (3, 8) and asked == ["someone/style-v1.5"] * 2


def test_refused_exports(tmp_path):
    loaded = files.load(saved(tmp_path, pair()), NETWORKS)
    other = latent_unet.Network(UNET, 4, 0, 1024)
    path = tmp_path / "b.safetensors"
    for arguments, message in (
        (({}, NETWORKS, path), "no LoRA to export"),
        ((loaded, NETWORKS, tmp_path / "b.bin"), "a file named .safetensors"),
        ((loaded, NETWORKS, path, files.Layout.KOHYA, "int8"), "dtype must be"),
        ((loaded, Networks(None, (TOWER,)), path), "a LoRA of 'model', but the networks are text"),
        ((loaded, Networks(other), path), r"does not fit its kernel \(1024, 8\)"),
        (({"model": {"stem": {"kernel": {"down": 0}}}}, NETWORKS, path), "has down, up, alpha at each kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            files.export(*arguments)
    assert not path.exists()
    with pytest.raises(ValueError, match="3 text towers"):
        files.load(tmp_path, Networks(None, (TOWER,) * 3))

"""unCLIP of the public topology and very small, beside diffusers' networks with the same tensors.

The tensors are drawn by numpy from names and shapes alone, so that what diffusers computes with them can be kept in a
small file: `unclip.npz` holds the settings, names, shapes and outputs of its networks. With diffusers installed,
`PYTHONPATH=tests:. python tests/small_unclip.py` writes it again.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

FIXTURE = Path(__file__).parent / "unclip.npz"
CROSS = {
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
PUBLIC = {
    "prior": {},
    "projection": {"time_embed_dim": 1280, "cross_attention_dim": 1536},
    "decoder": CROSS
    | {
        "sample_size": 64,
        "block_out_channels": [320, 640, 960, 1280],
        "in_channels": 3,
        "out_channels": 6,
        "cross_attention_dim": 1536,
        "class_embed_type": "identity",
    },
    "upsampler": {
        "sample_size": 256,
        "layers_per_block": 3,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
        "block_out_channels": [320, 640, 960, 1280],
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
    },
    "image decoder": CROSS
    | {
        "sample_size": 64,
        "block_out_channels": [384, 768, 1152, 1536],
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 768,
        "encoder_hid_dim": 1280,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
    },
    "movq": {
        "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [128, 256, 256, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
        "norm_type": "spatial",
    },
}
"""The public settings of Karlo v1-alpha's networks and of Kandinsky 2.2's decoder and autoencoder, beside diffusers'
defaults."""
PRIORS = {"Karlo": {}, "Kandinsky 2.2": {"embedding_dim": 1280}}
EMBEDDING, LENGTH = 12, 7
_NARROW = {"block_out_channels": [32, 64, 96, 128]}
_CROSS = _NARROW | {"layers_per_block": [1, 2, 1, 1], "attention_head_dim": 16, "cross_attention_dim": 24}
SMALL = {
    "prior": {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 3,
        "embedding_dim": EMBEDDING,
        "num_embeddings": LENGTH,
    },
    "projection": {"clip_embeddings_dim": EMBEDDING, "time_embed_dim": 128, "cross_attention_dim": 24},
    "decoder": _CROSS | {"sample_size": 16},
    "upsampler": _NARROW | {"layers_per_block": 1, "sample_size": 32},
    "image decoder": _CROSS | {"sample_size": 16, "encoder_hid_dim": EMBEDDING},
    "movq": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "num_vq_embeddings": 20},
}
"""Small widths of each network."""
FILE = "diffusion_pytorch_model.safetensors"


def torch_and_diffusers():
    """Both libraries, or the test is skipped."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' networks, which are PyTorch's")
    return torch, pytest.importorskip("diffusers", reason="compared with diffusers' networks")


def class_of(name):
    _, diffusers = torch_and_diffusers()
    if name == "projection":
        # Not exported by diffusers, but by the pipeline's module, which is deprecated.
        reason = "diffusers no longer has Karlo's pipeline"
        return pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj", reason=reason).UnCLIPTextProjModel
    return {
        "prior": diffusers.PriorTransformer,
        "decoder": diffusers.UNet2DConditionModel,
        "upsampler": diffusers.UNet2DModel,
        "image decoder": diffusers.UNet2DConditionModel,
        "movq": diffusers.VQModel,
    }[name]


def tensors_of(shapes, seed=0):
    """Numbers at random for tensors of these names and shapes, as large as keep the outputs near one."""
    rng, drawn = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        values = rng.normal(size=shape)
        if name == "clip_std":
            values = 0.5 + np.abs(values)
        elif len(shape) == 1 and name != "learned_classifier_free_guidance_embeddings":
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        elif name.endswith("weight"):
            values *= np.prod(shape[1:]) ** -0.5 * (0.2 if name == "conv_out.weight" else 1.0)
        drawn[name] = values.astype("f4")
    return drawn


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def public(name):
    """diffusers' public network, without numbers."""
    torch, _ = torch_and_diffusers()
    with torch.device("meta"):
        return class_of(name)(**PUBLIC[name])


def theirs(name, seed=0):
    """diffusers' small network with `tensors_of`."""
    torch, _ = torch_and_diffusers()
    model = class_of(name)(**PUBLIC[name] | SMALL[name]).eval()
    drawn = tensors_of(shapes_of(model), seed)
    model.load_state_dict({key: torch.tensor(value) for key, value in drawn.items()})
    return model


def inputs(name):
    """The arguments of a network, as numpy arrays in diffusers' layout. Of the projections' four captions the first two
    are without an image."""
    rng = np.random.default_rng(1)
    random = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    time, mask = np.asarray([3, 977]), np.arange(LENGTH) < np.asarray([[LENGTH], [3]])
    if name == "prior":
        return {
            "hidden_states": random(2, EMBEDDING),
            "timestep": time,
            "proj_embedding": random(2, EMBEDDING),
            "encoder_hidden_states": random(2, LENGTH, EMBEDDING),
            "attention_mask": mask,
        }
    if name == "projection":
        return {
            "image_embeddings": random(2, EMBEDDING),
            "prompt_embeds": random(4, EMBEDDING),
            "text_encoder_hidden_states": random(4, LENGTH, EMBEDDING),
        }
    if name == "decoder":
        extra = np.ones((2, 4), bool)
        return {
            "sample": random(2, 3, 16, 8),
            "timestep": time,
            "encoder_hidden_states": random(2, 4 + LENGTH, 24),
            "class_labels": random(2, 128),
            "attention_mask": np.concatenate([extra, mask], axis=1),
        }
    if name == "movq":
        return {"code": random(2, 4, 4, 2), "image": random(2, 3, 32, 16)}
    if name == "upsampler":
        return {"sample": random(2, 6, 16, 8), "timestep": time}
    return {"sample": random(2, 4, 16, 8), "timestep": time, "image_embeds": random(2, EMBEDDING)}


def outputs(name, model):
    """What diffusers' network computes from `inputs`."""
    torch, _ = torch_and_diffusers()
    given = {key: torch.tensor(value) for key, value in inputs(name).items()}
    if name == "projection":
        given["do_classifier_free_guidance"] = True
    else:
        given["return_dict"] = False
    if name == "movq":
        with torch.no_grad():
            image = model.decode(given["code"], force_not_quantize=True).sample
            return {"0": image.numpy(), "1": model.encode(given["image"]).latents.numpy()}
    if "image_embeds" in given:
        given |= {"added_cond_kwargs": {"image_embeds": given.pop("image_embeds")}, "encoder_hidden_states": None}
    with torch.no_grad():
        return {str(i): value.numpy() for i, value in enumerate(model(**given))}


def kept(name):
    """What the file has of a network: its settings, shapes and outputs."""
    with np.load(FIXTURE) as file:
        values = {key.partition("/")[2]: file[key] for key in file if key.startswith(f"{name}/")}
    settings, shapes = (json.loads(str(values.pop(key))) for key in ("settings", "shapes"))
    return settings, shapes, values


def write(name, directory, seed=0):
    """A folder as diffusers writes it, from the file alone. Returns the outputs of seed 0."""
    settings, shapes, values = kept(name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors_of(shapes, seed), directory / FILE)
    return values


def check_kept(name):
    """That the file has what diffusers computes."""
    model = theirs(name)
    settings, shapes, values = kept(name)
    assert {key: tuple(shape) for key, shape in shapes.items()} == shapes_of(model)
    now = json.loads(model.to_json_string())
    assert now.keys() >= settings.keys()
    assert {key: now[key] for key in settings if key[0] != "_"} == {
        key: value for key, value in settings.items() if key[0] != "_"
    }
    for key, value in outputs(name, model).items():
        np.testing.assert_allclose(value, values[key], atol=1e-5 * np.abs(value).max())


def make():
    values = {}
    for name in SMALL:
        model = theirs(name)
        values[f"{name}/settings"] = model.to_json_string()
        values[f"{name}/shapes"] = json.dumps(shapes_of(model))
        values |= {f"{name}/{key}": value for key, value in outputs(name, model).items()}
    return values


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **make())

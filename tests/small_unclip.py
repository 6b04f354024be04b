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
PRIORS = {"Karlo": {}, "Kandinsky 2.2": {"embedding_dim": 1280}}
"""The public settings of PriorTransformer; Karlo's are diffusers' defaults."""
SMALL = {
    "prior": {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 3,
        "embedding_dim": 12,
        "num_embeddings": 7,
    },
}
"""Small widths of each network."""
FILE = "diffusion_pytorch_model.safetensors"


def torch_and_diffusers():
    """Both libraries, or the test is skipped."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' networks, which are PyTorch's")
    return torch, pytest.importorskip("diffusers", reason="compared with diffusers' networks")


def class_of(name):
    _, diffusers = torch_and_diffusers()
    return {"prior": diffusers.PriorTransformer}[name]


def tensors_of(shapes, seed=0):
    """Numbers at random for tensors of these names and shapes, as large as keep the outputs near one."""
    rng, drawn = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        values = rng.normal(size=shape)
        if name == "clip_std":
            values = 0.5 + np.abs(values)
        elif len(shape) == 1:
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        elif name.endswith("weight"):
            values *= np.prod(shape[1:]) ** -0.5
        drawn[name] = values.astype("f4")
    return drawn


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def theirs(name, seed=0):
    """diffusers' small network with `tensors_of`."""
    torch, _ = torch_and_diffusers()
    model = class_of(name)(**SMALL[name]).eval()
    drawn = tensors_of(shapes_of(model), seed)
    model.load_state_dict({key: torch.tensor(value) for key, value in drawn.items()})
    return model


def inputs(name):
    """The arguments of a network, as numpy arrays in diffusers' layout."""
    rng = np.random.default_rng(1)
    random = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    time, width, length = np.asarray([3, 977]), SMALL["prior"]["embedding_dim"], SMALL["prior"]["num_embeddings"]
    mask = np.arange(length) < np.asarray([[length], [3]])
    return {
        "hidden_states": random(2, width),
        "timestep": time,
        "proj_embedding": random(2, width),
        "encoder_hidden_states": random(2, length, width),
        "attention_mask": mask,
    }


def outputs(name, model):
    """What diffusers' network computes from `inputs`."""
    torch, _ = torch_and_diffusers()
    with torch.no_grad():
        found = model(**{key: torch.tensor(value) for key, value in inputs(name).items()}, return_dict=False)
    return {"output": found[0].numpy()}


def kept(name):
    """What the file has of a network: its settings, shapes and outputs."""
    with np.load(FIXTURE) as file:
        values = {key.partition("/")[2]: file[key] for key in file if key.startswith(f"{name}/")}
    settings, shapes = (json.loads(str(values.pop(key))) for key in ("settings", "shapes"))
    return settings, shapes, values


def write(name, directory):
    """A folder as diffusers writes it, from the file alone. Returns the outputs."""
    settings, shapes, values = kept(name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors_of(shapes), directory / FILE)
    return values


def make():
    values = {}
    for name in SMALL:
        model = theirs(name)
        values[f"{name}/shapes"] = json.dumps(shapes_of(model))
        values |= {f"{name}/{key}": value for key, value in outputs(name, model).items()}
        values[f"{name}/settings"] = json.dumps(json.loads(model.to_json_string()))
    return values


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **make())

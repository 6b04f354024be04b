"""The public pickle to safetensors: the same numbers, and nothing that a pickle may hold is run."""

import os
import pickle

import numpy as np
import pytest

from experiments import export
from jaxdiff.core import trees
from jaxdiff.weights import hub, inception

torch = pytest.importorskip("torch", reason="PyTorch reads the pickle")


@pytest.fixture(scope="module")
def state():
    shapes = inception._shapes()
    flat = trees.flatten(shapes)
    rng = np.random.default_rng(0)
    return {
        name: torch.tensor(rng.normal(size=hub.theirs_shape(path, flat[path].shape)), dtype=torch.float32)
        for path, name in inception.names(shapes).items()
    }


def test_the_public_file_becomes_safetensors(tmp_path, state, command):
    torch.save(state | {"fc.bias": torch.ones(1008)}, tmp_path / "public.pth")
    file = tmp_path / "new" / "inception.safetensors"
    done = command(export, "inception", "--source", tmp_path / "public.pth", "--out", file)
    assert done.code == 0 and "parameters" in done.out, done.err
    params = inception.load(file)
    np.testing.assert_array_equal(params["classes"]["kernel"], state["fc.weight"].numpy().T)
    found = params["mixed_7c"]["twice_3b"]["norm"]["var"]
    np.testing.assert_array_equal(found, state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].numpy())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_other_files_are_refused(tmp_path, state, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"fc.weight": Evil()}))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({name: value for name, value in state.items() if "7c" not in name}, tmp_path / "less.pth")
    for name, culprit in (
        ("evil", "evil.pth: not a state dict of tensors only"),
        ("text", "text.pth: not a state dict"),
        ("less", "less.pth"),
        ("absent", "absent.pth: no such file"),
    ):
        done = command(export, "inception", "--source", f"{name}.pth", "--out", "out.safetensors")
        assert done.code == 2 and culprit in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()

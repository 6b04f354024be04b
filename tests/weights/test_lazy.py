"""Tensors computed when they are read, and files written of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.weights import lazy, tree

ARRAY = np.arange(24, dtype=np.float32).reshape(6, 4)
DERIVED = {
    "held": (lazy.held(ARRAY), ARRAY),
    "of jax": (lazy.held(jnp.asarray(ARRAY, jnp.bfloat16)), ARRAY),
    "cast": (lazy.cast(lazy.held(ARRAY), "F16"), ARRAY),
    "cast to the same": (lazy.cast(lazy.held(ARRAY), "F32"), ARRAY),
    "transposed": (lazy.transposed(lazy.held(ARRAY)), ARRAY.T),
    "reshaped": (lazy.reshaped(lazy.held(ARRAY), (2, 12)), ARRAY.reshape(2, 12)),
    "rows": (lazy.rows(lazy.held(ARRAY), 2, 5), ARRAY[2:5]),
    "joined": (lazy.joined([lazy.held(ARRAY), lazy.held(ARRAY[:1])]), np.concatenate([ARRAY, ARRAY[:1]])),
    "scalar": (lazy.held(np.asarray(3.0)), np.asarray(3.0)),
    "empty": (lazy.held(np.zeros((0, 3), np.float32)), np.zeros((0, 3))),
}


@pytest.mark.parametrize(("tensor", "wanted"), DERIVED.values(), ids=DERIVED)
def test_values_shapes_and_types(tensor, wanted):
    found = tensor.read()
    np.testing.assert_array_equal(found.astype(np.float64), wanted)
    assert found.shape == tensor.shape and found.dtype == tree.TYPES[tensor.dtype]


def test_reading_respects_the_types(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / "a.safetensors")
    stored, _ = tree.read_header(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="ids holds I64"):
        lazy.rows(stored["ids"], 0, 1).read()
    assert lazy.rows(stored["ids"], 1, 2).read(tree.TYPES).tolist() == [1]


@pytest.mark.parametrize("other", [ARRAY[:, :2], ARRAY.astype(np.float16)], ids=["shape", "type"])
def test_what_cannot_be_joined(other):
    with pytest.raises(ValueError, match="cannot be joined"):
        lazy.joined([lazy.held(ARRAY), lazy.held(other)])


def test_a_file_of_all_kinds(tmp_path):
    """safetensors reads it, and so do we; one tensor is read at a time."""
    tensors = {name: tensor for name, (tensor, _) in DERIVED.items()}
    tree.write_unread(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    numpy = {name: tensor for name, tensor in tensors.items() if tensor.dtype != "BF16"}
    tree.write_unread(tmp_path / "b.safetensors", numpy, {})
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == numpy.keys()
    stored, metadata = tree.read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"} and stored.keys() == tensors.keys()
    for name, (tensor, wanted) in DERIVED.items():
        np.testing.assert_array_equal(stored[name].read().astype(np.float64), wanted)
        assert stored[name].dtype == tensor.dtype
        if name in numpy:
            np.testing.assert_array_equal(loaded[name], tensor.read())


def test_a_wrong_shape_leaves_no_file(tmp_path):
    wrong = lazy.Derived((2, 2), "F32", lambda types: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="wrong is float32"):
        tree.write_unread(tmp_path / "a.safetensors", {"wrong": wrong}, {})
    assert not list(tmp_path.iterdir())


def test_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(tree.shutil, "disk_usage", lambda path: tree.shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(OSError, match="MB needed"):
        tree.write_unread(tmp_path / "a.safetensors", {"a": lazy.held(ARRAY)}, {})

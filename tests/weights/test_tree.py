"""A parameter tree in a file: exact, whole or absent, refused where it does not fit."""

import os
import pickle
import resource
import shlex
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core import trees
from jaxdiff.weights import tree

PARAMS = {
    "encoder": {"block_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}, "scale": jnp.ones(3)},
    "steps": np.array([3, 4], np.int32),
}


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "deep" / "params.safetensors"
    tree.save_tree(path, PARAMS, {"stage": "base", "α": "β"})
    params, metadata = tree.load_tree(path)
    assert metadata == {"stage": "base", "α": "β"}
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert [file.name for file in path.parent.iterdir()] == ["params.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_floats_are_cast(tmp_path, dtype):
    tree.save_tree(tmp_path / "x.safetensors", PARAMS, {}, dtype)
    params, _ = tree.load_tree(tmp_path / "x.safetensors")
    kernel = params["encoder"]["block_0"]["kernel"]
    assert kernel.dtype == jnp.dtype(dtype) and params["steps"].dtype == np.int32
    np.testing.assert_array_equal(kernel, PARAMS["encoder"]["block_0"]["kernel"].astype(jnp.dtype(dtype)))


def test_other_libraries_read_it(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch's reader of the same format")
    from safetensors.torch import load_file

    tree.save_tree(tmp_path / "x.safetensors", PARAMS, {}, "bfloat16")
    read = load_file(tmp_path / "x.safetensors")["encoder/block_0/kernel"]
    assert read.dtype == torch.bfloat16 and read.shape == (2, 3)
    np.testing.assert_allclose(read.float().numpy(), PARAMS["encoder"]["block_0"]["kernel"], rtol=1e-2)


def test_a_leaf_that_is_a_group(tmp_path):
    tree.write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1), "a/b": np.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"x\.safetensors: a(/b)? is a tensor in one place"):
        tree.load_tree(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "complex64"])
def test_only_floating_tensors_are_weights(dtype, tmp_path):
    """Named before anything is read; a tree that is no network's may hold them."""
    path = tmp_path / "model.safetensors"
    wrong = {"encoder": {"kernel": np.ones((2, 3), dtype)}, "head": np.ones(3, "f4")}
    tree.save_tree(path, wrong, {})
    safetensors_name = {"bool": "BOOL", "complex64": "C64"}.get(dtype, dtype.replace("uint", "U").replace("int", "I"))
    expected = rf"1 of another type \(encoder/kernel holds {safetensors_name}\): only F16, BF16, F32, F64 are read"
    with pytest.raises(ValueError, match=expected) as error:
        tree.load_expected(path, wrong)
    assert str(path) in str(error.value)
    np.testing.assert_array_equal(tree.load_tree(path)[0]["encoder"]["kernel"], wrong["encoder"]["kernel"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_all_floating_types_are(dtype, tmp_path):
    path, right = tmp_path / "model.safetensors", {"a": np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype)), "b": {}}
    right["b"]["scalar"], right["b"]["empty"] = np.asarray(2.5, jnp.dtype(dtype)), np.zeros((0, 3), jnp.dtype(dtype))
    tree.save_tree(path, right, {})
    found = tree.load_expected(path, right)
    for name, leaf in trees.flatten(right).items():
        assert trees.flatten(found)[name].dtype == leaf.dtype and trees.flatten(found)[name].shape == leaf.shape
        np.testing.assert_array_equal(trees.flatten(found)[name], leaf)


def test_a_header_is_parsed_once(tmp_path, monkeypatch):
    """Whatever the number of tensors: it would be quadratic for each of them."""
    path = tmp_path / "model.safetensors"
    tree.save_tree(path, {f"k{i:03}": np.full(2, i, "f4") for i in range(300)}, {})
    opened = []
    monkeypatch.setattr(tree, "safe_open", lambda *a, real=tree.safe_open, **o: opened.append(a) or real(*a, **o))
    parse = tree.json_files.parse_object
    monkeypatch.setattr(tree.json_files, "parse_object", lambda *a: opened.append(a) or parse(*a))
    stored, _ = tree.read_header(path)
    for i in (299, 0, 123):
        np.testing.assert_array_equal(stored[f"k{i:03}"].read(), [i, i])
    assert len(opened) == 2


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    tree.save_tree(path, {"a": np.zeros(2, "f4")}, {})
    stored, _ = tree.read_header(path)
    tree.save_tree(path, {"b": np.zeros(200, "f4"), "a": np.zeros(2, "f4")}, {})
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read: load it again"):
        stored["a"].read()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        tree.load_tree(tmp_path / "none.safetensors")


def test_a_type_that_numpy_has_not(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ValueError, match=r"a holds F8_E4M3, only F16, BF16, .*, I64, .* are read"):
        tree.load_tree(path)
    with pytest.raises(ValueError, match=r"1 of another type \(a holds F8_E4M3\): only F16, BF16, F32, F64 are read"):
        tree.load_expected(path, {"a": np.zeros(2)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_whatever_its_name(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}, protocol))
    with pytest.raises(ValueError, match=r"is a pickle, .* convert it .*torch\.load") as error:
        tree.load_tree(path)
    assert "\n" not in str(error.value)


def test_the_advice_for_pickles_works(tmp_path):
    """Tensors that share memory, as T5's tied embeddings do in its pickles, included."""
    torch = pytest.importorskip("torch", reason="writing a pickle of tensors needs PyTorch")
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"shared.weight": shared, "encoder.embed_tokens.weight": shared}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert it") as error:
        tree.refuse_pickle(tmp_path / "pytorch_model.bin")
    _, *arguments = shlex.split(str(error.value).partition("trust it: ")[2])
    subprocess.run([sys.executable, *arguments], check=True)
    loaded, _ = tree.load_tree(tmp_path / "model.safetensors")
    assert loaded.keys() == {"shared.weight", "encoder.embed_tokens.weight"}
    np.testing.assert_array_equal(loaded["shared.weight"], shared.numpy())


def test_the_advice_for_a_training_checkpoint_works(tmp_path):
    """Of which the tensors are a part; others may be beside it."""
    torch = pytest.importorskip("torch", reason="writing a pickle of tensors needs PyTorch")
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "epoch": 3}
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "sd.v1.ckpt")
    with pytest.raises(ValueError, match="convert it") as error:
        tree.refuse_pickle(tmp_path / "sd.v1.ckpt")
    _, *arguments = shlex.split(str(error.value).partition("trust it: ")[2])
    subprocess.run([sys.executable, *arguments], check=True)
    loaded, _ = tree.load_tree(tmp_path / "sd.v1.safetensors")
    assert loaded.keys() == {"a"}
    np.testing.assert_array_equal(loaded["a"], state["a"].numpy())


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x05", b"PK"])
def test_a_file_whose_length_looks_like_a_pickle(tmp_path, start):
    """safetensors begins with the length of its header: any two bytes, those of a pickle included."""
    path, length = tmp_path / "model.safetensors", int.from_bytes(start, "little")
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + np.array([1, 2], "f4").tobytes())
    assert path.read_bytes()[:2] == start
    np.testing.assert_array_equal(tree.load_tree(path)[0]["a"], [1, 2])


def test_a_zipped_pickle_is_refused(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("data.pkl", b"x")
        with pytest.raises(ValueError, match="is a pickle"):
            tree.load_tree(tmp_path / name)


@pytest.mark.parametrize("keep", [0.9, 0.3, 0.01, 0.0])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    tree.save_tree(path, {"a": np.ones(1000, np.float32)}, {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        tree.load_tree(path)


def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tree.save_tree(path, PARAMS, {"old": "yes"})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot save .*x\.safetensors: ") as error:
            tree.save_tree(path, {"a": np.ones(100_000, np.float32)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == before


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5))
    with pytest.raises(OSError, match=r"cannot save .*: 0\.4 MB needed, 0\.0 MB free"):
        tree.save_tree(tmp_path / "x.safetensors", {"a": np.ones(100_000, np.float32)}, {})
    assert os.listdir(tmp_path) == []

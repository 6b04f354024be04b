"""What every public checkpoint is read through: names, layouts, and files that are damaged or point elsewhere."""

import json
import struct

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from jaxdiff.weights import hub

WORDS = {"kernel": "weight", "q": "query"}


def test_names():
    rules = ("head/kernel", "lm.weight"), ("{stack}/block_{i}/{part}/{leaf}", "{stack}.{i}.{part}.{leaf}")
    found = hub.names(["head/kernel", "a/block_12/q/kernel", "b/block_0/q/bias"], rules, WORDS)
    assert found == {
        "head/kernel": "lm.weight",
        "a/block_12/q/kernel": "a.12.query.weight",
        "b/block_0/q/bias": "b.0.query.bias",
    }
    with pytest.raises(ValueError, match="no rule names a/norm/scale"):
        hub.names(["a/norm/scale"], rules, WORDS)
    with pytest.raises(ValueError, match="two parameters have the same name"):
        hub.names(["a/kernel", "b/kernel"], [("{x}/kernel", "same")])


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("a", ()),
        ("a/scale", (3,)),
        ("a/embedding", (3, 4)),
        ("a/kernel", (3, 4)),
        ("a/kernel", (70, 65)),
        ("a/kernel", (2, 5, 3, 4)),
    ],
)
def test_layouts(path, shape):
    array = np.arange(np.prod(shape, dtype=int), dtype="f4").reshape(shape)
    there = hub.theirs(path, array)
    assert there.shape == hub.theirs_shape(path, shape) and there.flags.c_contiguous
    np.testing.assert_array_equal(hub.ours(path, there), array)
    if path == "a/kernel":
        # PyTorch's order: out, in, and then the window.
        assert there[1, 2, *([0] * (len(shape) - 2))] == array[*([0] * (len(shape) - 2)), 2, 1]


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"secret": np.zeros(2, "f4")}, tmp_path / "outside.safetensors")
    save_file({"a": np.ones((2, 3), "f4")}, inside / "model.safetensors")
    return inside


def read(folder):
    return {key: tensor.read() for key, tensor in hub.open_tensors(folder).items()}


def test_variants(folder):
    """Files named .fp16 are read when they are asked for, or when there are no others; in one file or in shards."""
    half = {"a": np.full((2, 3), 2, "f2")}
    save_file(half, folder / "model.fp16.safetensors")
    assert hub.open_tensors(folder)["a"].read().dtype == np.float32
    np.testing.assert_array_equal(hub.open_tensors(folder, "fp16")["a"].read(), half["a"])
    with pytest.raises(FileNotFoundError, match=r"neither model.bf16.safetensors nor diffusion_pytorch_model.bf16"):
        hub.open_tensors(folder, "bf16")
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(read(folder)["a"], half["a"])
    (folder / "model.fp16.safetensors").rename(folder / "model.fp16-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(hub.open_tensors(folder, "fp16")["a"].read(), half["a"])
    np.testing.assert_array_equal(read(folder)["a"], half["a"])


REPOSITORY = (
    *("model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/spiece.model"),
    *(f"unet/diffusion_pytorch_model{mark}.{kind}" for mark in ("", ".fp16") for kind in ("safetensors", "bin")),
    *(f"text_encoder/model{number}-of-00002.safetensors" for number in ("-00001", "-00002")),
    *(f"text_encoder/model.fp16{number}-of-00002.safetensors" for number in ("-00001", "-00002")),
    "safety_checker/model.safetensors",
)
ALWAYS = {name for name in REPOSITORY if name.endswith((".json", ".model"))}


def hub_of(repository, tmp_path, monkeypatch):
    """Downloads from a list of names, and what each download asked for."""
    asked = []

    def download(hub_id, revision, allow_patterns):
        asked.append(set(filter_repo_objects(repository, allow_patterns=allow_patterns)))
        for name in asked[-1]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def test_only_what_is_wanted_is_downloaded(tmp_path, monkeypatch):
    asked = hub_of(REPOSITORY, tmp_path, monkeypatch)
    folders = "unet", "text_encoder"
    hub.directory_of("some/cascade", folders=folders)
    plain = {name for name in REPOSITORY if name.endswith(".safetensors") and name.startswith(folders)}
    plain = {name for name in plain if "fp16" not in name}
    assert asked == [ALWAYS | plain] and len(plain) == 3
    hub.directory_of("some/cascade", folders=folders, variant="fp16")
    assert asked[1] == ALWAYS | {name for name in REPOSITORY if "fp16" in name and name.endswith(".safetensors")}


def test_what_the_hub_says_is_said_whole(monkeypatch):
    """What to do about a licence stands behind its first line."""

    def refuse(*args, **options):
        raise OSError("401 Client Error.\n\nAccess to it is restricted: accept its licence and log in.")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=r"401 Client Error. Access to it is restricted: accept its licence and log in."
    ):
        hub.directory_of("some/cascade")


def test_a_repository_of_one_variant(tmp_path, monkeypatch):
    asked = hub_of(["config.json", "model.fp16.safetensors", "model.bin"], tmp_path, monkeypatch)
    assert hub.directory_of("some/t5") == tmp_path
    assert asked == [{"config.json"}, {"config.json", "model.fp16.safetensors"}]
    with pytest.raises(ValueError, match="holds no safetensors of the variant bf16; pickles are not read"):
        hub.directory_of("some/t5", folders=("unet",), variant="bf16")


NAMES = ["../outside.safetensors", "/etc/passwd", "b/../c", 3, None, "x" * 10**6, "\x1b[2J", "a\x00"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_an_index_names_files_beside_it_alone(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
    with pytest.raises(ValueError, match="which is not the name of a file beside it") as error:
        read(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_tensor_in_two_shards_is_the_one_of_the_index(folder):
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({"a": np.full(1, number, "f4"), f"only{number}": np.zeros(1, "f4")}, folder / f"{number}.safetensors")
    for number in (1, 2):
        listed = {"a": f"{number}.safetensors", "only1": "1.safetensors", "only2": "2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        assert read(folder)["a"] == number and len(read(folder)) == 3


@pytest.mark.parametrize("text", ["[1]", '"t5"', "{", "\x00"])
def test_settings_that_are_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not JSON with settings"):
        hub.read_json(folder / "config.json")


def test_damaged_headers(folder):
    """Truncated anywhere, or with any bit of the header flipped: read as it was meant, or refused in one line."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = [whole[:count] for count in range(len(whole))]
    for place in range(header):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert sum(array.nbytes for array in found.values()) <= len(whole)
    assert refused > 0.8 * len(damaged)


def test_huge_promises(folder):
    """A header that declares a terabyte, or a header of a terabyte, takes no memory."""
    path = folder / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ValueError, match="truncated or damaged"):
        read(folder)
    path.write_bytes(struct.pack("<Q", 1 << 40) + header)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read(folder)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("BOOL", 1),
        ("U8", 1),
        ("I8", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("F8_E8M0", 1),
        ("I16", 2),
        ("I64", 8),
        ("C64", 8),
    ],
)
def test_types_that_are_not_read(folder, dtype, size):
    header = json.dumps({"a": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * size]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6 * size))
    with pytest.raises(ValueError, match=rf"model.safetensors: a holds {dtype}, only F16, BF16, F32, F64 are read"):
        read(folder)

"""Flax's msgpack files: written by Flax, and malformed ones."""

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization

from jaxdiff.core.trees import flatten
from jaxdiff.weights import flax_files, lazy

RNG = np.random.default_rng(0)
TREE = {
    "a": {"kernel": RNG.normal(size=(3, 4)).astype("f4"), "scale": np.full((), 2.0, "f4")},
    "empty": {"x": np.zeros((0, 5), "f2")},
    "long": {f"layer_{i}": {"bias": np.arange(i, dtype="f8")} for i in range(40)},
    "half": jnp.asarray(RNG.normal(size=70_000), jnp.bfloat16),
    "tiny": np.ones(1, "u1"),
}


def test_round_trip(tmp_path):
    """What Flax writes is read, and what is written Flax reads: all types, lengths and nestings."""
    path, again = tmp_path / "theirs.msgpack", tmp_path / "ours.msgpack"
    path.write_bytes(serialization.msgpack_serialize(TREE))
    wanted, index = flatten(TREE), flax_files.read_index(path)
    assert index.keys() == wanted.keys()
    for name, array in wanted.items():
        values = index[name].read(flax_files.tree.TYPES)
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(values, "f8"), np.asarray(array, "f8"))
    flax_files.write(again, {name: lazy.held(np.asarray(array)) for name, array in wanted.items()})
    restored = flatten(serialization.msgpack_restore(again.read_bytes()))
    for name, array in wanted.items():
        assert np.shape(restored[name]) == np.shape(array) and restored[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(restored[name], "f8"), np.asarray(array, "f8"))
    flax_files.write(again, flax_files.read_index(path), "float16")
    assert {tensor.dtype for tensor in flax_files.read_index(again).values()} == {"F16", "U8"}


def test_too_large(tmp_path):
    huge = lazy.Derived((2**30, 4), "F32", lambda types: np.zeros(1))
    with pytest.raises(ValueError, match="a/b is too large for msgpack"):
        flax_files.write(tmp_path / "x.msgpack", {"a/b": huge})
    assert not list(tmp_path.iterdir())


def packed(shape=(2,), dtype="float32", data=bytes(8), kind=1):
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends in the middle"),
        (b"\x80", "no tensors"),
        (b"\x81\xa1a", "ends in the middle"),
        (msgpack.packb([1, 2]), "a map is missing at byte 0"),
        (msgpack.packb({"a": 1}), "'a' is neither a map nor an array"),
        (msgpack.packb({1: packed()}), "a name is missing"),
        (msgpack.packb({"a/b": packed()}), "has a slash"),
        (b"\x82" + 2 * msgpack.packb({"a": packed()})[1:], "occurs twice"),
        (msgpack.packb({"a": packed()}) + b"\x00", "goes on after its last tensor"),
        (msgpack.packb({"a": packed(shape=(3,))}), "another size than its shape"),
        (msgpack.packb({"a": packed(shape=(-2,))}), "a size is missing"),
        (msgpack.packb({"a": packed(shape=(2**40, 2**40))}), "another size than its shape"),
        (msgpack.packb({"a": packed(dtype="object")}), "unknown type 'object'"),
        (msgpack.packb({"a": packed(kind=2)}), "is no array"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\x93\x91")}), "ends in the middle"),
        (msgpack.packb({"a": packed()})[:-3], "is incomplete"),
        (b"\x81\xa1a" * 100 + msgpack.packb({}), "nested more than 64"),
        (b"\x81\xdb\xff\xff\xff\xff", "a name of 4294967295 bytes"),
        (b"\x81\xa2\xff\xff" + msgpack.packb({}), "not UTF-8"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "in pieces of 1 GiB"),
        (b"PK\x03\x04" + bytes(30), "a map is missing"),
    ],
)
def test_malformed(content, message, tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        flax_files.read_index(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_every_cut_and_changed_byte_is_a_clean_error(tmp_path):
    """Whatever the bytes are, reading ends in a ValueError or in tensors within the file."""
    path = tmp_path / "flax_model.msgpack"
    whole = msgpack.packb({"a": {"b": packed(), "c": packed((1, 2))}, "d": packed((2, 1))})
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a msgpack file"):
            flax_files.read_index(path)
    for _ in range(300):
        changed = bytearray(whole)
        changed[RNG.integers(len(whole))] = RNG.integers(256)
        path.write_bytes(bytes(changed))
        try:
            index = flax_files.read_index(path)
        except ValueError:
            continue
        assert all(tensor.read(flax_files.tree.TYPES).shape == tensor.shape for tensor in index.values())


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        flax_files.read_index(tmp_path / "nowhere.msgpack")

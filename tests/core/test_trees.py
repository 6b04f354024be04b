"""Parameter trees: names of leaves, what does not fit, digests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core import trees

PARAMS = {
    "encoder": {"block_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}, "scale": jnp.ones(3)},
    "steps": np.array([3, 4], np.int32),
}


def test_flatten_and_back():
    flat = trees.flatten(PARAMS)
    assert list(flat) == ["encoder/block_0/kernel", "encoder/scale", "steps"]
    assert jax.tree.structure(trees.unflatten(flat)) == jax.tree.structure(PARAMS)
    with pytest.raises(ValueError, match="'b/c' holds a slash"):
        trees.flatten({"a": {"b/c": 1}})


def test_check_names_what_does_not_fit():
    trees.check_tree(PARAMS, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)), "x")
    expected = {"encoder": {"block_0": {"kernel": np.zeros((3, 2))}, "bias": np.zeros(1)}, "steps": np.zeros(2)}
    with pytest.raises(ValueError) as error:
        trees.check_tree(PARAMS, expected, "base.safetensors")
    assert str(error.value) == (
        "base.safetensors does not fit the settings: 1 missing (encoder/bias); 1 unexpected (encoder/scale); "
        "1 of another shape (encoder/block_0/kernel (2, 3), not (3, 2))"
    )


def test_check_lists_ten_and_the_count():
    with pytest.raises(ValueError) as error:
        trees.check_tree({}, {f"k{i:02}": np.zeros(1) for i in range(25)}, "x")
    message = str(error.value)
    assert "25 missing (k00, k01" in message and "k09, …)" in message and "k10" not in message


def test_names_out_of_files_are_escaped_and_cut():
    have = {"\x1b[2Jred": np.zeros(1), "x" * 10**6: np.zeros(1), "a": np.zeros((2,) * 30)}
    with pytest.raises(ValueError) as error:
        trees.check_tree(have, {"a": np.zeros(1), "b\nc": np.zeros(1)}, "x")
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    assert r"2 unexpected (\x1b[2Jred, xxx" in message and "1 missing (b c)" in message


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a": 1, "a/b/c": 2}], ids=str)
def test_a_leaf_that_is_a_group(flat):
    """In any order of the names, each of which would lose a tensor."""
    with pytest.raises(ValueError, match="is a tensor in one place and a group of tensors in another"):
        trees.unflatten(flat)


def test_digests_tell_weights_apart():
    params = {"b": np.ones((2, 3), np.float32), "a": np.zeros(2, np.float32)}
    turned = {"a": params["a"], "b": jnp.asarray(params["b"])}
    digest = trees.digest_of(params)
    assert digest == trees.digest_of(turned) and len(digest) == 12
    others = params | {"a": np.ones(2, np.float32)}, {"b": params["b"], "c": params["a"]}
    for other in (*others, params | {"b": np.ones((3, 2), np.float32)}, params | {"b": np.ones((2, 3), np.float16)}):
        assert trees.digest_of(other) != digest

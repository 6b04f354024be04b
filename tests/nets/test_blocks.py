"""The parts of the U-Nets, each against what it is in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets import blocks
from jaxdiff.nets.blocks import AttentionBlock, Norm, Resample, ResBlock
from jaxdiff.nets.conditioning import AttentionPool, TextContext

RNG = np.random.default_rng(0)
PICTURE = RNG.normal(size=(2, 4, 6, 3)).astype(np.float32)
TEXT = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)
MASK = jnp.arange(5) < jnp.asarray([3, 0])[:, None]
KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default generator


def random_like(module, *inputs, seed=0):
    """Parameters of a module, none of which is zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return {"params": jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)}


def compiled(module):
    """One program in place of dozens of little ones."""
    return jax.jit(module.apply)


def test_sines_and_cosines():
    found = blocks.sinusoidal(jnp.asarray([0.0, 1.0, 700.0]), 6)
    frequencies = np.array([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    angles = np.array([0.0, 1.0, 700.0])[:, None] * frequencies
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)


def test_neighbouring_times_differ():
    """Sampling takes steps of 1 in 1000: no two times may look alike."""
    found = np.asarray(blocks.sinusoidal(jnp.arange(1001.0), 128), np.float64)
    distance = np.linalg.norm(found[1:] - found[:-1], axis=1)
    assert distance.min() > 0.5
    far = np.linalg.norm(found[:, None, :] - found[None, ::50, :], axis=-1)
    assert np.sort(far, axis=0)[1].min() > 0.5


def test_pixels_folded_into_channels():
    folded = blocks.space_to_depth(jnp.asarray(PICTURE), 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2].reshape(2, 2, 3), PICTURE[1, 2:4, 4:6])
    np.testing.assert_array_equal(blocks.depth_to_space(folded, 2), PICTURE)
    np.testing.assert_array_equal(blocks.space_to_depth(jnp.asarray(PICTURE), 1), PICTURE)


def test_halving_and_doubling():
    x = jnp.asarray(PICTURE)
    half = blocks.resize(x, Resample.DOWN)
    np.testing.assert_allclose(half[0, 1, 2], PICTURE[0, 2:4, 4:6].mean((0, 1)), atol=1e-6)
    double = blocks.resize(x, Resample.UP)
    assert double.shape == (2, 8, 12, 3)
    np.testing.assert_array_equal(double[0, 4:6, 2:4, 1], np.full((2, 2), PICTURE[0, 2, 1, 1]))
    np.testing.assert_allclose(blocks.resize(double, Resample.DOWN), x, atol=1e-6)
    assert blocks.resize(x, Resample.NONE) is x


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (12, 2), (48, 8), (64, 16), (128, 32), (6, 1)])
def test_norm(channels, groups):
    """Each sample and group of its own, in float32 even for bfloat16 input far from zero."""
    x = 100 + np.random.default_rng(1).normal(size=(2, 8, 8, channels)).astype(np.float32)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    variables = {"params": {"GroupNorm_0": {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}}}
    found = compiled(Norm(jnp.float32))(variables, jnp.asarray(x, jnp.bfloat16))
    grouped = x.astype(np.float64).reshape(2, 64, groups, -1)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    np.testing.assert_allclose(found, ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), atol=5e-3)


def test_text_context_keeps_one_token_for_pictures_without_text():
    module = TextContext(8)
    variables = random_like(module, TEXT, MASK)
    apply = compiled(module)
    tokens, mask = apply(variables, TEXT, MASK)
    assert tokens.shape == (2, 6, 8)
    np.testing.assert_array_equal(mask, np.concatenate([[[True], [True]], MASK], 1))
    np.testing.assert_array_equal(tokens[0, 0], tokens[1, 0])
    again, _ = apply(variables, jnp.where(MASK[..., None], TEXT, jnp.nan), MASK)
    np.testing.assert_array_equal(again, tokens)


def test_pooling_reads_the_written_tokens_in_any_order():
    module, tokens = AttentionPool(2, 7), jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 6)), jnp.float32)
    mask = jnp.asarray([[True, True, True, False, False], [True, False, False, False, False]])
    variables = random_like(module, tokens, mask)
    apply = compiled(module)
    pooled = apply(variables, tokens, mask)
    assert pooled.shape == (2, 7)
    others = tokens.at[0, 3:].set(9.0).at[1, 1:].set(-9.0)
    np.testing.assert_allclose(apply(variables, others, mask), pooled, atol=1e-6)
    np.testing.assert_allclose(apply(variables, tokens[:, [2, 0, 1, 3, 4]], mask)[0], pooled[0], atol=1e-5)
    assert np.abs(apply(variables, tokens.at[0, 2, 1].add(1.0), mask)[0] - pooled[0]).max() > 1e-3


def test_fresh_residual_blocks_pass_the_picture_on():
    """The last convolution starts at zero: a fresh block is its residual path, whatever the embedding."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 6, 8)), jnp.float32)
    embedding = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5)), jnp.float32)
    variables = jax.jit(ResBlock(8).init)(KEY, x, embedding)
    for resample in Resample:
        found = compiled(ResBlock(8, resample))(variables, x, embedding)
        np.testing.assert_array_equal(found, blocks.resize(x, resample))
    block = AttentionBlock(2, feed_forward=2)
    context, mask = jnp.ones((2, 3, 5)), jnp.ones((2, 3), bool)
    variables = jax.jit(block.init)(KEY, x, context, mask)
    np.testing.assert_array_equal(compiled(block)(variables, x, context, mask), x)


def test_projection_wherever_the_width_changes_or_is_asked_for():
    x, embedding = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 5))

    def kernels(block):
        shapes = jax.eval_shape(block.init, jax.random.key(0), x, embedding)["params"]
        return [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.shape[:2] == (1, 1) and leaf.ndim == 4]

    assert kernels(ResBlock(8)) == []
    assert kernels(ResBlock(12)) == [(1, 1, 8, 12)]
    assert kernels(ResBlock(8, project=True)) == [(1, 1, 8, 8)]


def test_scale_and_shift_come_from_the_embedding():
    """norm · (1 + scale) + shift: with the first dense layer's output known, the block's can be written out."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 4, 8)), jnp.float32)
    embedding = jnp.ones((1, 5))
    block = ResBlock(8)
    params = random_like(block, x, embedding)["params"]
    scale, shift = np.linspace(-1, 1, 8), np.linspace(0, 2, 8)
    params["Dense_0"] = {"kernel": jnp.zeros((5, 16)), "bias": jnp.asarray(np.concatenate([scale, shift]), jnp.float32)}
    found = compiled(block)({"params": params}, x, embedding)

    def norm(value, name):
        inner = params[name]["GroupNorm_0"]
        variables = {"params": {"GroupNorm_0": inner}}
        return Norm().apply(variables, value)

    def conv(value, name):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(value, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        return out + params[name]["bias"]

    @jax.jit
    def written_out(x):
        y = conv(jax.nn.silu(norm(x, "Norm_0")), "Conv_0")
        return x + conv(jax.nn.silu(norm(y, "Norm_1") * (1 + scale) + shift), "Conv_1")

    np.testing.assert_allclose(found, written_out(x), atol=1e-3)


def test_attention_block_reads_pixels_and_written_text():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 2, 3, 8)), jnp.float32)
    context = jnp.asarray(np.random.default_rng(7).normal(size=(2, 5, 6)), jnp.float32)
    mask = MASK.at[1, 0].set(True)
    for itself in (True, False):
        block = AttentionBlock(2, self_attention=itself)
        variables = random_like(block, x, context, mask)
        apply = compiled(block)
        found = apply(variables, x, context, mask)
        same = apply(variables, x, context.at[0, 3:].set(7.0), mask)
        np.testing.assert_array_equal(found, same)
        other = apply(variables, x, context.at[0, 2, 1].add(1.0), mask)
        assert np.abs(other[0] - found[0]).max() > 1e-3
        np.testing.assert_allclose(other[1], found[1], atol=1e-5)
        names = set(variables["params"])
        assert ({"k", "v"} <= names) is itself and {"text_k", "text_v", "q", "out"} <= names


def test_output_is_float32():
    assert blocks.to_float32(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32

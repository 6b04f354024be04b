"""The patch discriminator: how far a logit sees, and that samples are independent."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core import trees
from jaxdiff.nets import discriminator
from jaxdiff.nets.discriminator import Discriminator, DiscriminatorConfig

CONFIG = DiscriminatorConfig(channels=4, layers=2)


@partial(jax.jit, static_argnums=0)
def logits(config, params, x):
    return Discriminator(config).apply({"params": params}, x)


@pytest.fixture(scope="module")
def params():
    """Of about unit size, so that every logit differs."""
    shapes = jax.eval_shape(lambda: discriminator.init(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def test_published_size():
    """LDM's three layers: 2.77 million parameters with batch norm's scales and biases, here group norm's."""
    shapes = jax.eval_shape(lambda: discriminator.init(DiscriminatorConfig(), jax.random.key(0)))
    torch_count = 4 * 4 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == torch_count + 128 + 256 + 512  # biases before a norm
    x = jax.ShapeDtypeStruct((1, 256, 256, 3), "f4")
    assert jax.eval_shape(partial(logits, DiscriminatorConfig()), shapes, x).shape == (1, 30, 30)


def test_patches(params):
    """Without norms, a logit depends on exactly the pixels of its patch: 34 with two layers."""
    config = replace(CONFIG, norm=False)
    params = {name: leaf for name, leaf in params.items() if not name.startswith("norm")}
    gradient = jax.grad(lambda x: logits(config, params, x)[0, 6, 6])(jnp.ones((1, 64, 64, 3)) * 0.1)
    rows = np.flatnonzero(np.abs(gradient).max((0, 2, 3)))
    assert rows[-1] - rows[0] + 1 == len(rows) == 34


def test_samples_are_independent(params):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16, 16, 3)), jnp.float32)
    together, alone = logits(CONFIG, params, x), logits(CONFIG, params, x[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    assert together.shape == (3, 2, 2) and np.ptp(together) > 0.1
    half = logits(replace(CONFIG, dtype="bfloat16"), params, x)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - together).max() < 0.1 * np.abs(together).max()


def test_sizes():
    """The smallest images have one logit; smaller ones are refused."""
    shapes = jax.eval_shape(lambda: discriminator.init(CONFIG, jax.random.key(0)))
    assert {name.split("/")[0] for name in trees.flatten(shapes)} == {
        *("conv_0", "conv_1", "conv_2", "norm_1", "norm_2", "head")
    }
    small = jax.ShapeDtypeStruct((1, 12, 12, 3), "f4")
    assert jax.eval_shape(partial(logits, CONFIG), shapes, small).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="a discriminator of 2 layers needs images of 12 pixels"):
        logits(CONFIG, shapes, jnp.zeros((1, 8, 16, 3)))

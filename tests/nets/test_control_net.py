"""The ControlNet's module: what it reads, and how it is executed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import executed, filled

from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig

UNET = LatentUNetConfig(
    channels=8, multipliers=(1, 2), blocks=(1, 1), transformer_layers=(0, 2), middle_layers=2, heads=(1, 2),
    cross_only=(False, False), norm_groups=4,
)  # fmt: skip
TINY = ControlNetConfig(UNET, hint_widths=(4, 6))
RNG = np.random.default_rng(0)
X, HINT, TOKENS = (
    jnp.asarray(RNG.uniform(size=shape), jnp.float32) for shape in ((2, 4, 4, 4), (2, 8, 8, 3), (2, 3, 6))
)
INPUTS = X, jnp.asarray([5.0, 700.0]), HINT, Conditioning(tokens=TOKENS)


@partial(jax.jit, static_argnums=0)
def forward(config, params, *inputs):
    return config.module().apply({"params": params}, *inputs)


def shapes_of(config, inputs=INPUTS):
    return jax.eval_shape(config.module().init, jax.random.key(0), *inputs)["params"]


def test_maps_and_their_execution():
    """One map for each skip and the middle; scan and bfloat16 change nothing but rounding."""
    params = filled(shapes_of(TINY))
    wanted = forward(TINY, params, *INPUTS)
    sizes = [(2, 4, 4, 8), (2, 4, 4, 8), (2, 2, 2, 8), (2, 2, 2, 16), (2, 2, 2, 16)]
    assert [each.shape for each in wanted] == sizes
    assert len([name for name in params if name.startswith("zero_")]) == 5
    looped = forward(replace(TINY, unet=executed(UNET, scan=True)), params, *INPUTS)
    half = forward(replace(TINY, unet=executed(UNET, dtype="bfloat16")), params, *INPUTS)
    for one, same, near in zip(wanted, looped, half):
        np.testing.assert_allclose(same, one, atol=1e-5)
        assert near.dtype == jnp.bfloat16
        assert np.abs(near.astype(jnp.float32) - one).max() < 0.1 * np.abs(one).max()


def test_channels_beside_the_latents():
    """Read if the settings count them, and left out if they count the latents alone."""
    given = INPUTS[3]._replace(concat=jnp.zeros((2, 4, 4, 5)))
    for inputs in (4, 9):
        shapes = shapes_of(replace(TINY, inputs=inputs), (*INPUTS[:3], given))
        assert shapes["stem"]["kernel"].shape == (3, 3, inputs, 8)
    with pytest.raises(ValueError, match="a ControlNet of 9 channels, for 4 and 0 beside them"):
        shapes_of(replace(TINY, inputs=9))


@pytest.mark.parametrize("sides", [(8, 4), (4, 4), (7, 8), (9, 8), (16, 16)])
def test_hints_of_another_size(sides):
    message = f"a hint of {sides[0]}×{sides[1]} pixels: this input needs 8×8"
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY, (*INPUTS[:2], jnp.zeros((2, *sides, 3)), INPUTS[3]))


def test_number_of_levels():
    assert [replace(TINY, hint_widths=(4,) * n).hint_stride for n in (1, 2, 4)] == [1, 2, 8]
    assert ControlNetConfig().hint_stride == 8
    with pytest.raises(ValueError, match="at least one level"):
        replace(TINY, hint_widths=())

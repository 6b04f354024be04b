"""The autoencoder's networks. Parity with diffusers is in tests/weights/test_autoencoder_weights.py."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small

from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, Part, VQBottleneck
from jaxdiff.nets.autoencoder_norms import GroupNorm, Region, normalized

CONFIG = replace(small.VQ8, channels=(4, 8, 8), blocks=1, attention_levels=(2,))
PARAMS = small.random_params(CONFIG)


@partial(jax.jit, static_argnums=(0, 3, 4))
def run(config, params, x, method, part=Part.ALL):
    return config.module().apply({"params": params}, x, part, method=method)


def test_nearest_codes():
    """Against all distances in double precision; of equal entries the first."""
    rng = np.random.default_rng(0)
    code, codebook = rng.normal(size=(2, 3, 5, 4)).astype("f4"), rng.normal(size=(30, 4)).astype("f4")
    codebook[7] = codebook[3]
    code[0, 0, 0] = codebook[3]
    wanted = ((code[..., None, :].astype("f8") - codebook.astype("f8")) ** 2).sum(-1).argmin(-1)
    quantized, indices = nets.quantize(jnp.asarray(code), jnp.asarray(codebook))
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(quantized, codebook[wanted])
    assert indices[0, 0, 0] == 3
    gradient = jax.grad(lambda code: nets.quantize(code, jnp.asarray(codebook))[0].sum())(jnp.asarray(code))
    assert not gradient.any()


def test_nearest_codes_in_parts(monkeypatch):
    """A codebook so large that only some positions are compared at a time."""
    rng = np.random.default_rng(1)
    code, codebook = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 5, 5, 2), (30, 2)))
    wanted = nets.nearest(code, codebook)
    monkeypatch.setattr(nets, "LARGEST_LOGITS", 7 * 30)
    np.testing.assert_array_equal(nets.nearest(code, codebook), wanted)


def test_attention_in_parts(monkeypatch):
    """Of an image with too many pixels for all logits at once; 35 queries divide into 5 or 7 parts."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 7, 8)), jnp.float32)
    block = nets.AttentionBlock(4, "float32")
    variables = jax.jit(block.init)(jax.random.key(0), x)
    wanted = block.apply(variables, x)
    monkeypatch.setattr(nets, "LARGEST_LOGITS", 35 * 35 // 4)
    text = str(jax.make_jaxpr(lambda x: block.apply(variables, x))(x))
    assert "scan" in text and "7,35" in text
    np.testing.assert_allclose(block.apply(variables, x), wanted, atol=1e-5)


@pytest.mark.parametrize(("method", "level"), [("encode", 1), ("decode", 0), ("decode", 2)])
def test_fine_and_coarse_parts(method, level):
    """One after the other they are the network, wherever attention starts."""
    config = replace(CONFIG, attention_levels=(level,) if level < 2 else ())
    params = small.random_params(config)
    x = small.image(8, 12) if method == "encode" else np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype("f4")
    order = (Part.FINE, Part.COARSE) if method == "encode" else (Part.COARSE, Part.FINE)
    middle = run(config, params, x, method, order[0])
    assert middle.shape[1:3] == (8 // 2**level, 12 // 2**level)
    np.testing.assert_allclose(
        run(config, params, middle, method, order[1]), run(config, params, x, method), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_reach(method):
    """A change of the input beyond the reach of a feature leaves it as it is, with given statistics."""
    config = replace(CONFIG, channels=(4, 4, 4), attention_levels=(), norm_groups=2)
    params, module, n = small.random_params(config), config.module(), 32
    reach = config.encoder_reach if method == "encode" else config.decoder_reach
    shape = (1, 4 * n, 4, 3) if method == "encode" else (1, n, 1, 4)
    all_of = jnp.array([0.0, 1.0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    region = Region(all_of, all_of, jnp.bool_(False))

    def fine(statistics, x):
        variables = {"params": params, "statistics": statistics}
        return module.apply(variables, x, Part.FINE, region, method=method, mutable=["moments"])

    shapes = jax.eval_shape(fine, {}, x)[1]["moments"]
    given = jax.jit(lambda x: fine(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes), x)[0])

    unit = x.shape[1] // n
    changed = np.abs(given(x) - given(x.at[:, : 16 * unit].add(1.0))).max((0, 2, 3)).reshape(n, -1).max(1)
    assert changed[16 : 16 + reach - 1].max() > 0 and changed[16 + reach :].max() == 0
    changed = np.abs(given(x) - given(x.at[:, 16 * unit :].add(1.0))).max((0, 2, 3)).reshape(n, -1).max(1)
    assert changed[: 16 - reach].max() == 0


def test_statistics_of_a_region():
    """The moments are those of the area; the given ones are used unless `own`."""
    norm = GroupNorm(2, "float32")
    x = jnp.asarray(np.random.default_rng(3).normal(1.0, 2.0, size=(2, 4, 8, 6)), jnp.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.5, norm.init(jax.random.key(0), x)["params"])
    region = Region(jnp.array([0.25, 1.0]), jnp.array([0.0, 0.5]), jnp.bool_(True))
    area = x[:, 1:, :4].reshape(2, 3, 4, 2, 3)
    mean, variance = area.mean((1, 2, 4)), area.var((1, 2, 4))

    def by_hand(mean, variance):
        mean, variance = (np.repeat(s, 3, axis=1)[:, None, None] for s in (mean, variance))
        return 1.5 * (x - mean) / np.sqrt(variance + 1e-6) + 0.5

    given = {"mean": np.full((2, 2), 0.3, "f4"), "variance": np.full((2, 2), 2.0, "f4")}
    for own, used in ((True, (mean, variance)), (False, given.values())):
        variables = {"params": params, "statistics": given}
        y, state = norm.apply(variables, x, region._replace(own=jnp.bool_(own)), mutable=["moments"])
        np.testing.assert_allclose(y, by_hand(*used), atol=1e-5)
        np.testing.assert_allclose(state["moments"]["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(state["moments"]["variance"], variance, rtol=1e-5)


def test_layer_norm():
    """Each pixel by itself: its mean and deviation over the channels."""
    config = replace(CONFIG, channels=(4, 8), attention_levels=(), middle_attention=False, norm_groups=0)
    params = small.random_params(config)
    x = jnp.asarray(small.image(32, 4))
    changed = np.abs(run(config, params, x, "encode") - run(config, params, x.at[:, :2].add(1.0), "encode"))
    assert changed[:, 0].max() > 0.01 and changed[:, -4:].max() == 0
    norm = params["encoder"]["head_norm"]
    seen = np.random.default_rng(0).normal(3.0, 2.0, size=(1, 2, 2, 8)).astype("f4")
    by_hand = (seen - seen.mean(-1, keepdims=True)) / np.sqrt(seen.var(-1, keepdims=True) + 1e-6)

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return normalized((0, "float32", "norm"), x)

    y = Alone().apply({"params": {"norm": norm}}, jnp.asarray(seen))
    np.testing.assert_allclose(y, by_hand * norm["scale"] + norm["bias"], atol=1e-5)


def test_local_encoder():
    """A code depends on its own pixels alone, and on all of them; the decoder reaches further."""
    config = replace(
        CONFIG, channels=(4, 8, 8), attention_levels=(), middle_attention=False, norm_groups=0, local_encoder=True
    )
    params, x = small.random_params(config), jnp.asarray(small.image(16, 16))
    codes = run(config, params, x, "encode")
    assert codes.shape[1:3] == (4, 4) and config.encoder_reach == 0
    for row, column in ((4, 8), (7, 11)):
        changed = np.abs(run(config, params, x.at[:, row, column].add(1.0), "encode") - codes).max((0, 3))
        assert changed[1, 2] > 1e-3 and np.count_nonzero(changed) == 1
    changed = np.abs(run(config, params, codes.at[:, 1, 2].add(1.0), "decode") - run(config, params, codes, "decode"))
    assert changed[:, :4].max() > 1e-3


def test_bfloat16():
    """Finite, and near float32; of a large offset, whose variance would be lost without float32 statistics."""
    image = small.image(16, 16)
    half = replace(CONFIG, dtype="bfloat16")
    for method, x in (("encode", image), ("decode", np.random.default_rng(0).normal(size=(2, 2, 2, 5)).astype("f4"))):
        exact, rounded = run(CONFIG, PARAMS, x, method), run(half, PARAMS, x, method)
        assert rounded.dtype == jnp.float32 and np.isfinite(rounded).all()
        assert 0 < np.abs(exact - rounded).max() < 0.2 * np.abs(exact).max()
    norm = GroupNorm(1, "bfloat16")
    x = (200.0 + 2.0 * (jnp.arange(64) % 2)).reshape(1, 8, 8, 1).astype(jnp.bfloat16)
    y = norm.apply({"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}, x)
    np.testing.assert_array_equal(np.unique(np.asarray(y, "f4")), [-1.0, 1.0])


def test_derivatives():
    """`jax.jvp` is the difference quotient; with rematerialization the backward pass repeats every block."""
    config = replace(CONFIG, channels=(4,), norm_groups=2, attention_levels=())
    params, image = small.random_params(config), jnp.asarray(small.image(8, 8))

    def of(x):
        return run(config, params, x, "encode")

    direction = np.random.default_rng(0).normal(size=image.shape).astype("f4")
    _, tangent = jax.jvp(of, (image,), (direction,))
    quotient = (of(image + 2e-3 * direction) - of(image - 2e-3 * direction)) / 4e-3
    np.testing.assert_allclose(tangent, quotient, atol=2e-2 * np.abs(tangent).max())
    for remat, count in ((False, 0), (True, 4)):  # three residual blocks and the attention
        module = replace(config, remat=remat).module()
        gradient = jax.grad(lambda p, module=module: module.apply({"params": p}, image, method="encode").sum())
        assert str(jax.make_jaxpr(gradient)(params)).count("= remat2[") == count


def test_initial_parameters():
    """float32; a codebook within ±1/codes; the encoder of VQ has no log-variances."""
    config = AutoencoderConfig((4,), 1, 4, norm_groups=2, middle_attention=False, bottleneck=VQBottleneck(50, 5))
    params = jax.jit(partial(nets.init, config))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
    assert params["codebook"].shape == (50, 5) and 0.015 < np.abs(params["codebook"]).max() <= 1 / 50
    assert params["encoder"]["head"]["kernel"].shape[-1] == 4 and params["quant"]["kernel"].shape == (1, 1, 4, 5)
    shapes = jax.eval_shape(lambda: nets.init(small.KL8, jax.random.key(0)))
    assert shapes["encoder"]["head"]["kernel"].shape[-1] == 8 and "codebook" not in shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "at least one level"),
        ({"channels": (8, 6)}, "6 channels cannot be normalized in 4 groups"),
        ({"norm_groups": -1}, "norm_groups -1: at least 0"),
        ({"attention_levels": (2,)}, "attention_levels has 2, and there are 2 levels"),
        ({"bottleneck": VQBottleneck(9, 3), "quant_conv": False}, "codes of width 3 for 4 latent channels need both"),
    ],
)
def test_settings_that_contradict(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{"channels": (8, 8), "norm_groups": 4, **changes})

"""The two U-Nets: the sizes of the published models, and what must hold of any."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE, SR, executed, filled, random_params

from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.conditioning import Conditioning, MaskedText, WholeText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig, UNetConfig
from jaxdiff.systems import imagen as presets
from jaxdiff.training.mesh import batch_sharding, make_mesh
from jaxdiff.training.param_sharding import ParamSharding, shardings

TWO_LEVELS = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": (1, 1),
    "conditioning": ConditioningConfig(16, MaskedText(8)),
}
WIDTH = 6
NETWORKS = {
    "base": UNetConfig(
        attention=AttentionConfig((False, True), (False, False), head_channels=8), patch=2, **TWO_LEVELS
    ),
    "efficient": EfficientUNetConfig(
        attention=AttentionConfig((False, True), (False, True), heads=2, feed_forward=2), **TWO_LEVELS
    ),
    "tiny": EfficientUNetConfig(
        channels=8,
        multipliers=(1,),
        blocks=(1,),
        outer_blocks=1,
        attention=AttentionConfig((True,), (False,), heads=2, feed_forward=2),
        conditioning=ConditioningConfig(16, MaskedText(8)),
        patch=2,
        coordinates=True,
        conditioned_head=True,
        input_skip=True,
    ),
}
LOW_RES = {"efficient"}
"""Those that are super-resolution."""
B, H, W, N = 3, 8, 12, 5


def inputs_of(low_res=False, count=B, height=H, width=W, text_width=WIDTH):
    """Random images, times and texts; the last sample has no text."""
    rng = np.random.default_rng(0)
    x, concat = rng.normal(size=(2, count, height, width, 3)).astype(np.float32)
    inputs = {
        "x": x,
        "time": np.linspace(10, 900, count, dtype=np.float32),
        "tokens": rng.normal(size=(count, N, text_width)).astype(np.float32),
        "token_mask": np.arange(N) < np.linspace(N, 0, count).round()[:, None],
    }
    if low_res:
        inputs |= {"concat": concat, "aug_level": np.linspace(0.1, 0.9, count, dtype=np.float32)}
    return jax.tree.map(jnp.asarray, inputs)


def applied(config, params, inputs):
    """The network's output; `inputs` by name, those of `Conditioning` among them."""
    given = Conditioning(**{name: value for name, value in inputs.items() if name not in ("x", "time")})
    return config.module().apply({"params": params}, inputs["x"], inputs["time"], given)


def model_of(config, low_res=False):
    text = TextConditioner(WIDTH, N)
    return DiffusionModel(
        unet=config, side=config.stride * 4, conditioners=(text, LowResConditioner()) if low_res else (text,)
    )


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(settings, the compiled network as a function of the inputs by name, the inputs, the output)."""
    config, low_res = NETWORKS[request.param], request.param in LOW_RES
    params = random_params(model_of(config, low_res))
    compiled = jax.jit(partial(applied, config, params))
    inputs = inputs_of(low_res)

    def apply(**changes):
        return np.asarray(compiled(inputs | changes))

    return config, apply, inputs, apply()


COUNTS = {  # millions; the ranges that the published settings leave open (references in the presets' docstrings)
    "BASE_64_2B": (2190, 2440),
    "BASE_64_500M": (480, 560),
    "BASE_64_300M": (280, 320),
    "SR_256": (570, 670),
    "SR_1024": (478, 536),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_papers_sizes(name):
    shapes = jax.eval_shape(getattr(presets, name).reading(*presets.T5_XXL).init, jax.random.key(0))[0]
    leaves = jax.tree.leaves(shapes)
    low, high = COUNTS[name]
    assert low <= sum(math.prod(leaf.shape) for leaf in leaves) / 1e6 <= high
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_bf16_presets_keep_float32_parameters_and_output():
    for stage in (presets.BASE_64_2B, presets.SR_256, presets.SR_1024):
        config = executed(stage.unet, dtype="bfloat16", remat="blocks")
        model = replace(stage, unet=config).reading(*presets.T5_XXL)
        params = jax.eval_shape(model.init, jax.random.key(0))[0]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        # Super-resolution trains on crops of 64 of the 256 or 1024 pixels.
        inputs = inputs_of(model.low_res is not None, 2, 64, 64, 4096)
        out = jax.eval_shape(partial(applied, config), params, inputs)
        assert (out.shape, out.dtype) == ((2, 64, 64, 3), jnp.float32)


def test_output_has_the_pictures_shape(network):
    config, _, inputs, out = network
    assert (out.shape, out.dtype) == ((B, H, W, 3), np.float32)
    assert np.isfinite(out).all() and out.std() > 0.01
    for height, width in ((config.stride, config.stride), (config.stride, 3 * config.stride), (40, 24)):
        sized = inputs_of("concat" in inputs, 1, height, width)
        params = jax.eval_shape(model_of(config, "concat" in inputs).init, jax.random.key(0))[0]
        found = jax.eval_shape(partial(applied, config), params, sized)
        assert found.shape == (1, height, width, 3)


def test_strides():
    assert all(config.stride == 4 for config in NETWORKS.values())
    assert presets.BASE_64_2B.unet.stride == 8
    assert presets.SR_256.unet.stride == presets.SR_1024.unet.stride == 16


def test_text_matters_to_its_own_picture(network):
    _, apply, inputs, out = network
    changed = apply(tokens=inputs["tokens"].at[0, 1, 2].add(2.0))
    assert np.abs(changed[0] - out[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], out[1:])
    unread = apply(token_mask=inputs["token_mask"].at[0, 1].set(False))
    assert np.abs(unread[0] - out[0]).max() > 1e-3


def test_what_the_tiny_settings_add():
    """A block behind the last enlargement, a condition at the head, and the noised picture times a factor."""
    config = NETWORKS["tiny"]
    plain = replace(config, outer_blocks=0, conditioned_head=False, input_skip=False)
    params = random_params(model_of(config))
    assert params.keys() - random_params(model_of(plain)).keys() == {"outer_0", "head_condition", "input_skip"}
    inputs = inputs_of()
    silent = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    out = applied(config, silent, inputs)
    factor = np.asarray(out / inputs["x"])
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], factor.shape), rtol=1e-4)
    assert len(np.unique(factor[:, 0, 0].round(4))) == B * 3  # of each sample's own, and of each channel's


def test_padding_does_not_matter(network):
    """Nor what is in it: stored embeddings may hold anything behind the caption."""
    _, apply, inputs, out = network
    written = inputs["token_mask"][..., None]
    for filling in (7.0, jnp.nan):
        np.testing.assert_array_equal(apply(tokens=jnp.where(written, inputs["tokens"], filling)), out)


def test_every_input_matters(network):
    _, apply, inputs, out = network
    for name, change in {"x": 1.0, "time": 5.0, "concat": 1.0, "aug_level": 0.1}.items():
        if name in inputs:
            changed = apply(**{name: inputs[name].at[0].add(change)})
            assert np.abs(changed[0] - out[0]).max() > 1e-3, name
            np.testing.assert_allclose(changed[1:], out[1:], atol=1e-5)


def test_samples_of_a_batch_do_not_couple(network):
    _, apply, inputs, out = network
    alone = {name: value[1:2] for name, value in inputs.items()}
    np.testing.assert_allclose(apply(**alone), out[1:2], atol=1e-4)


def test_bfloat16_computes_in_bfloat16(network):
    config, _, inputs, _ = network
    params = random_params(model_of(config, "concat" in inputs))
    traced = jax.make_jaxpr(partial(applied, executed(config, dtype="bfloat16"), params))(inputs)
    products = list(_products(traced.jaxpr))
    assert len(products) > 10
    assert all(p.invars[0].aval.dtype == p.invars[1].aval.dtype == jnp.bfloat16 for p in products)
    assert traced.out_avals[0].dtype == jnp.float32


def _products(jaxpr):
    """Every convolution and matrix product, those inside other equations included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)  # closed or not
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def test_bfloat16_is_close():
    params, inputs = random_params(SR), inputs_of(low_res=True)
    found = jax.jit(partial(applied, executed(SR.unet, dtype="bfloat16")))(params, inputs)
    wanted = jax.jit(partial(applied, SR.unet))(params, inputs)
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("how", [{"remat": "outputs"}, {"remat": "blocks"}, {"scan": True, "remat": "blocks"}], ids=str)
def test_how_it_is_computed_changes_nothing(how):
    stage = replace(SR, unet=replace(SR.unet, blocks=(2,)))
    plain, remat = stage.unet, executed(stage.unet, **how)
    params, inputs = random_params(stage), inputs_of(low_res=True)

    def results(config):
        def loss(params):
            out = applied(config, params, inputs)
            return jnp.mean(jnp.square(out)), out

        return jax.jit(jax.grad(loss, has_aux=True)), jax.make_jaxpr(jax.grad(loss, has_aux=True))(params)

    (grad, jaxpr), (grad_remat, jaxpr_remat) = results(plain), results(remat)
    assert "remat" in str(jaxpr_remat) and "remat" not in str(jaxpr)
    assert ("scan" in str(jaxpr_remat)) == how.get("scan", False)
    (grads, out), (grads_remat, out_remat) = grad(params), grad_remat(params)
    np.testing.assert_allclose(out, out_remat, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), grads, grads_remat)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(_without_key_biases(grads)))


def _without_key_biases(tree):
    """A bias of all keys alike shifts every logit of a softmax, so its gradient is zero but for rounding."""
    return {
        name: _without_key_biases({k: v for k, v in value.items() if (name, k) != ("k", "bias")})
        if isinstance(value, dict)
        else value
        for name, value in tree.items()
    }


def test_a_mesh_changes_nothing():
    """Batch over `data` and `fsdp`, parameters over `fsdp`; the network itself names no axis."""
    params, inputs = random_params(BASE), inputs_of(count=8)
    compiled = jax.jit(partial(applied, BASE.unet))
    wanted = compiled(params, inputs)
    mesh = make_mesh(data=4, fsdp=2)
    placed = jax.device_put(params, shardings(params, mesh, ParamSharding(minimum=1)))
    assert not placed["stem"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        found = compiled(placed, jax.device_put(inputs, batch_sharding(mesh)))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_what_outputs_keeps_lies_between_nothing_and_all():
    """Bytes that the forward pass leaves for the backward pass."""
    stage = replace(SR, unet=replace(SR.unet, blocks=(2,)))
    params, inputs = random_params(stage), inputs_of(low_res=True)

    def kept(remat):
        config = executed(stage.unet, remat=remat)
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: applied(config, p, inputs), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals) if hasattr(leaf, "size"))

    assert kept("blocks") < 0.9 * kept("outputs") and kept("outputs") < 0.9 * kept("none")


def test_levels_must_agree():
    with pytest.raises(ValueError, match="one entry per level"):
        UNetConfig(multipliers=(1, 2))
    assert UNetConfig().skip_scale == 1.0
    assert EfficientUNetConfig().skip_scale == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("name", ["base", "efficient"])
def test_residuals_are_added_to_skips_and_middle(name):
    """ControlNet's: zeros change nothing, each of the others does; a wrong number of them is refused."""
    config = NETWORKS[name]
    params, inputs = random_params(model_of(config, name in LOW_RES)), inputs_of(name in LOW_RES)
    sizes = (
        [(8, 4, 6), (8, 4, 6), (8, 2, 3), (16, 2, 3), (16, 2, 3)]
        if name == "base"
        else [(8, 8, 12), (8, 4, 6), (16, 2, 3)]
    )
    zeros = tuple(jnp.zeros((B, height, width, channels)) for channels, height, width in sizes)
    run = jax.jit(partial(applied, config, params))
    wanted = run(inputs)
    np.testing.assert_array_equal(run(inputs | {"residuals": zeros}), wanted)
    for number in range(len(zeros)):
        ramp = jnp.linspace(-1.0, 1.0, zeros[number].size).reshape(zeros[number].shape)  # no norm takes it away
        changed = [ramp if place == number else zero for place, zero in enumerate(zeros)]
        assert np.abs(run(inputs | {"residuals": tuple(changed)}) - wanted).max() > 1e-3
    with pytest.raises(ValueError, match=r"residuals for . skip connections and the middle"):
        applied(config, params, inputs | {"residuals": zeros[1:]})


def test_a_vector_and_an_interval_join_the_time_embedding():
    config = NETWORKS["base"]
    inputs = inputs_of() | {"vector": jnp.ones((B, 5)), "interval": jnp.linspace(0.0, 1.0, B)}
    given = Conditioning(**{name: value for name, value in inputs.items() if name not in ("x", "time")})
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), inputs["x"], inputs["time"], given)["params"]
    params = filled(shapes)
    assert shapes.keys() - random_params(model_of(config)).keys() == {"vector", "interval"}
    wanted = applied(config, params, inputs)
    for name in ("vector", "interval"):
        changed = applied(config, params, inputs | {name: inputs[name].at[0].add(0.5)})
        assert np.abs(changed[0] - wanted[0]).max() > 1e-3
        np.testing.assert_allclose(changed[1:], wanted[1:], atol=1e-5)


@pytest.mark.parametrize("reader", [MaskedText(8), MaskedText(8, pool=False), WholeText(8), None], ids=str)
def test_text_is_required_where_it_is_read(reader):
    config = replace(NETWORKS["base"], conditioning=ConditioningConfig(16, reader))
    inputs = inputs_of(text_width=8)
    given = Conditioning(inputs["tokens"], inputs["token_mask"])
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), inputs["x"], inputs["time"], given)["params"]
    assert ("text" in shapes) == (reader is not None)  # else attention takes the tokens as they are
    assert ("pool" in shapes) == (reader is not None and reader.pool)
    with pytest.raises(ValueError, match="this network reads text: its conditioning needs tokens"):
        jax.eval_shape(config.module().init, jax.random.key(0), inputs["x"], inputs["time"])

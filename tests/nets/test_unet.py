"""The two U-Nets: the sizes of the published models, and what must hold of any."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE, SR, random_params

from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.unet import EfficientUNetConfig, UNetConfig
from jaxdiff.systems import imagen as presets
from jaxdiff.training.mesh import batch_sharding, make_mesh
from jaxdiff.training.param_sharding import ParamSharding, shardings

TWO_LEVELS = {"channels": 8, "multipliers": (1, 2), "blocks": (1, 1), "time_width": 16, "text_width": 6}
NETWORKS = {
    "base": UNetConfig(
        self_attention=(False, True),
        cross_attention=(False, False),
        head_channels=8,
        context_width=8,
        patch=2,
        **TWO_LEVELS,
    ),
    "efficient": EfficientUNetConfig(
        self_attention=(False, True), cross_attention=(False, True), heads=2, context_width=8, **TWO_LEVELS
    ),
    "tiny": EfficientUNetConfig(
        channels=8,
        multipliers=(1,),
        blocks=(1,),
        outer_blocks=1,
        self_attention=(True,),
        cross_attention=(False,),
        heads=2,
        time_width=16,
        text_width=6,
        context_width=8,
        patch=2,
        coordinates=True,
        conditioned_head=True,
        input_skip=True,
        low_res=False,
    ),
}
B, H, W, N = 3, 8, 12, 5


def inputs_of(config, count=B, height=H, width=W, seed=0):
    """Random pictures, times and texts; the last sample has no text."""
    rng = np.random.default_rng(seed)
    x, low_res = rng.normal(size=(2, count, height, width, 3)).astype(np.float32)
    mask = np.arange(N) < np.linspace(N, 0, count).round()[:, None]
    inputs = {
        "x": x,
        "time": np.linspace(10, 900, count, dtype=np.float32),
        "text": rng.normal(size=(count, N, config.text_width)).astype(np.float32),
        "text_mask": mask,
    }
    if config.low_res:
        inputs |= {"low_res": low_res, "aug_level": np.linspace(0.1, 0.9, count, dtype=np.float32)}
    return jax.tree.map(jnp.asarray, inputs)


def stage_of(config):
    side = config.stride * 2
    return DiffusionModel(unet=config, resolution=side, low_resolution=side // 2 if config.low_res else None)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(settings, the compiled network as a function of the inputs by name, the inputs, the output)."""
    config = NETWORKS[request.param]
    params = random_params(stage_of(config))
    compiled = jax.jit(lambda inputs: config.module().apply({"params": params}, **inputs))
    inputs = inputs_of(config)

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
    shapes = jax.eval_shape(getattr(presets, name).init, jax.random.key(0))[0]
    leaves = jax.tree.leaves(shapes)
    low, high = COUNTS[name]
    assert low <= sum(math.prod(leaf.shape) for leaf in leaves) / 1e6 <= high
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_bf16_presets_keep_float32_parameters_and_output():
    for stage in (presets.BASE_64_2B, presets.SR_256, presets.SR_1024):
        config = replace(stage.unet, dtype="bfloat16", remat="blocks")
        params = jax.eval_shape(replace(stage, unet=config).init, jax.random.key(0))[0]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        # Super-resolution trains on crops of 64 of the 256 or 1024 pixels.
        inputs = inputs_of(config, 2, 64, 64)
        out = jax.eval_shape(lambda p, i, c=config: c.module().apply({"params": p}, **i), params, inputs)
        assert (out.shape, out.dtype) == ((2, 64, 64, 3), jnp.float32)


def test_output_has_the_pictures_shape(network):
    config, _, _, out = network
    assert (out.shape, out.dtype) == ((B, H, W, 3), np.float32)
    assert np.isfinite(out).all() and out.std() > 0.01
    for height, width in ((config.stride, config.stride), (config.stride, 3 * config.stride), (40, 24)):
        sized = inputs_of(config, 1, height, width)
        params = jax.eval_shape(stage_of(config).init, jax.random.key(0))[0]
        found = jax.eval_shape(lambda p, i: config.module().apply({"params": p}, **i), params, sized)
        assert found.shape == (1, height, width, 3)


def test_strides():
    assert all(config.stride == 4 for config in NETWORKS.values())
    assert presets.BASE_64_2B.unet.stride == 8
    assert presets.SR_256.unet.stride == presets.SR_1024.unet.stride == 16


def test_text_matters_to_its_own_picture(network):
    _, apply, inputs, out = network
    changed = apply(text=inputs["text"].at[0, 1, 2].add(2.0))
    assert np.abs(changed[0] - out[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], out[1:])
    unread = apply(text_mask=inputs["text_mask"].at[0, 1].set(False))
    assert np.abs(unread[0] - out[0]).max() > 1e-3


def test_what_the_tiny_settings_add():
    """A block behind the last enlargement, a condition at the head, and the noised picture times a factor."""
    config = NETWORKS["tiny"]
    plain = replace(config, outer_blocks=0, conditioned_head=False, input_skip=False)
    params = random_params(stage_of(config))
    assert params.keys() - random_params(stage_of(plain)).keys() == {"outer_0", "head_condition", "input_skip"}
    inputs = inputs_of(config)
    silent = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    out = config.module().apply({"params": silent}, **inputs)
    factor = np.asarray(out / inputs["x"])
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], factor.shape), rtol=1e-4)
    assert len(np.unique(factor[:, 0, 0].round(4))) == B * 3  # of each sample's own, and of each channel's


def test_padding_does_not_matter(network):
    """Nor what is in it: stored embeddings may hold anything behind the caption."""
    _, apply, inputs, out = network
    written = inputs["text_mask"][..., None]
    for filling in (7.0, jnp.nan):
        np.testing.assert_array_equal(apply(text=jnp.where(written, inputs["text"], filling)), out)


def test_every_input_matters(network):
    _, apply, inputs, out = network
    for name, change in {"x": 1.0, "time": 5.0, "low_res": 1.0, "aug_level": 0.1}.items():
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
    half = replace(config, dtype="bfloat16")
    params = random_params(stage_of(config))
    traced = jax.make_jaxpr(lambda i: half.module().apply({"params": params}, **i))(inputs)
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
    config = replace(SR.unet, dtype="bfloat16")
    params, inputs = random_params(SR), inputs_of(SR.unet)
    found = jax.jit(config.module().apply)({"params": params}, **inputs)
    wanted = jax.jit(SR.unet.module().apply)({"params": params}, **inputs)
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("how", [{"remat": "outputs"}, {"remat": "blocks"}, {"scan": True, "remat": "blocks"}], ids=str)
def test_how_it_is_computed_changes_nothing(how):
    stage = replace(SR, unet=replace(SR.unet, blocks=(2,)))
    plain, remat = stage.unet, replace(stage.unet, **how)
    params, inputs = random_params(stage), inputs_of(stage.unet)

    def results(config):
        def loss(params):
            out = config.module().apply({"params": params}, **inputs)
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
    params, inputs = random_params(BASE), inputs_of(BASE.unet, 8)
    compiled = jax.jit(BASE.unet.module().apply)
    wanted = compiled({"params": params}, **inputs)
    mesh = make_mesh(data=4, fsdp=2)
    placed = jax.device_put(params, shardings(params, mesh, ParamSharding(minimum=1)))
    assert not placed["stem"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        found = compiled({"params": placed}, **jax.device_put(inputs, batch_sharding(mesh)))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_what_outputs_keeps_lies_between_nothing_and_all():
    """Bytes that the forward pass leaves for the backward pass."""
    stage = replace(SR, unet=replace(SR.unet, blocks=(2,)))
    params, inputs = random_params(stage), inputs_of(stage.unet)

    def kept(remat):
        module = replace(stage.unet, remat=remat).module()
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: module.apply({"params": p}, **inputs), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals) if hasattr(leaf, "size"))

    assert kept("blocks") < 0.9 * kept("outputs") and kept("outputs") < 0.9 * kept("none")


def test_levels_must_agree():
    with pytest.raises(ValueError, match="one entry per level"):
        UNetConfig(multipliers=(1, 2))
    assert UNetConfig().skip_scale == 1.0
    assert EfficientUNetConfig().skip_scale == pytest.approx(1 / math.sqrt(2))

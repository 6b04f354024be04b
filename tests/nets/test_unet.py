"""The two U-Nets: the sizes of the published models, and what must hold of any."""

import functools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SR, executed, filled, random_params

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
MORE = {"tiny"}
"""Those that are given a vector and an interval."""
B, H, W, N = 3, 8, 12, 5


def inputs_of(low_res=False, count=B, height=H, width=W, text_width=WIDTH, more=False):
    """Random images, times and texts; the last sample has no text. `more`: a vector and an interval, too."""
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
    if more:
        inputs |= {"vector": np.ones((count, 5), np.float32), "interval": np.linspace(0, 1, count, dtype=np.float32)}
    return jax.tree.map(jnp.asarray, inputs)


def arguments(inputs):
    """Those of a network: `inputs` are by name, those of `Conditioning` among them."""
    given = Conditioning(**{name: value for name, value in inputs.items() if name not in ("x", "time")})
    return inputs["x"], inputs["time"], given


def applied(config, params, inputs):
    """The network's output."""
    return config.module().apply({"params": params}, *arguments(inputs))


def initialised(config, inputs):
    """Shapes of the network's parameters."""
    return jax.eval_shape(config.module().init, jax.random.key(0), *arguments(inputs))["params"]


@functools.cache
def made(name):
    """One of NETWORKS: its settings, parameters and inputs; the compiled network as a function of the inputs by name
    (and of other parameters); and its output."""
    config, inputs = NETWORKS[name], inputs_of(name in LOW_RES, more=name in MORE)
    params = filled(initialised(config, inputs))
    compiled = jax.jit(partial(applied, config))

    def apply(params=params, **changes):
        return np.asarray(compiled(params, inputs | changes))

    return SimpleNamespace(config=config, params=params, inputs=inputs, apply=apply, out=apply())


@pytest.fixture(params=NETWORKS)
def network(request):
    return made(request.param)


COUNTS = {  # millions; the ranges that the published settings leave open (references in the presets' docstrings)
    "BASE_64_2B": (2190, 2440),
    "BASE_64_500M": (480, 560),
    "BASE_64_300M": (280, 320),
    "SR_256": (570, 670),
    "SR_1024": (478, 536),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_sizes(name):
    """Their numbers of parameters; and in bfloat16 the parameters and the output are float32."""
    stage, large = getattr(presets, name), name not in ("BASE_64_500M", "BASE_64_300M")
    config = executed(stage.unet, dtype="bfloat16")
    model = replace(stage, unet=config).reading(*presets.T5_XXL)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    leaves = jax.tree.leaves(params)
    low, high = COUNTS[name]
    assert low <= sum(math.prod(leaf.shape) for leaf in leaves) / 1e6 <= high
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    if large:
        # Super-resolution trains on crops of 64 of the 256 or 1024 pixels.
        inputs = inputs_of(model.low_res is not None, 2, 64, 64, 4096)
        out = jax.eval_shape(partial(applied, executed(config, remat="blocks", scan=True)), params, inputs)
        assert (out.shape, out.dtype) == ((2, 64, 64, 3), jnp.float32)


def test_output_has_the_pictures_shape(network):
    config, out = network.config, network.out
    assert (out.shape, out.dtype) == ((B, H, W, 3), np.float32)
    assert np.isfinite(out).all() and out.std() > 0.01
    height, width = config.stride, 3 * config.stride
    sized = {name: network.inputs[name][:, :height] for name in ("x", "concat") if name in network.inputs}
    sized = {name: jnp.tile(value, (1, 1, 2, 1))[:, :, :width] for name, value in sized.items()}
    found = jax.eval_shape(partial(applied, config), network.params, network.inputs | sized)
    assert found.shape == (B, height, width, 3)


def test_strides():
    assert all(config.stride == 4 for config in NETWORKS.values())
    assert presets.BASE_64_2B.unet.stride == 8
    assert presets.SR_256.unet.stride == presets.SR_1024.unet.stride == 16


def test_text_matters_to_its_own_picture(network):
    apply, inputs, out = network.apply, network.inputs, network.out
    changed = apply(tokens=inputs["tokens"].at[0, 1, 2].add(2.0))
    assert np.abs(changed[0] - out[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], out[1:])
    unread = apply(token_mask=inputs["token_mask"].at[0, 1].set(False))
    assert np.abs(unread[0] - out[0]).max() > 1e-3


def test_what_the_tiny_settings_add():
    """A block behind the last enlargement, a condition at the head, and the noised image times a factor."""
    tiny = made("tiny")
    plain = replace(tiny.config, outer_blocks=0, conditioned_head=False, input_skip=False)
    fewer = initialised(plain, inputs_of()).keys()
    assert tiny.params.keys() - fewer == {"outer_0", "head_condition", "input_skip", "vector", "interval"}
    out = tiny.apply(tiny.params | {"head": jax.tree.map(jnp.zeros_like, tiny.params["head"])})
    factor = np.asarray(out / tiny.inputs["x"])
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], factor.shape), rtol=1e-4)
    assert len(np.unique(factor[:, 0, 0].round(4))) == B * 3  # of each sample's own, and of each channel's


def test_padding_does_not_matter(network):
    """Nor what is in it: stored embeddings may hold anything behind the caption."""
    apply, inputs, out = network.apply, network.inputs, network.out
    written = inputs["token_mask"][..., None]
    for filling in (7.0, jnp.nan):
        np.testing.assert_array_equal(apply(tokens=jnp.where(written, inputs["tokens"], filling)), out)


def test_every_input_matters(network):
    apply, inputs, out = network.apply, network.inputs, network.out
    changes = {"x": 1.0, "time": 5.0, "concat": 1.0, "aug_level": 0.1, "vector": 0.5, "interval": 0.5}
    for name, change in changes.items():
        if name in inputs:
            changed = apply(**{name: inputs[name].at[0].add(change)})
            assert np.abs(changed[0] - out[0]).max() > 1e-3, name
            np.testing.assert_allclose(changed[1:], out[1:], atol=1e-5)


def test_samples_of_a_batch_do_not_couple(network):
    repeated = {name: value[jnp.array([1, 1, 1])] for name, value in network.inputs.items()}
    np.testing.assert_allclose(network.apply(**repeated), np.broadcast_to(network.out[1], (B, H, W, 3)), atol=1e-4)


def test_a_batch_of_one():
    tiny = made("tiny")
    alone = {name: value[1:2] for name, value in tiny.inputs.items()}
    np.testing.assert_allclose(tiny.apply(**alone), tiny.out[1:2], atol=1e-4)


def test_bfloat16_computes_in_bfloat16(network):
    traced = jax.make_jaxpr(partial(applied, executed(network.config, dtype="bfloat16")))(
        network.params, network.inputs
    )
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


TWO_BLOCKS = replace(SR, unet=replace(SR.unet, blocks=(2,)))
"""Two equal blocks in a row, which `scan` makes a loop."""


@pytest.fixture(scope="module")
def params():
    return random_params(TWO_BLOCKS)


EIGHT = inputs_of(low_res=True, count=8)


def differentiated(config, params):
    """What TWO_BLOCKS gives where it is computed in this way: the gradients of a loss, the output; and the program."""

    def loss(params):
        out = applied(config, params, EIGHT)
        return jnp.mean(jnp.square(out)), out

    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params)
    return *traced.lower().compile()(params), str(traced.jaxpr)


@pytest.fixture(scope="module")
def plain(params):
    return differentiated(TWO_BLOCKS.unet, params)


def test_bfloat16_is_close(plain, params):
    _, wanted, _ = plain
    found = jax.jit(partial(applied, executed(TWO_BLOCKS.unet, dtype="bfloat16")))(params, EIGHT)
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "how",
    [
        {"remat": "outputs"},
        pytest.param({"remat": "blocks"}, marks=pytest.mark.slow),
        {"scan": True, "remat": "blocks"},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(how, plain, params):
    grads, out, jaxpr = plain
    grads_remat, out_remat, jaxpr_remat = differentiated(executed(TWO_BLOCKS.unet, **how), params)
    assert "remat" in jaxpr_remat and "remat" not in jaxpr
    assert ("scan" in jaxpr_remat) == how.get("scan", False)
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


def test_a_mesh_changes_nothing(plain, params):
    """Batch over `data` and `fsdp`, parameters over `fsdp`; the network itself names no axis."""
    mesh = make_mesh(data=4, fsdp=2)
    placed = jax.device_put(params, shardings(params, mesh, ParamSharding(minimum=1)))
    assert not placed["stem"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        found = jax.jit(partial(applied, TWO_BLOCKS.unet))(placed, jax.device_put(EIGHT, batch_sharding(mesh)))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, plain[1], atol=1e-4)


def test_what_outputs_keeps_lies_between_nothing_and_all(params):
    """Bytes that the forward pass leaves for the backward pass."""

    def kept(remat):
        config = executed(TWO_BLOCKS.unet, remat=remat)
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: applied(config, p, EIGHT), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals) if hasattr(leaf, "size"))

    outputs = kept("outputs")
    assert kept("blocks") < 0.9 * outputs and outputs < 0.9 * kept("none")


def test_levels_must_agree():
    with pytest.raises(ValueError, match="one entry per level"):
        UNetConfig(multipliers=(1, 2))
    assert UNetConfig().skip_scale == 1.0
    assert EfficientUNetConfig().skip_scale == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("name", ["base", "efficient"])
def test_residuals_are_added_to_skips_and_middle(name):
    """ControlNet's: zeros change nothing, each of the others does; a wrong number of them is refused."""
    network = made(name)
    sizes = (
        [(8, 4, 6), (8, 4, 6), (8, 2, 3), (16, 2, 3), (16, 2, 3)]
        if name == "base"
        else [(8, 8, 12), (8, 4, 6), (16, 2, 3)]
    )
    zeros = tuple(jnp.zeros((B, height, width, channels)) for channels, height, width in sizes)
    np.testing.assert_array_equal(network.apply(residuals=zeros), network.out)
    for number in range(len(zeros)):
        ramp = jnp.linspace(-1.0, 1.0, zeros[number].size).reshape(zeros[number].shape)  # no norm takes it away
        changed = [ramp if place == number else zero for place, zero in enumerate(zeros)]
        assert np.abs(network.apply(residuals=tuple(changed)) - network.out).max() > 1e-3
    with pytest.raises(ValueError, match=r"residuals for . skip connections and the middle"):
        network.apply(residuals=zeros[1:])


@pytest.mark.parametrize("reader", [MaskedText(8), MaskedText(8, pool=False), WholeText(8), None], ids=str)
def test_text_is_required_where_it_is_read(reader):
    config = replace(NETWORKS["tiny"], conditioning=ConditioningConfig(16, reader))
    inputs = inputs_of(text_width=8)
    shapes = initialised(config, inputs)
    assert ("text" in shapes) == (reader is not None)  # else attention takes the tokens as they are
    assert ("pool" in shapes) == (reader is not None and reader.pool)
    with pytest.raises(ValueError, match="this network reads text: its conditioning needs tokens"):
        initialised(config, {"x": inputs["x"], "time": inputs["time"]})

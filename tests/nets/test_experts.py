"""Two U-Nets by time, and the readers of image embeddings: what each sample's output depends on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import filled

from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.experts import ExpertsConfig
from jaxdiff.nets.image_readers import ImageTokens, TextWithImage
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNet, UNetConfig

NONE = (False, False)
SHARED = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": (1, 1),
    "attention": AttentionConfig(NONE, NONE),
    "conditioning": ConditioningConfig(16, None),
    "scale_shift": False,
}
EXPERTS = ExpertsConfig(boundary=100.0, **SHARED)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 3)), jnp.float32)


def init(config, given):
    return jax.eval_shape(config.module().init, jax.random.key(0), X[:1], jnp.zeros(1), given)["params"]


@pytest.fixture(scope="module")
def params():
    return filled(init(EXPERTS, Conditioning()))


@partial(jax.jit, static_argnums=0)
def run(module, params, x, time, given):
    return module.apply({"params": params}, x, time, given)


@pytest.mark.parametrize("times", [(0.0, 50.0, 100.0), (101.0, 500.0, 999.0), (3.0, 700.0, 100.0)])
def test_each_sample_has_the_network_of_its_time(params, times):
    time = jnp.asarray(times)
    found = run(EXPERTS.module(), params, X, time, Conditioning())
    each = {name: run(UNet(EXPERTS), params[name], X, time, Conditioning()) for name in ("first", "last")}
    assert np.abs(each["first"] - each["last"]).max() > 0.1
    for row, t in enumerate(times):
        np.testing.assert_allclose(found[row], each["last" if t <= 100.0 else "first"][row], atol=1e-5)


def test_parameters_and_gradients(params):
    """Twice those of one network; each is trained by its own times, and the derivative in time exists."""
    one = init(UNetConfig(**SHARED), Conditioning())
    assert jax.tree.structure(params["first"]) == jax.tree.structure(params["last"]) == jax.tree.structure(one)

    @jax.jit
    def gradient(time):
        return jax.grad(lambda p: jnp.square(run(EXPERTS.module(), p, X, time, Conditioning())).mean())(params)

    found = gradient(jnp.full(3, 500.0))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(found["last"]))
    assert np.abs(found["first"]["head"]["kernel"]).max() > 0
    f = lambda t: run(EXPERTS.module(), params, X, t, Conditioning())  # noqa: E731
    _, slope = jax.jit(lambda: jax.jvp(f, (jnp.full(3, 500.0),), (jnp.ones(3),)))()
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_refused():
    with pytest.raises(ValueError, match="boundary must be a time in 0…1000, not -1"):
        ExpertsConfig(boundary=-1.0, **SHARED)


ATTENDING = {
    **SHARED,
    "attention": AttentionConfig((False, True), NONE, head_channels=8, normalize_text=False),
    "scale_shift": True,
}
RNG = np.random.default_rng(1)
TOKENS, VECTOR = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((3, 5, 6), (3, 6)))


def test_caption_and_image():
    """The last token is the image's: where it is masked a learned embedding is read; the caption's mask holds."""
    config = UNetConfig(**ATTENDING | {"conditioning": ConditioningConfig(16, TextWithImage(12, 2))})
    mask = jnp.asarray([[True] * 5, [True, True, False, False, True], [True] * 4 + [False]])
    given = Conditioning(TOKENS, mask, VECTOR)
    weights, time = filled(init(config, Conditioning(TOKENS[:1], mask[:1], VECTOR[:1]))), jnp.full(3, 300.0)
    assert weights["text"]["null"].shape == (6,)
    found = run(config.module(), weights, X, time, given)
    hidden = jnp.where(mask[..., None], TOKENS, 7.0)
    np.testing.assert_allclose(run(config.module(), weights, X, time, given._replace(tokens=hidden)), found, atol=1e-6)
    for row, token in ((0, 4), (1, 1), (1, 4)):
        other = given._replace(tokens=TOKENS.at[row, token].add(1.0))
        assert np.abs(run(config.module(), weights, X, time, other)[row] - found[row]).max() > 1e-3
    null = given._replace(tokens=TOKENS.at[2, 4].set(weights["text"]["null"]), token_mask=mask.at[2, 4].set(True))
    np.testing.assert_allclose(run(config.module(), weights, X, time, null)[2], found[2], atol=1e-5)
    all_there = run(config.module(), weights, X, time, given._replace(token_mask=None))
    np.testing.assert_allclose(all_there[0], found[0], atol=1e-5)


def test_image_alone():
    config = UNetConfig(**ATTENDING | {"conditioning": ConditioningConfig(16, ImageTokens(12, 3))})
    given, time = Conditioning(TOKENS[:, :1], jnp.ones((3, 1), bool)), jnp.full(3, 300.0)
    weights = filled(init(config, Conditioning(TOKENS[:1, :1], jnp.ones((1, 1), bool))))
    found = run(config.module(), weights, X, time, given)
    other = given._replace(tokens=given.tokens.at[1].add(1.0))
    changed = np.abs(run(config.module(), weights, X, time, other) - found).max((1, 2, 3))
    assert changed[1] > 1e-3 and max(changed[0], changed[2]) < 1e-5
    null = Conditioning(given.tokens.at[2, 0].set(weights["text"]["null"]), given.token_mask)
    masked = given._replace(token_mask=given.token_mask.at[2].set(False))
    wanted = run(config.module(), weights, X, time, null)
    np.testing.assert_allclose(run(config.module(), weights, X, time, masked), wanted, atol=1e-5)

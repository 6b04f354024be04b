"""Training of a dVAE: its relaxed codes, its bound, its schedules; and the trained one as a box."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import ImageSpec, TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.dvae import Annealed, DVAEModel, TrainedDVAE, gumbel_softmax, kl_from_uniform
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.nets import dvae
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import init_state, placements_of
from jaxdiff.training.step import make_step

KEY = jax.random.key(0)
MODEL = DVAEModel(
    DVAEConfig(codes=12, hidden=8, multipliers=(1, 2), blocks=1, code_width=6),
    side=8,
    temperature=Annealed(1.0, 0.25, 20),
    kl_weight=Annealed(0.0, 0.1, 10),
)
IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
PARAMS = jax.jit(lambda key: MODEL.init(key)[0])(KEY)


def test_annealing():
    rule = Annealed(1.0, 1 / 16, 150_000)
    at = [float(rule.at(jnp.int32(step))) for step in (0, 75_000, 150_000, 400_000)]
    np.testing.assert_allclose(at, [1.0, 0.53125, 0.0625, 0.0625], rtol=1e-6)
    with pytest.raises(ValueError, match="at least one step"):
        Annealed(0.0, 1.0, 0)


def test_relaxed_codes_have_the_distribution_of_the_codes():
    """The largest entry of a sample is a draw from the distribution, at any temperature (χ², 20,000 draws)."""
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0])
    keys = noise.sample_keys(KEY, jnp.arange(20_000))
    for temperature in (1.0, 0.1):
        drawn = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 1, 1, 4)), keys, temperature)
        np.testing.assert_allclose(drawn.sum(-1), 1.0, atol=1e-5)
        counts = np.bincount(np.asarray(drawn.argmax(-1)).ravel(), minlength=4)
        expected = 20_000 * np.asarray(jax.nn.softmax(logits))
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # p = 0.001 of three degrees of freedom


def test_kl_from_uniform():
    logits = np.random.default_rng(1).normal(size=(3, 5))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(kl_from_uniform(jnp.asarray(logits)), (q * np.log(5 * q)).sum(-1), rtol=1e-5)
    assert float(kl_from_uniform(jnp.zeros(7))) == pytest.approx(0.0, abs=1e-6)


def test_gradients_of_the_relaxed_loss():
    """Against finite differences, in double precision: through the relaxation, both terms of the bound, both parts."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        direction = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(2).normal(size=leaf.shape)), params)
        loss = jax.jit(lambda params: MODEL.loss(params, (), (), {"image": IMAGE[:2]}, KEY, jnp.int32(15))[0])
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), jax.grad(loss)(params), direction)))
        at = lambda size: loss(jax.tree.map(lambda a, b: a + size * b, params, direction))  # noqa: E731
        measured = (at(1e-4) - at(-1e-4)) / 2e-4
    # The networks and the loss compute in float32, so that differences are exact to about a thousandth.
    assert abs(slope - measured) < 5e-3 * abs(measured) and abs(measured) > 1e-2


def test_the_bound_by_hand():
    """The loss is the paper's: −log-likelihood + β KL, over all values of an image. A smallest scale changes it."""
    step = jnp.int32(5)
    loss, (metrics, _) = jax.jit(MODEL.loss)(PARAMS, (), (), {"image": IMAGE}, KEY, step)
    module, total = MODEL.network.module(), []
    keys = noise.sample_keys(KEY, jnp.arange(4))
    logits = module.apply({"params": PARAMS}, dvae.to_unit(IMAGE), method="encode")
    codes = gumbel_softmax(logits, keys, float(MODEL.temperature.at(step)))
    stats = module.apply({"params": PARAMS}, codes, method="decode")
    likelihood = dvae.logit_laplace(stats, IMAGE)
    for i in range(4):
        bound = likelihood[i].sum() - MODEL.kl_weight.at(step) * kl_from_uniform(logits[i]).sum()
        total.append(-float(bound) / IMAGE[i].size)
    assert float(loss) == pytest.approx(np.mean(total), rel=1e-5)
    bounded, _ = replace(MODEL, least_scale=2.0).loss(PARAMS, (), (), {"image": IMAGE}, KEY, step)
    assert abs(float(bounded) - float(loss)) > 1e-3
    with pytest.raises(ValueError, match="least_scale -1"):
        replace(MODEL, least_scale=-1.0)
    assert metrics["temperature"] == pytest.approx(0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi / 4)))
    assert 0 < metrics["codes_used"] <= 1 and metrics["kl"] >= 0 and np.isfinite(metrics["psnr"])


def test_training_reconstructs():
    """Images of one of five colours: the error of the likeliest codes falls below that of the best single colour."""
    model = replace(MODEL, network=replace(MODEL.network, hidden=16, multipliers=(1,)), side=4)
    palette = np.random.default_rng(3).uniform(-0.9, 0.9, (5, 1, 1, 3))

    def batch(seed):
        chosen = palette[np.random.default_rng(seed).integers(0, 5, 16)]
        return {"image": jnp.asarray(chosen.repeat(4, 1).repeat(4, 2), jnp.float32)}

    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), OptimizerConfig(learning_rate=5e-3, warmup=5, total=300)
    state = init_state(model, optimizer, KEY, mesh)
    step = make_step(model, optimizer, placements_of(state))
    for number in range(300):
        state, _ = step(state, batch(number), KEY, ())
    total, count = jax.jit(model.held_out_losses)(state.params, (), (), batch(1000), jnp.arange(16), KEY)[
        "held_out_loss"
    ]
    single = np.abs(batch(1000)["image"] - np.median(palette, axis=0)).mean()
    assert float(total / count) < 0.75 * single


def test_padding_rows_are_not_counted():
    scores = MODEL.held_out_losses(PARAMS, (), (), {"image": IMAGE}, jnp.asarray([0, -1, 2, -1]), KEY)
    rows = MODEL.held_out_losses(PARAMS, (), (), {"image": IMAGE[::2]}, jnp.asarray([0, 1]), KEY)
    for name, (total, count) in scores.items():
        assert count == 2 and float(total) == pytest.approx(float(rows[name][0]), rel=1e-5)


def test_box():
    """It decodes its own codes, and says what it consumes and produces."""
    box = MODEL.trained(PARAMS)
    assert isinstance(box, TrainedDVAE) and box.factor == 2 and box.side == 8
    assert (box.consumes, box.produces) == (TokenSpec(12, 2), ImageSpec(3, 2))
    codes = box.encode(IMAGE)
    assert codes.shape == (4, 4, 4) and codes.dtype == jnp.int32 and codes.min() >= 0 and codes.max() < 12
    images = box.decode(codes, SampleRequest(noise.sample_keys(KEY, jnp.arange(4)), (8, 8)))
    assert images.shape == IMAGE.shape and np.abs(images).max() <= 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda box: box.check((8, 9)), "9 pixels is not a multiple of the dVAE's stride 2"),
        (lambda box: box.encode(jnp.zeros((1, 8, 8, 1))), "not a batch of images"),
        (lambda box: replace(MODEL, side=9), "not a multiple of the stride"),
        (lambda box: replace(MODEL, temperature=Annealed(1.0, 0.0, 5)), "above 0"),
    ],
)
def test_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(MODEL.trained(PARAMS))

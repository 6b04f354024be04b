"""Training an autoencoder: the losses by hand, the adversary and its weight, and a run that learns."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_autoencoder as small

from jaxdiff.diffusion import noise
from jaxdiff.models.adversary import Adversary, LastLayer
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_training import AutoencoderModel, latent_scale
from jaxdiff.models.codebook import EMACodebook
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.discriminator import Discriminator, DiscriminatorConfig
from jaxdiff.training.held_out import HasHeldOutLosses
from jaxdiff.training.mesh import make_mesh, to_devices
from jaxdiff.training.optimizer import AdamW, Decay, OptimizerConfig
from jaxdiff.training.state import Trainable, init_state, placements_of
from jaxdiff.training.step import make_step

NETWORK = AutoencoderConfig((4, 8), 1, 3, norm_groups=2, middle_attention=False)
ADVERSARY = Adversary(DiscriminatorConfig(channels=4, layers=1), start=5, weight=0.8)
KL = AutoencoderModel(NETWORK, 16, kl_weight=1e-2, adversary=ADVERSARY)
VQ = replace(KL, network=replace(NETWORK, bottleneck=VQBottleneck(20, 3)), adversary=None)
EMA = replace(VQ, codebook=EMACodebook(0.5, decay=0.9))
KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default generator
BATCH = {"image": jnp.asarray(small.image(16, 16, 4))}


@cache
def params_of(model):
    """Random parameters, and initial averages of a random codebook."""
    params, extra = {"autoencoder": small.random_params(model.network)}, ()
    if model.averaged is not None:
        codebook = params["autoencoder"].pop("codebook")
        extra = {"codebook": codebook, "usage": jnp.full(20, 0.05), "sums": 0.05 * codebook}
    if model.adversary is not None:
        shapes = jax.eval_shape(model.init, KEY)[0]["discriminator"]
        rng = np.random.default_rng(5)
        params["discriminator"] = jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), "f4"), shapes
        )
    return params, extra


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, extra, step):
    return jax.value_and_grad(model.loss, has_aux=True)(params, extra, (), BATCH, KEY, step)


@pytest.fixture(scope="module")
def with_adversary():
    """Loss, metrics and gradient of KL before and at the adversary's start."""
    params, _ = params_of(KL)
    return params, [loss_and_gradient(KL, params, (), jnp.int32(step)) for step in (4, 5)]


@partial(jax.jit, static_argnums=0)
def by_hand(model, params, kernel):
    """Codes, image and the losses, written again; `kernel` is that of the last layer."""
    image, params = BATCH["image"], jax.tree.map(lambda leaf: leaf, params["autoencoder"])
    params["decoder"]["head"]["kernel"] = kernel
    apply = partial(model.network.module().apply, {"params": params})
    mean, logvar = jnp.split(apply(image, method="encode"), 2, axis=-1)
    keys = noise.sample_keys(jax.random.split(KEY)[0], jnp.arange(4))
    code = mean + jnp.exp(logvar / 2) * noise.normal_like(keys, mean.shape[1:])
    return mean, logvar, apply(code, method="decode")


def test_kl_and_reconstruction(with_adversary):
    """Before the adversary starts: sums over pixels and codes as in the paper, divided by the number of values."""
    params, [((loss, (metrics, extra)), gradient), _] = with_adversary
    mean, logvar, image = map(np.asarray, by_hand(KL, params, params["autoencoder"]["decoder"]["head"]["kernel"]))
    absolute = np.abs(BATCH["image"] - image).sum() / 4
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / 4
    np.testing.assert_allclose(loss, (absolute + 1e-2 * kl) / (16 * 16 * 3), rtol=1e-4)
    np.testing.assert_allclose(metrics["reconstruction"], absolute / (16 * 16 * 3), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl / 64, rtol=1e-4)
    squares = ((BATCH["image"] - np.clip(image, -1, 1)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["psnr"], np.mean(10 * np.log10(4 / squares)), rtol=1e-4)
    assert extra == () and metrics["discriminator"] == metrics["adversarial_weight"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["discriminator"]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["autoencoder"]["encoder"]))


def test_adversary(with_adversary):
    """From its start: hinge losses, and the adaptive weight from gradients through the entire network."""
    params, [((before, _), gradient_before), ((loss, (metrics, _)), gradient)] = with_adversary
    hinge, fake, norms, own = judged_by_hand(params)
    np.testing.assert_allclose(metrics["discriminator"], hinge, rtol=1e-4)
    np.testing.assert_allclose(metrics["adversarial"], -fake, rtol=1e-4)
    weight = 0.8 * norms[0] / (norms[1] + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-3)
    np.testing.assert_allclose(loss, before - weight * fake + hinge, rtol=1e-4)
    # Each half has the gradient of its own losses: that of the last kernel changes by the weighted adversarial one.
    kernels = (each["autoencoder"]["decoder"]["head"]["kernel"] for each in (gradient, gradient_before))
    np.testing.assert_allclose(np.linalg.norm(np.subtract(*kernels)), weight * norms[1], rtol=1e-3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-6), own, gradient["discriminator"])


@jax.jit
def judged_by_hand(params):
    """The discriminator's loss, the mean logit of the image, the norms of the gradients of the absolute
    error and of that logit at the last kernel, and the gradient of the discriminator's loss."""
    kernel, judge = params["autoencoder"]["decoder"]["head"]["kernel"], Discriminator(ADVERSARY.discriminator)
    image = by_hand(KL, params, kernel)[2]

    def logits(x, params=params["discriminator"]):
        return judge.apply({"params": params}, x)

    def hinge(params):
        real, fake = logits(BATCH["image"], params), logits(image, params)
        return 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())

    def norm(loss):
        return jnp.linalg.norm(jax.grad(lambda kernel: loss(by_hand(KL, params, kernel)[2]))(kernel))

    norms = norm(lambda x: jnp.abs(BATCH["image"] - x).mean()), norm(lambda x: logits(x).mean())
    value, own = jax.value_and_grad(hinge)(params["discriminator"])
    return value, logits(image).mean(), norms, own


def test_weight_that_is_not_adaptive():
    """The weight alone, for whatever images."""
    adversary = replace(ADVERSARY, start=0, adaptive=False)
    image, last = BATCH["image"], LastLayer(jnp.ones((4, 16, 16, 4)), jnp.ones((3, 3, 4, 3)), jnp.ones(3))
    losses = jax.jit(adversary.losses)(params_of(KL)[0]["discriminator"], image, 0.5 * image, last, jnp.int32(0))
    assert losses["adversarial_weight"] == jnp.float32(0.8) and losses["discriminator"] > 0


@pytest.mark.parametrize("model", [VQ, EMA], ids=["gradients", "averages"])
def test_codebook(model):
    """The commitment, the codebook's own loss or averages, and the straight-through gradient of the encoder."""
    params, extra = params_of(model)
    if extra:
        loss, (metrics, after) = jax.jit(model.loss)(params, extra, (), BATCH, KEY, jnp.int32(0))
    else:
        (loss, (metrics, after)), gradient = loss_and_gradient(model, params, extra, jnp.int32(0))
    entries = extra["codebook"] if extra else params["autoencoder"]["codebook"]
    code = small_encode(model, params)
    chosen = np.asarray(((np.asarray(code)[..., None, :] - np.asarray(entries)) ** 2).sum(-1).argmin(-1))
    distance = ((entries[chosen] - code) ** 2).mean()
    np.testing.assert_allclose(metrics["commitment"], distance, rtol=1e-4)
    weight = 0.5 if extra else 1.25
    np.testing.assert_allclose(loss - metrics["reconstruction"], weight * distance, rtol=1e-3)
    np.testing.assert_allclose(metrics["codes_used"], len(np.unique(chosen)) / 20, rtol=1e-6)
    if extra:
        taken = np.bincount(chosen.ravel(), minlength=20) / chosen.size
        np.testing.assert_allclose(after["usage"][taken > 0], 0.9 * 0.05 + 0.1 * taken[taken > 0], rtol=1e-4)
        assert np.abs(after["codebook"] - entries).max() > 1e-3
    else:
        wanted = np.zeros((20, 3))
        np.add.at(wanted, chosen.ravel(), 2 * np.asarray(entries[chosen] - code).reshape(-1, 3) / code.size)
        np.testing.assert_allclose(gradient["autoencoder"]["codebook"], wanted, atol=1e-5)
        assert after == ()
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["autoencoder"]["encoder"]))


def small_encode(model, params):
    return jax.jit(partial(model.network.module().apply, method="encode"))(
        {"params": params["autoencoder"]}, BATCH["image"]
    )


def test_held_out_losses(with_adversary):
    """Sums over images, of mean codes; padding rows do not count."""
    params, _ = with_adversary
    assert isinstance(KL, HasHeldOutLosses) and isinstance(KL, Trainable)
    run = jax.jit(lambda numbers: KL.held_out_losses(params, (), (), BATCH, numbers, KEY))
    every, some = run(jnp.arange(4)), run(jnp.array([0, -1, 2, -1]))
    assert every.keys() == {"held_out_loss", "held_out_psnr", "held_out_kl"}
    trained = KL.trained(params, ())
    image = trained.decoded(trained.encode(BATCH["image"]))
    each = np.abs(BATCH["image"] - image).mean((1, 2, 3))
    np.testing.assert_allclose(every["held_out_loss"][0], each.sum(), rtol=1e-4)
    np.testing.assert_allclose(some["held_out_loss"][0], each[[0, 2]].sum(), rtol=1e-4)
    assert every["held_out_loss"][1] == 4 and some["held_out_psnr"][1] == 2


def test_protocol():
    """Labels, casts and shapes."""
    params, extra = jax.eval_shape(KL.init, KEY)
    labels = KL.labels(params)
    assert {name: set(jax.tree.leaves(tree)) for name, tree in labels.items()} == {
        "autoencoder": {"autoencoder"},
        "discriminator": {"discriminator"},
    }
    assert extra == () and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
    half = replace(EMA, network=replace(EMA.network, dtype="bfloat16"))
    params, extra = jax.eval_shape(half.init, KEY)
    assert "codebook" not in params["autoencoder"] and extra["codebook"].shape == (20, 3)
    cast = jax.eval_shape(half.cast, params)["autoencoder"]["encoder"]
    assert cast["stem"]["kernel"].dtype == jnp.bfloat16 and cast["stem"]["bias"].dtype == jnp.float32
    kept = jax.eval_shape(VQ.cast, jax.eval_shape(VQ.init, KEY)[0])["autoencoder"]["codebook"]
    assert kept.dtype == jnp.float32
    assert KL.batch_spec(4, 16) == {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)}
    for wrong, message in (({"side": 15}, "15 pixels is not a multiple of the stride 2"), ({"side": 4}, "no patch")):
        with pytest.raises(ValueError, match=message):
            replace(KL, **wrong)


def test_latent_scale():
    """Scaled latents of all batches have unit variance."""
    trained = TrainedAutoencoder(NETWORK, small.random_params(NETWORK), 0.3, side=16)
    image = BATCH["image"]
    key = jax.random.key(0)  # of per-sample noise that does not depend on the batch
    scale = latent_scale(trained, iter([image, image[::-1]]), key)
    keys = noise.sample_keys(key, jnp.arange(8))
    scaled = replace(trained, scale=scale)
    latents = np.concatenate([scaled.encode(image, keys[:4]), scaled.encode(image[::-1], keys[4:])])
    np.testing.assert_allclose(latents.std(), 1.0, rtol=1e-4)
    with pytest.raises(ValueError, match="at least one image"):
        latent_scale(trained, iter(()), key)


def test_a_run_that_learns():
    """Four images are learnt by heart, with averages of the codebook; then the discriminator starts and changes."""
    adversary = replace(ADVERSARY, start=40)
    network = AutoencoderConfig((8, 8), 1, 4, norm_groups=2, middle_attention=False, bottleneck=VQBottleneck(32, 4))
    model = AutoencoderModel(network, 16, codebook=EMACodebook(decay=0.9), adversary=adversary)
    steady = {"warmup": 0, "decay": Decay.CONSTANT, "clip": 1.0}
    rules = {
        "autoencoder": OptimizerConfig(AdamW(), 1e-2, **steady),
        "discriminator": OptimizerConfig(AdamW(), 1e-3, **steady),
    }
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(model, rules, KEY, mesh, params_of(model)[0])
        step = make_step(model, rules, placements_of(state), ema_decay=0.9)
        batch = to_devices(BATCH, mesh)
        first = jax.tree.map(np.array, state.params["discriminator"])
        scores = []
        for number in range(43):
            if number == 40:
                jax.tree.map(np.testing.assert_array_equal, first, state.params["discriminator"])
            state, metrics = step(state, batch, KEY)
            scores.append({name: float(value) for name, value in metrics.items()})
    print(scores[0], scores[39], scores[-1], sep="\n")
    assert scores[39]["reconstruction"] < 0.5 * scores[0]["reconstruction"] and scores[39]["skipped"] == 0
    assert scores[39]["codes_used"] > 0.5
    assert scores[39]["discriminator"] == 0 < scores[40]["discriminator"] and scores[40]["adversarial_weight"] > 0
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, state.params["discriminator"])
    assert all(changed[name]["kernel"] > 0 for name in ("conv_0", "conv_1", "head"))
    trained = model.trained(state.ema, state.extra)
    image = trained.decoded(trained.encode(BATCH["image"]))
    assert np.abs(image - BATCH["image"]).mean() < 0.6 * scores[0]["reconstruction"]

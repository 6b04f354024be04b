"""A stage of Imagen: what its loss and its sampler do, seen through networks that are formulas, and whole."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import BASE, LENGTH, SR, TEXT, WIDTH, Formula, changed, executed, loss_of, random_params

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.losses import MinSNR, UniformWeighting
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, Euler
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold
from jaxdiff.models import conditioners
from jaxdiff.models import sampling as sampling_module
from jaxdiff.models.boxes import Decoder, Encoding, Generator
from jaxdiff.models.conditioner import Conditioner
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner, enlarge
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.representations import ClassConditioner, EmbeddingConditioner, SemanticMapConditioner
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.conditioning import MaskedText, TextReader, WholeText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.mesh import BATCH_AXES, batch_sharding, make_mesh, to_devices

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, LENGTH, WIDTH)).astype(np.float32)
    return TextEmbedding(jnp.asarray(embeddings), jnp.ones((count, LENGTH), bool))


def pictures(count, side, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def batch_of(stage, count, text=True):
    batch = {"image": pictures(count, stage.side)}
    if stage.low_res is not None:
        batch["low_res"] = pictures(count, stage.side // stage.factor, seed=1)
    if text:
        embedded = texts(count)
        batch |= {"text": embedded.tokens, "text_mask": embedded.mask}
    return jax.tree.map(jnp.asarray, batch)


def seen_in_training(stage, batch, key=KEY):
    """What the network is given: (x, time, text, mask[, low_res, aug_level])."""
    calls = []

    def record(*inputs):
        calls.append([np.asarray(value) for value in inputs])
        return jnp.zeros_like(inputs[0])

    spied = replace(stage, unet=Formula(output=record))
    loss_of(spied, {}, jax.tree.map(jnp.asarray, batch), key)
    (inputs,) = calls
    return inputs


# Training


def test_noised_picture_and_time():
    """x = α x₀ + σ ε at the time that the network is told: what is left over is standard noise."""
    batch = batch_of(BASE, 64)
    x, time = seen_in_training(BASE, batch)[:2]
    t = time / 1000
    assert 0 <= t.min() < 0.02 and 0.98 < t.max() <= 1
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 64, atol=1e-5)  # spread evenly
    assert np.abs(np.corrcoef(t, np.arange(64))[0, 1]) < 0.5  # and not in order
    alpha, sigma = (
        np.asarray(f(jnp.asarray(t)))[:, None, None, None] for f in (CosineSchedule().alpha, CosineSchedule().sigma)
    )
    eps = ((x - alpha * batch["image"]) / sigma)[t > 0.1]
    assert abs(eps.mean()) < 0.05 and eps.std() == pytest.approx(1, abs=0.03)


def test_text_is_dropped_at_the_stated_rate():
    """A dropped caption is the null text of sampling: zeros, all of it masked. The others are as they were."""
    stage = replace(BASE, unet=Formula(), side=2)
    for share in (0.0, 0.1, 1.0):
        batch = {"image": np.zeros((4000, 2, 2, 3), np.float32)}
        embeddings, mask = (np.asarray(a) for a in texts(4000)[:2])
        batch |= {"text": embeddings, "text_mask": mask}
        _, _, text, kept = seen_in_training(changed(stage, TextConditioner, dropout=share), batch)
        dropped = ~kept.any(1)
        assert dropped.mean() == pytest.approx(share, abs=0.015 if 0 < share < 1 else 0)
        assert (text[dropped] == 0).all()
        np.testing.assert_array_equal(text[~dropped], embeddings[~dropped])
        assert kept[~dropped].all()


def test_padding_behind_a_caption_is_zeroed():
    batch = batch_of(BASE, 64)
    batch["text_mask"] = jnp.arange(LENGTH) < jnp.where(jnp.arange(64) % 2, LENGTH, 2)[:, None]
    _, _, text, mask = seen_in_training(changed(BASE, TextConditioner, dropout=0.0), batch)
    np.testing.assert_array_equal(mask, batch["text_mask"])
    assert (text[::2, 2:] == 0).all() and (text[::2, :2] != 0).all() and (text[1::2] != 0).all()


def test_super_resolution_sees_the_noised_low_resolution_input():
    """The bug that a test must catch: the input is noised, and the network reads the clean one."""
    stage = changed(SR, LowResConditioner, factor=1)  # no enlargement, so that the noise can be read off
    batch = batch_of(stage, 64)
    x, *_, low_res, level = seen_in_training(stage, batch)
    assert level.shape == (64,) and 0 <= level.min() < 0.1 and 0.9 < level.max() <= 1
    assert level.mean() == pytest.approx(0.5, abs=0.12)  # one for each example, uniform
    alpha, sigma = (
        np.asarray(f(jnp.asarray(level)))[:, None, None, None] for f in (CosineSchedule().alpha, CosineSchedule().sigma)
    )
    eps = (low_res - alpha * batch["low_res"]) / sigma
    assert eps[level > 0.1].std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(x.ravel(), (sigma * eps).ravel())[0, 1]) < 0.02  # not the image's own noise
    assert seen_in_training(changed(stage, LowResConditioner, max_level=0.2), batch)[-1].max() == pytest.approx(
        0.2 * level.max()
    )


def test_the_noise_is_enlarged_with_the_input(monkeypatch):
    """As in sampling, where the input is what the stage before it drew."""
    noisy = []
    batch = batch_of(SR, 64)
    with monkeypatch.context() as patched:
        patched.setattr(conditioners, "augment", lambda *inputs: noisy.append(augment(*inputs)) or noisy[-1])
        low_res = seen_in_training(SR, batch)[-2]
    assert noisy[0].shape == (64, 4, 4, 3) and np.abs(noisy[0] - batch["low_res"]).max() > 0.1
    np.testing.assert_array_equal(low_res, enlarge(noisy[0], (16, 16)))


def test_residual_stages_add_to_the_enlarged_input():
    """A network that says nothing draws what bicubic interpolation would; the real one learns the rest."""
    unet = Formula(output=lambda x, *rest: jnp.zeros_like(x))
    stage = replace(SR, unet=unet, prediction=Prediction.X0, residual=True)
    low_res = jnp.asarray(0.2 * pictures(2, 4))
    sampling = SamplingConfig(DDIM(), 3, thresholding=StaticThreshold())
    np.testing.assert_allclose(drawn(stage, sampling, low_res=low_res), enlarge(low_res, (16, 16)), atol=1e-3)
    low_res = batch_of(SR, 64)["low_res"]
    batch = {"image": enlarge(low_res, (16, 16)), "low_res": low_res}
    assert loss_of(changed(stage, LowResConditioner, max_level=0.0), {}, batch, KEY)[0] < 1e-8
    assert loss_of(stage, {}, batch, KEY)[0] > 1e-4


def test_the_loss_depends_on_the_augmentation_noise(monkeypatch):
    """Nothing else is changed: times, levels and the image's noise stay as they were."""
    stage = replace(SR, unet=Formula(output=see_low_res))
    batch = batch_of(SR, 64)
    before = loss_of(stage, {}, batch, KEY)[0]
    assert loss_of(stage, {}, batch, KEY)[0] == before
    with monkeypatch.context() as patched:
        other = lambda low_res, level, keys, schedule: augment(low_res, level, noise.fold(keys, 9), schedule)  # noqa: E731
        patched.setattr(conditioners, "augment", other)
        assert abs(loss_of(stage, {}, batch, KEY)[0] - before) > 1e-4


def test_a_perfect_network_has_no_loss():
    batch = batch_of(BASE, 64)
    unet = Formula(output=lambda *inputs: batch["image"])
    stage = replace(BASE, prediction=Prediction.X0, unet=unet)
    assert loss_of(stage, {}, batch, KEY)[0] == 0.0
    stage = replace(BASE, unet=Formula(output=lambda x, *inputs: jnp.zeros_like(x)))
    assert loss_of(stage, {}, batch, KEY)[0] == pytest.approx(1, abs=0.15)  # ε, squared


def test_training_on_pictures_alone():
    """No captions in the batch: all of it is null text, and the real networks have a loss and gradients."""
    for stage in (BASE, SR):
        batch = batch_of(stage, 64, text=False)
        _, _, text, mask = seen_in_training(stage, batch)[:4]
        null = TEXT.null_text(64)
        np.testing.assert_array_equal(text, null.tokens)
        np.testing.assert_array_equal(mask, null.mask)
        shapes = jax.eval_shape(stage.init, KEY)[0]
        (loss, _), grads = jax.eval_shape(jax.value_and_grad(partial(loss_of, stage), has_aux=True), shapes, batch, KEY)
        assert loss.shape == () and jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(lambda p: p.shape, shapes)


def test_crops_of_any_size_train_a_super_resolution_stage():
    shapes = jax.eval_shape(SR.init, KEY)[0]
    batch = {"image": np.zeros((2, 8, 24, 3), np.float32), "low_res": np.zeros((2, 2, 6, 3), np.float32)}
    assert jax.eval_shape(partial(loss_of, SR), shapes, batch, KEY)[0].shape == ()


# Held out


def held_out(model, params, batch, numbers, key=KEY):
    sums = model.held_out_losses(params, (), (), batch, jnp.asarray(numbers, jnp.int32), key)
    return {name: float(total) / float(count) if count else None for name, (total, count) in sums.items()}


LEVELS = [f"held_out_loss_t{t}" for t in ("0.06", "0.19", "0.31", "0.44", "0.56", "0.69", "0.81", "0.94")]


@pytest.mark.parametrize(
    ("schedule", "weighting"),
    [(CosineSchedule(), UniformWeighting()), (TabulatedSchedule.linear(10), MinSNR())],
    ids=["continuous", "a table, weighted"],
)
def test_held_out_examples_have_the_eight_times_in_turn_and_all_their_text(schedule, weighting):
    calls = []

    def record(x, time, text, mask):
        calls.append([np.asarray(value) for value in (x, time, text, mask)])
        return jnp.zeros_like(x)

    stage = replace(BASE, unet=Formula(output=record), schedule=schedule, weighting=weighting)
    stage = changed(stage, TextConditioner, dropout=1.0)
    batch, numbers = batch_of(stage, 20), np.arange(3, 23)
    found = held_out(stage, {}, batch, numbers)
    ((x, time, text, mask),) = calls
    np.testing.assert_array_equal(text, batch["text"])  # none is dropped
    assert mask.all()
    t = jnp.asarray((numbers % 8 + 0.5) / 8, jnp.float32)
    if isinstance(schedule, TabulatedSchedule):
        t = schedule.entry_time(t)
        np.testing.assert_array_equal(time, np.floor((numbers % 8 + 0.5) / 8 * 10))  # of ten entries
    else:
        np.testing.assert_allclose(time / 1000, t, rtol=1e-6)
    alpha, sigma = (np.asarray(f(t))[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
    eps = (x - alpha * np.asarray(batch["image"])) / sigma
    weights = np.asarray(weighting.weight(schedule.logsnr(t), Prediction.EPSILON))
    each = weights * (eps**2).mean((1, 2, 3))  # a network that says 0 has the noise itself as its error
    assert list(found) == ["held_out_loss", *LEVELS]
    assert found["held_out_loss"] == pytest.approx(each.mean(), rel=1e-4)
    for level, name in enumerate(LEVELS):
        assert found[name] == pytest.approx(each[numbers % 8 == level].mean(), rel=1e-4)


def test_held_out_losses_are_the_examples_own():
    """Noise and level of an example depend on its number, not on what else is in the batch; padding counts nothing."""
    unet = Formula(output=lambda x, t, text, mask, low_res, level: jnp.tanh(x + low_res * level[:, None, None, None]))
    stage, count = replace(SR, unet=unet), 16
    batch, numbers = batch_of(stage, count), np.arange(count, dtype=np.int32)
    sums = jax.jit(lambda batch, numbers, key: stage.held_out_losses({}, (), (), batch, numbers, key))

    def means(order, numbers, key=KEY, mesh=make_mesh(data=4, fsdp=2)):  # noqa: B008
        with jax.set_mesh(mesh):
            rows = {name: np.asarray(value)[order] for name, value in batch.items()}
            placed = to_devices(rows | {"numbers": numbers}, mesh)
            values = sums(placed, placed.pop("numbers"), key)
        return {name: float(total / count) if count else None for name, (total, count) in values.items()}

    together = means(numbers, numbers, mesh=make_mesh(devices=jax.devices()[:1]))
    assert means(numbers, numbers) == pytest.approx(together, rel=1e-5)
    turned = np.roll(numbers, 5)
    assert means(turned, turned) == pytest.approx(together, rel=1e-5)
    alone = [means(numbers, np.where(numbers == i, numbers, -1))["held_out_loss"] for i in range(count)]
    assert np.mean(alone) == pytest.approx(together["held_out_loss"], rel=1e-5)
    one = means(turned, np.where(turned == 9, turned, -1))
    assert one["held_out_loss"] == one["held_out_loss_t0.19"] == pytest.approx(alone[9], rel=1e-5)
    assert one["held_out_loss_t0.94"] is None  # no example counts
    assert means(numbers, numbers, jax.random.key(2)) != pytest.approx(together, rel=1e-3)


def test_loss_is_equal_on_every_mesh():
    """Noise, levels, dropped captions and times are the samples' own wherever they are computed."""

    def network(x, time, text, mask, low_res, level):
        return jnp.tanh(x * low_res + (text.mean((1, 2)) + time / 1000 + level)[:, None, None, None])

    stage, batch = replace(SR, unet=Formula(output=network)), batch_of(SR, 64)
    loss = jax.jit(lambda batch, key: loss_of(stage, {}, batch, key)[0])
    alone = loss(batch, KEY)
    assert loss(batch, jax.random.key(2)) != alone
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        spread = loss(to_devices(batch, mesh), KEY)
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


# Drawing


def formula_stage(output, low_res=False):
    """x₀ is what `output` says, so one step draws it."""
    return replace(SR if low_res else BASE, unet=Formula(output=output), prediction=Prediction.X0)


ONE_STEP = SamplingConfig(sampler=Euler(), steps=1, thresholding=NoThreshold())


def drawn(stage, sampling, count=2, size=None, low_res=None, params=None, **request):
    keys = noise.sample_keys(KEY, jnp.arange(count))
    request = SampleRequest(keys, size or (stage.side, stage.side), **{"text": texts(count)} | request)
    return np.asarray(TrainedModel(stage, params or {}, sampling).decode(low_res, request))


def see_low_res(x, time, text, mask, low_res, level):
    return low_res


def test_sampling_noises_the_low_resolution_input():
    """At level 0 the network sees it as it is, above 0 noised, and in both cases it is told the level."""
    low_res = jnp.asarray(0.2 * pictures(2, 4))
    stage = formula_stage(see_low_res, low_res=True)
    np.testing.assert_allclose(drawn(stage, ONE_STEP, low_res=low_res), enlarge(low_res, (16, 16)), atol=1e-3)
    level, low_res = 0.15, jnp.asarray(0.2 * pictures(2, 16))
    stage = changed(stage, LowResConditioner, factor=1)  # no enlargement, so that the noise can be read off
    seen = drawn(stage, replace(ONE_STEP, aug_level=level), low_res=low_res)
    eps = (seen - float(CosineSchedule().alpha(level)) * low_res) / float(CosineSchedule().sigma(level))
    assert eps.std() == pytest.approx(1, abs=0.1) and abs(eps.mean()) < 0.1
    assert np.abs(eps[0] - eps[1]).max() > 0.5
    told = formula_stage(lambda x, time, text, mask, low_res, level: 0 * x + level[:, None, None, None], low_res=True)
    for level in (0.0, 0.15, 1.0):
        seen = drawn(told, replace(ONE_STEP, aug_level=level), low_res=low_res[:, :4, :4])
        np.testing.assert_allclose(seen, level, atol=1e-3)


def test_the_low_resolution_noise_stays_the_same_at_every_step():
    stage = formula_stage(see_low_res, low_res=True)
    low_res = jnp.asarray(0.2 * pictures(2, 4))
    one, many = (drawn(stage, replace(ONE_STEP, steps=s, aug_level=0.15), low_res=low_res) for s in (1, 5))
    np.testing.assert_allclose(one, many, atol=1e-3)


def mean_text(x, time, text, mask, *low_res):
    """An image of one grey, half the mean of the text."""
    return 0 * x + 0.5 * text.mean((1, 2))[:, None, None, None]


def test_guidance_algebra_and_negative_prompt():
    """ε̃ = w ε(c) + (1 − w) ε(n), in x₀ too: the grey is exactly that mixture, whatever the sampler."""
    stage, text, negative = formula_stage(mean_text), texts(2), texts(2, seed=1)
    grey, away = (0.5 * np.asarray(t.tokens).mean((1, 2))[:, None, None, None] for t in (text, negative))
    for sampler, weight in ((Euler(), 1.0), (Euler(), 0.0), (DDIM(), 2.5), (DDPM(), 2.5)):
        sampling = SamplingConfig(sampler, 3, guidance=Guidance(weight), thresholding=NoThreshold())
        for options, base in (({}, 0.0), ({"negative": negative}, away)):
            wanted = np.broadcast_to(weight * grey + (1 - weight) * base, (2, 8, 8, 3))
            np.testing.assert_allclose(drawn(stage, sampling, text=text, **options), wanted, atol=2e-3)


def test_a_text_may_hold_more_than_the_null_text():
    """A pooled vector and ids, which this network does not read: both branches of guidance are still one batch."""
    text = texts(2)
    more = text._replace(pooled=jnp.ones((2, 5)), ids=jnp.ones((2, LENGTH), jnp.int32))
    stage, sampling = formula_stage(mean_text), replace(ONE_STEP, guidance=Guidance(2.0))
    for negative in (TEXT.null_text(2), more):
        found = drawn(stage, sampling, text=more, negative=negative)
        np.testing.assert_array_equal(found, drawn(stage, sampling, text=text, negative=negative))


def test_outside_its_interval_guidance_costs_nothing():
    """The network sees doubled batches for as long as the log-SNR is inside, and plain ones after that."""
    batches = []

    def grey_and_count(x, *rest):
        jax.debug.callback(lambda x: batches.append(len(x)), x, ordered=True)
        return mean_text(x, *rest)

    stage, text = formula_stage(grey_and_count), texts(2)
    sampling = SamplingConfig(Euler(), 8, guidance=Guidance(3.0, (-20.0, 0.0)), thresholding=NoThreshold())
    found = drawn(stage, sampling, text=text)
    jax.effects_barrier()
    # Uniform in time, the cosine schedule is at log-SNR 0 halfway: points 0 to 4 of 8 are inside.
    assert batches == [4] * 5 + [2] * 3
    grey = 0.5 * np.asarray(text.tokens).mean((1, 2))[:, None, None, None]
    np.testing.assert_allclose(found, np.broadcast_to(grey, found.shape), atol=2e-3)


def test_time_runs_from_noise_to_picture():
    """The network is told 1000 t, from 1000 down; what is drawn is the last prediction."""
    stage = formula_stage(lambda x, time, *rest: 0 * x + time[:, None, None, None] / 1000)
    sampling = SamplingConfig(Euler(), 4, thresholding=NoThreshold())
    np.testing.assert_allclose(drawn(stage, sampling), 0.25, atol=1e-3)
    np.testing.assert_allclose(drawn(stage, ONE_STEP), 1.0, atol=1e-3)


def test_output_is_clipped_and_thresholded():
    stage = formula_stage(lambda x, *rest: 0 * x + 3.0)
    for thresholding in (NoThreshold(), StaticThreshold()):
        found = drawn(stage, replace(ONE_STEP, thresholding=thresholding))
        assert found.max() == 1.0 and found.min() > 0.999


def test_sizes():
    stage = formula_stage(mean_text)
    assert drawn(stage, ONE_STEP, size=(4, 10)).shape == (2, 4, 10, 3)
    with pytest.raises(ValueError, match="9 pixels is not a multiple of the network's stride 2"):
        drawn(stage, ONE_STEP, size=(8, 9))
    with pytest.raises(ValueError, match="stride 2"):
        replace(BASE, side=9)
    larger = formula_stage(see_low_res, low_res=True)
    low_res = jnp.asarray(0.2 * pictures(2, 6)[:, :4])
    wanted = enlarge(low_res, (16, 24))
    np.testing.assert_allclose(drawn(larger, ONE_STEP, size=(16, 24), low_res=low_res), wanted, atol=1e-3)
    for wrong in (None, low_res):
        with pytest.raises(ValueError, match="sampling 24×24 needs a low-resolution input 1/4 of it"):
            drawn(larger, ONE_STEP, size=(24, 24), low_res=wrong)
    with pytest.raises(ValueError, match="3 pixels is not a multiple of the network's stride 2"):
        drawn(larger, replace(ONE_STEP, tiles=Tiles(8, 3)), size=(16, 24), low_res=low_res)


def test_enlarging_is_pillows_bicubic():
    from PIL import Image

    low_res = pictures(1, 8)
    channel = Image.fromarray(low_res[0, :, :, 1], mode="F")
    wanted = np.asarray(channel.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(enlarge(jnp.asarray(low_res), (32, 32))[0, :, :, 1], wanted, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SamplingConfig(steps=0), "steps must be at least 1, not 0"),
        (lambda: SamplingConfig(aug_level=1.5), r"aug_level must lie in \[0, 1\]"),
        (lambda: TextConditioner(dropout=1.1), r"^dropout 1\.1: must be a fraction"),
        (lambda: LowResConditioner(max_level=-0.1), r"^max_level -0\.1: must lie in \[0, 1\]"),
        (lambda: LowResConditioner(factor=0), "^factor 0: must be at least 1"),
        (lambda: replace(SR, residual=True), "residual is for super-resolution models that predict x0"),
        (lambda: replace(BASE, residual=True, prediction=Prediction.X0), "residual"),
        (lambda: replace(BASE, conditioners=(TEXT, TEXT)), "two conditioners of the same type"),
        (
            lambda: replace(
                SR, residual=True, prediction=Prediction.X0, conditioners=(TEXT, LowResConditioner(channels=1))
            ),
            "residual adds 1 channels to images of 3 channels",
        ),
        (lambda: replace(BASE, conditioners=()), "a network has a conditioner with tokens if and only if"),
        (lambda: replace(SR, conditioners=(TEXT, LowResConditioner(factor=3))), "16 is not a multiple of the factor 3"),
        (lambda: DiffusionModel(unet=UNetConfig(), side=100), "stride 8"),
        (lambda: DiffusionModel().init(KEY), "the text encoder of this model is not set"),
        (lambda: DiffusionModel().batch_spec(1, 64), "the text encoder of this model is not set"),
    ],
)
def test_settings_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_is_there_keeps_the_contracts():
    for conditioner in (
        TEXT,
        LowResConditioner(),
        ClassConditioner(3),
        EmbeddingConditioner(4),
        SemanticMapConditioner(3),
    ):
        assert isinstance(conditioner, Conditioner)
    for reader in (MaskedText(), WholeText()):
        assert isinstance(reader, TextReader)
    trained = TrainedModel(SR, {}, ONE_STEP)
    assert isinstance(trained, Generator) and isinstance(trained, Decoder) and not isinstance(trained, Encoding)


# Whole stages


GUIDED = Guidance(3.0)
TEXTS, NULL = texts(8), TEXT.null_text(8)


@pytest.fixture(scope="module")
def whole():
    """Eight images of the base network with noise at every step and guidance."""
    sampling, params = SamplingConfig(DDPM(), 3, thresholding=StaticThreshold()), random_params(BASE)

    def run(rows=slice(None), put=lambda a: a, guidance=GUIDED, text=TEXTS, negative=NULL, progress=None):
        keys = noise.sample_keys(KEY, jnp.arange(8))[rows]
        text, negative = (jax.tree.map(lambda a: a[rows], given) for given in (text, negative))
        keys, text, negative = jax.tree.map(put, (keys, text, negative))
        trained = TrainedModel(BASE, params, replace(sampling, guidance=guidance))
        return np.asarray(trained.generate(SampleRequest(keys, (8, 8), text, negative, progress=progress)))

    return run, run()


def test_a_picture_does_not_depend_on_its_batch(whole):
    run, together = whole
    assert together.shape == (8, 8, 8, 3) and np.isfinite(together).all() and together.std() > 0.1
    assert np.abs(together[1:] - together[:-1]).max((1, 2, 3)).min() > 0.1
    for i in (2, 7):
        np.testing.assert_allclose(run(slice(i, i + 1)), together[i : i + 1], atol=1e-3)


def test_a_picture_does_not_depend_on_the_mesh(whole):
    run, together = whole
    mesh = make_mesh(data=8)
    # Guidance that ends halfway is a condition, on which all devices have to agree.
    put = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    inside = Guidance(3.0, (-20.0, 0.0))
    wanted = run(guidance=inside)
    with jax.set_mesh(mesh):
        spread = run(put=put, guidance=inside)
    np.testing.assert_allclose(spread, wanted, atol=1e-3)
    assert np.abs(wanted - together).max() > 0.01


def test_noise_is_bit_equal_whatever_the_batch_or_the_mesh():
    keys = noise.sample_keys(KEY, jnp.arange(8))
    together = np.asarray(noise.normal_like(keys, (8, 8, 3)))
    np.testing.assert_array_equal(noise.normal_like(keys[5:6], (8, 8, 3))[0], together[5])
    placed = jax.device_put(keys, batch_sharding(make_mesh(data=4, fsdp=2)))
    spread = jax.jit(lambda keys: noise.normal_like(keys, (8, 8, 3)))(placed)
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(spread, together)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_progress_does_not_change_the_pictures(whole, chunk, monkeypatch):
    run, together = whole
    done = []
    monkeypatch.setattr(sampling_module, "CHUNK", chunk)
    np.testing.assert_array_equal(run(progress=done.append), together)
    assert done == {1: [1, 2, 3], 2: [2, 3], 5: [3]}[chunk]


def test_weight_one_is_conditional_and_weight_zero_unconditional(whole):
    """Through the whole sampler with the real network."""
    run, guided = whole
    conditional, unconditional = run(guidance=Guidance()), run(guidance=Guidance(), text=NULL)
    assert np.abs(conditional - unconditional).max() > 0.01
    assert np.abs(conditional - guided).max() > 0.01
    np.testing.assert_allclose(run(guidance=Guidance(0.0)), unconditional, atol=1e-3)
    # Leading away from what is drawn leads nowhere.
    np.testing.assert_allclose(run(negative=TEXTS), conditional, atol=1e-3)
    assert np.abs(run(negative=texts(8, seed=1)) - guided).max() > 0.01


COLOURS = np.array([[0.8, -0.7, -0.7], [-0.7, 0.8, -0.6], [-0.8, -0.6, 0.9], [0.9, 0.8, -0.8]], np.float32)


def test_four_flat_colours_are_learned_and_redrawn():
    """Loss, sampler and guidance fit together: each caption's random embedding brings its own colour back."""
    conditioning = ConditioningConfig(32, MaskedText(16))
    unet = replace(
        BASE.unet, channels=16, patch=4, attention=AttentionConfig((False,), (False,)), conditioning=conditioning
    )
    process = {"schedule": CosineSchedule(shift=-3.0), "prediction": Prediction.X0, "weighting": MinSNR(floor=1.0)}
    stage = DiffusionModel(unet, 16, conditioners=(TEXT,), **process)
    text = texts(4)
    rows = np.arange(8) % 4
    image = np.broadcast_to(COLOURS[rows][:, None, None, :], (8, 16, 16, 3))
    batch = {"image": jnp.asarray(image), "text": text.tokens[rows], "text_mask": text.mask[rows]}
    params, _ = jax.jit(stage.init)(jax.random.key(0, impl="rbg"))
    optimizer = optax.flatten(optax.adam(optax.linear_schedule(5e-3, 0.0, 200)))  # compiled in less time

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled in half the time
    def step(params, state, number):
        loss = partial(loss_of, stage, batch=batch, key=jax.random.fold_in(KEY, number))
        (loss, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for i in range(200):
        params, state, loss = step(params, state, i)
        losses.append(loss)
    assert np.mean(losses[-20:]) < 0.1 * losses[0]
    sampling = SamplingConfig(DDIM(), 8, guidance=Guidance(2.0), thresholding=StaticThreshold())
    found = drawn(stage, sampling, count=4, params=params, text=text)
    distance = np.abs(found.mean((1, 2))[:, None] - COLOURS[None]).max(-1)
    assert (distance.argmin(1) == np.arange(4)).all()
    assert distance.diagonal().max() < 0.3


def test_rows_of_large_pictures_are_drawn_by_several_devices():
    """An image too large for one: its rows over `tensor`, the images of the batch over `data`."""
    params, mesh = random_params(SR), make_mesh(data=2, tensor=4)
    low_res = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    sampling = SamplingConfig(sampler=DDIM(), steps=3, guidance=Guidance(2.0))
    alone = drawn(SR, sampling, size=(32, 32), params=params, low_res=low_res)
    split = replace(SR, unet=executed(SR.unet, sharding=ActivationSharding(BATCH_AXES, ("tensor",))))
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, low_res), jax.NamedSharding(mesh, jax.P()))
        together = drawn(split, sampling, size=(32, 32), params=placed[0], low_res=placed[1])
    np.testing.assert_allclose(together, alone, atol=2e-3)
    assert np.std(alone) > 0.1

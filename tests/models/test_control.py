"""A model with ControlNets: what they add, when they act, in sampling, in a pipeline and in training."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import LENGTH, WIDTH, filled

from jaxdiff.core import trees
from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.diffusion.time_grid import time_grid
from jaxdiff.models.conditioner import SampleInputs
from jaxdiff.models.conditioners import HintConditioner, MaskConditioner, TextConditioner
from jaxdiff.models.control import ControlModel, controlled, with_controls
from jaxdiff.models.diffusion import DiffusionModel, executed
from jaxdiff.models.hints import HintImage
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel, _inputs, _predict_in_tiles
from jaxdiff.models.start import InitProduct
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.conditioning import Conditioning, Hint
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.mesh import make_mesh, to_devices
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import init_state, place_frozen, placements_of
from jaxdiff.training.step import make_step

UNET = LatentUNetConfig(
    channels=8, multipliers=(1,), blocks=(1,), transformer_layers=(1,), middle_layers=0, heads=(2,),
    cross_only=(False,), norm_groups=4,
)  # fmt: skip
BASE = DiffusionModel(
    unet=UNET,
    side=8,
    product=LatentSpec(4, 2),
    conditioners=(TextConditioner(WIDTH, LENGTH),),
    schedule=TabulatedSchedule.cosine(),
    prediction=Prediction.X0,
)
CONTROL = ControlNetConfig(UNET, hint_widths=(4, 6))
GREY = replace(CONTROL, hint_channels=1)
MODEL = controlled(BASE, CONTROL, GREY)
SAMPLING = SamplingConfig(DDIM(), 4, guidance=Guidance(2.0), thresholding=NoThreshold())
RNG = np.random.default_rng(0)
HINTS = tuple(RNG.uniform(size=(2, 16, 16, channels)).astype("f4") for channels in (3, 1))
TEXT = TextEmbedding(jnp.asarray(RNG.normal(size=(2, LENGTH, WIDTH)), jnp.float32), jnp.ones((2, LENGTH), bool))


@pytest.fixture(scope="module")
def params():
    return filled(jax.eval_shape(MODEL.init, jax.random.key(0))[0])


@pytest.fixture(scope="module")
def trained(params):
    base = TrainedModel(BASE, params["base"], SAMPLING)
    return with_controls(base, list(zip(MODEL.controls, params["controls"])))


def hints(weights, fade=0.0, times=None):
    bounds = None if times is None else jnp.broadcast_to(jnp.asarray(times, jnp.float32), (2, 2))
    return tuple(
        Hint(jnp.asarray(image), jnp.full(2, weight), jnp.full(2, fade), bounds)
        for image, weight in zip(HINTS, weights)
    )


X, T = jnp.asarray(RNG.normal(size=(2, 8, 8, 4)), jnp.float32), jnp.asarray([0.3, 0.6])
PLAIN = Conditioning(TEXT.tokens, TEXT.mask)
predict = jax.jit(lambda params, given: MODEL.predict(params, X, T, given))
predict_base = jax.jit(lambda params, given: BASE.predict(params, X, T, given))


@jax.jit
def residuals(params):
    """Of each ControlNet, from its module."""
    time = BASE.schedule.network_time(T)
    return [
        config.module().apply({"params": own}, X, time, jnp.asarray(hint), PLAIN)
        for config, own, hint in zip(MODEL.controls, params["controls"], HINTS)
    ]


@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_weighted_sum_of_residuals(params, fade):
    """With fade the four residuals are scaled as in diffusers' guess mode."""
    first, second = residuals(params)
    scales = np.logspace(-1, 0, len(first)) if fade else np.ones(len(first))
    assert len(first) == 3  # stem, one block, middle
    total = tuple(s * (0.5 * a + 2.0 * b) for s, a, b in zip(scales.astype("f4"), first, second))
    wanted = predict_base(params["base"], PLAIN._replace(residuals=total))
    got = predict(params, PLAIN._replace(hints=hints((0.5, 2.0), fade)))
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert np.abs(got - predict_base(params["base"], PLAIN)).max() > 0.01


def test_it_acts_between_times(params):
    """Of two samples at other times one is inside; at a time when none is, nothing is added."""
    both, base = (np.asarray(predict(params, PLAIN._replace(hints=hints(w)))) for w in ((1.0, 1.0), (0.0, 0.0)))
    for times, inside in (((0.5, 0.7), (False, True)), ((0.2, 0.4), (True, False)), ((0.7, 0.8), (False, False))):
        got = np.asarray(predict(params, PLAIN._replace(hints=hints((1.0, 1.0), times=times))))
        for row, acts in enumerate(inside):
            np.testing.assert_allclose(got[row], (both if acts else base)[row], atol=1e-5)
    np.testing.assert_allclose(base, predict_base(params["base"], PLAIN), atol=1e-6)


def test_hints_are_needed(params):
    with pytest.raises(ValueError, match="0 hints for 2 ControlNets"):
        predict(params, PLAIN)
    with pytest.raises(ValueError, match="1 hints for 2 ControlNets"):
        predict(params, PLAIN._replace(hints=hints((1.0,))))


def request(*weights, size=(8, 8), init=None, **settings):
    keys = noise.sample_keys(jax.random.key(3), jnp.arange(2))
    given = tuple(HintImage(image, weight, **settings) for image, weight in zip(HINTS, weights))
    return SampleRequest(keys, size, TEXT, init=init, hints=given)


def compiled(run):
    """The number of programs that a run compiles."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    try:
        run()
    finally:
        jax.monitoring.clear_event_listeners()
    return len([event for event in events if "backend_compile" in event])


@dataclass(frozen=True)
class Words:
    """A text encoder of two known captions and the empty one."""

    length: int = LENGTH
    width: int = WIDTH
    fingerprint: str = "words"
    padding_is_read: bool = False

    def encode(self, captions):
        tokens = jnp.stack([TEXT.tokens["ab".index(caption)] for caption in captions])
        return TextEmbedding(tokens, jnp.ones(tokens.shape[:2], bool))


def test_a_pipeline_with_two_hints(trained):
    """New weights compile nothing, and a hint for each sample goes with it."""
    pipeline = Pipeline(Words(), trained)
    sampled = lambda *given, prompts=("a", "b"), batch=16: pipeline.sample(  # noqa: E731
        list(prompts), SampleOptions(hints=given, batch=batch)
    )[0]
    first, second = HINTS
    one = sampled(HintImage(first), HintImage(second[0], 0.5))
    assert not compiled(lambda: sampled(HintImage(first, 0.3), HintImage(second[0], 0.7)))
    for sample in range(2):  # the same hint for all samples
        same = sampled(HintImage(first[sample]), HintImage(second[0], 0.5))
        np.testing.assert_allclose(same[sample], one[sample], atol=1e-4)
        assert np.abs(same[1 - sample] - one[1 - sample]).max() > 0.01
    # Three samples in two batches, of which the second is padded.
    three = HintImage(np.concatenate([first, first[:1]])), HintImage(second[0], 0.5)
    more = sampled(*three, prompts=("a", "b", "a"), batch=2)
    np.testing.assert_allclose(more[:2], one, atol=1e-4)
    assert np.abs(more[2] - more[0]).max() > 0.01  # other noise


def test_sampling_acts_in_some_steps(trained):
    """Bounds are traced, and count."""
    off = np.asarray(trained.generate(request(0.0, 0.0)))
    on = np.asarray(trained.generate(request(1.0, 1.0)))
    early = np.asarray(trained.generate(request(1.0, 1.0, end=0.5)))
    late = np.asarray(trained.generate(request(1.0, 1.0, start=0.5)))
    for a, b in ((on, off), (early, on), (early, off), (late, on), (late, off), (early, late)):
        assert np.abs(a - b).max() > 1e-3
    assert not compiled(lambda: trained.generate(request(0.5, 1.0, start=0.25, end=0.75)))
    with pytest.raises(ValueError, match=r"none of 4 steps lies between 0\.3 and 0\.4"):
        trained.generate(request(1.0, 1.0, start=0.3, end=0.4))


def test_image_to_image_and_inpainting(trained):
    """The kept part is kept, and bounds are fractions of the steps that are run."""
    value = jnp.asarray(RNG.normal(size=(2, 8, 8, 4)), jnp.float32)
    mask = jnp.zeros((2, 8, 8, 1)).at[:, :, 4:].set(1.0)
    init = InitProduct(value, 0.5, mask)
    on, off = (np.asarray(trained.generate(request(weight, weight, init=init))) for weight in (1.0, 0.0))
    np.testing.assert_array_equal(on[:, :, :4], value[:, :, :4])
    assert np.abs(on - off)[:, :, 4:].max() > 1e-3
    (hint, _) = _inputs(MODEL, SAMPLING, None, request(1.0, 1.0, init=init, start=0.5)).hints
    times = time_grid(MODEL.schedule, 4, SAMPLING.spacing).t  # of which the last two are run
    acts = [bool((hint.times[0, 0] <= t) & (t <= hint.times[0, 1])) for t in times[:4]]
    assert acts == [False, False, False, True]


def test_guess_mode(params):
    """The unconditional branch gets nothing."""
    inputs = replace(MODEL.conditioners[-1], channels=(1,))
    given = SampleInputs(hints=hints((0.0, 2.0))[1:], guess=(True,))
    both = inputs.sampling(given, noise.sample_keys(jax.random.key(0), jnp.arange(2)), (8, 8))
    np.testing.assert_array_equal(both.conditional.hints[0].weight, 2.0)
    np.testing.assert_array_equal(both.unconditional.hints[0].weight, 0.0)


def test_tiles_have_their_part_of_the_hint(params):
    """Where only the first tile counts, the result is that of its crop with the same crop of the hint."""
    x = jnp.concatenate([X, X[:, :, ::-1]], 2)
    wide = tuple(h._replace(image=jnp.concatenate([h.image, 1 - h.image], 2)) for h in hints((1.0, 1.0)))
    tiles = Tiles(8, 2)
    run = jax.jit(lambda params, x, given: _predict_in_tiles(MODEL, tiles, params, x, T, given))
    got = run(params, x, PLAIN._replace(hints=wide))
    wanted = predict(params, PLAIN._replace(hints=hints((1.0, 1.0))))
    assert got.shape == (2, 8, 16, 4)
    np.testing.assert_allclose(got[:, :, :4], wanted[:, :, :4], atol=1e-5)


FRESH = ControlModel(BASE, CONTROL)
BATCH = {
    "image": jnp.tile(jnp.asarray(HINTS[0][:, ::2, ::2, :1]), (4, 1, 1, 4)),
    "hint": jnp.tile(jnp.asarray(HINTS[0]), (4, 1, 1, 1)),
    "text": jnp.tile(TEXT.tokens, (4, 1, 1)).astype(jnp.float16),
    "text_mask": jnp.ones((8, LENGTH), bool),
}


@pytest.fixture(scope="module")
def initial(params):
    return FRESH.initial(jax.random.key(1), params["base"])


def test_a_copy_changes_nothing(params, initial):
    """The parameters are the base's where it has them, and the loss is exactly its loss."""
    flat, base = trees.flatten(initial), trees.flatten(params["base"])
    own = {name.split("/")[0] for name in flat if name not in base}
    assert own == {"hint", "zero_0", "zero_1", "zero_middle"}
    for name in ("zero_0", "zero_1", "zero_middle", "hint/out"):
        assert not np.asarray(flat[f"{name}/kernel"]).any(), name
    assert np.asarray(flat["hint/in/kernel"]).any() and np.asarray(flat["hint/block_0/kernel"]).any()
    for name in flat.keys() & base.keys():
        np.testing.assert_array_equal(flat[name], base[name], err_msg=name)
    assert {"stem", "time", "down_0_0", "down_0_0_attention", "middle_0", "middle_1"} <= initial.keys()
    assert not any(name.startswith(("up", "head")) for name in flat)
    key, step = jax.random.key(4), jnp.int32(0)
    loss, (metrics, extra) = jax.jit(FRESH.loss)(initial, (), params["base"], BATCH, key, step)
    wanted, _ = jax.jit(BASE.loss)(params["base"], (), (), BATCH, key, step)
    assert (metrics, extra) == ({}, ()) and float(loss) == float(wanted)
    held = jax.eval_shape(FRESH.held_out_losses, initial, (), params["base"], BATCH, jnp.arange(8), key)
    assert held == jax.eval_shape(BASE.held_out_losses, params["base"], (), (), BATCH, jnp.arange(8), key)


def test_the_stem_of_a_base_with_more_channels():
    """Inpainting: the ControlNet reads the latents alone, with the first channels of the base's stem."""
    masked = replace(BASE, conditioners=(*BASE.conditioners, MaskConditioner()))
    base = filled(jax.eval_shape(masked.init, jax.random.key(0))[0])
    for inputs, channels in ((4, 4), (9, 9)):
        copied = ControlModel(masked, replace(CONTROL, inputs=inputs)).initial(jax.random.key(1), base)
        np.testing.assert_array_equal(copied["stem"]["kernel"], base["stem"]["kernel"][:, :, :channels])
    with pytest.raises(ValueError, match="a ControlNet of 5 channels, for 4 and 5 beside them"):
        ControlModel(masked, replace(CONTROL, inputs=5)).initial(jax.random.key(1), base)


def test_training(params, initial):
    """The loss falls, the base stays; the hint encoder learns as soon as the zero convolutions let gradients through:
    its last layer in the second step, its first in the third."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), OptimizerConfig(learning_rate=3e-3, warmup=0, total=1000)
    frozen = place_frozen(params["base"], mesh)
    state = init_state(FRESH, optimizer, jax.random.key(0), mesh, params=initial)
    step = make_step(FRESH, optimizer, placements_of(state), frozen=placements_of(frozen))
    spec = FRESH.batch_spec(8, 8)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in BATCH.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()
    }
    batch, losses, norms = to_devices(BATCH, mesh), [], []
    names = "zero_0", "hint/out", "hint/in"
    for _ in range(30):
        before = {name: trees.flatten(jax.device_get(state.params))[f"{name}/kernel"] for name in names}
        state, metrics = step(state, batch, jax.random.key(5), frozen)
        after = trees.flatten(jax.device_get(state.params))
        norms.append([float(np.abs(after[f"{name}/kernel"] - before[name]).max()) for name in names])
        losses.append(float(metrics["loss"]))
    assert norms[0][0] > 1e-4 and norms[0][1] == 0.0
    assert norms[1][1] > 1e-4 and norms[1][2] == 0.0 < norms[2][2]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    for name, leaf in trees.flatten(params["base"]).items():
        np.testing.assert_array_equal(trees.flatten(frozen)[name], leaf)
    assert set(jax.tree.leaves(FRESH.labels(initial))) == {"all"}
    half = ControlModel(executed(BASE, dtype="bfloat16"), CONTROL).cast(initial)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half) if leaf.ndim > 1} == {"bfloat16"}


def test_what_does_not_fit(params, trained):
    wide = replace(CONTROL, unet=replace(UNET, channels=16))
    with pytest.raises(ValueError, match="ControlNet 1 has channels 16, the network that it controls 8"):
        controlled(BASE, CONTROL, wide)
    with pytest.raises(ValueError, match="ControlNet 0 reads hints of 8 pixels per latent, the model has 2"):
        controlled(BASE, replace(CONTROL, hint_widths=(4, 4, 4, 4)))
    with pytest.raises(ValueError, match="no ControlNets"):
        controlled(BASE)
    with pytest.raises(ValueError, match="make it by `controlled`"):
        replace(MODEL, conditioners=BASE.conditioners)
    base = replace(trained, model=BASE, params=params["base"])
    with pytest.raises(
        ValueError, match=r"ControlNet 0 for the 8 stage does not fit the settings: .* of another shape"
    ):
        with_controls(base, [(CONTROL, params["controls"][1])])
    with pytest.raises(ValueError, match="the base's parameters for a ControlNet does not fit"):
        more = replace(CONTROL, unet=replace(UNET, transformer_layers=(2,)))
        ControlModel(BASE, more).initial(jax.random.key(0), params["base"])
    with pytest.raises(ValueError, match="a batch of this model needs hint"):
        FRESH.loss({}, (), {}, {name: BATCH[name] for name in BATCH if name != "hint"}, jax.random.key(0), jnp.int32(0))
    small = BATCH | {"hint": BATCH["hint"][:, :8]}
    with pytest.raises(ValueError, match="the batch's hint is an image of 8×16×3: sampling 8×8 needs 16×16×3"):
        FRESH.loss({}, (), {}, small, jax.random.key(0), jnp.int32(0))


def test_hints_that_do_not_fit(trained):
    pipeline = Pipeline(Words(), trained)
    good = HintImage(HINTS[0]), HintImage(HINTS[1])
    base = Pipeline(Words(), replace(trained, model=BASE, params=trained.params["base"]))
    for box, given, message in (
        (base, good, "2 hints, and no stage that runs has a ControlNet"),
        (pipeline, (), "0 hints: the 8 stage has 2 ControlNets"),
        (pipeline, (good[0], HintImage(HINTS[0])), "hint 1 is an image of 16×16×3: sampling 8×8 needs 16×16×1"),
        (pipeline, (HintImage(HINTS[0][:, :8]), good[1]), "hint 0 is an image of 8×16×3: sampling 8×8 needs 16×16×3"),
        (pipeline, (HintImage(HINTS[0][:1]), good[1]), "hint 0 has 1 images, for 2 samples"),
        (pipeline, (HintImage(2 * HINTS[0] - 1), good[1]), "hint 0 is float32 from -"),
        (pipeline, (HintImage((255 * HINTS[0]).astype("u1")), good[1]), "hint 0 is uint8 .*: hints are floating"),
        (pipeline, (HintImage(np.full_like(HINTS[0], np.nan)), good[1]), "hint 0 is float32 from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            box.sample(["a", "b"], SampleOptions(hints=given))
    with pytest.raises(ValueError, match="1 hints: the 8 stage has 2 ControlNets"):
        trained.generate(request(1.0))
    for bounds in ({"start": 0.5, "end": 0.5}, {"start": -0.1}, {"end": 1.1}):
        with pytest.raises(ValueError, match="acts from a start to a later end"):
            HintImage(HINTS[0], **bounds)
    with pytest.raises(ValueError, match="a hint has the shape"):
        HintImage(HINTS[0][0, :, :, 0])
    assert HintConditioner((3, 1), 2) == trained.reads_hints

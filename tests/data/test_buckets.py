"""Aspect-ratio buckets: sizes, assignment, and a stream of batches that nothing but the settings decides."""

import dataclasses
import itertools
import json
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest

from jaxdiff.data import images
from jaxdiff.data.buckets import BucketPlan, Buckets, PlanSettings
from jaxdiff.data.image_sizes import ImageSizes, read_sizes
from jaxdiff.data.mixture import MixtureSource
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches

FORMS = ((40, 80), (64, 64), (80, 40), (50, 60))  # the images' sizes in turn
FITTED = ((48, 88), (64, 64), (88, 48), (56, 72))  # the buckets that they go to
BUCKETS = Buckets(stride=8)


def make_source(listed, count, forms=FORMS, letter="a"):
    """Images of one value, i for example i."""
    arrays = (np.full((*forms[i % len(forms)], 3), i % 256, np.uint8) for i in range(count))
    return listed(
        tuple({"image": array, "caption": f"{letter}{i}", "name": f"set/{letter}{i}"} for i, array in enumerate(arrays))
    )


@pytest.fixture(scope="module")
def mixed_forms(listed):
    return make_source(listed, 45)


def batches(source, batch=4, **options):
    settings = {
        name: options.pop(name) for name in ("repeat", "shuffle", "seed", "low_resolution", "strict") if name in options
    }
    config = DataConfig(64, batch, buckets=BUCKETS, captions=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return image_batches(source, config, sizes=read_sizes(source), **options)


def take(stream, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(itertools.islice(stream, count))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def indices(some):
    return [index for batch in some for index in batch["index"].tolist()]


@pytest.mark.parametrize(
    "buckets, resolution, sizes",
    [
        (Buckets(8), 64, [(48, 88), (56, 72), (64, 64), (72, 56), (88, 48)]),
        (Buckets(64), 256, [(192, 320), (256, 256), (320, 192)]),
        (Buckets(64, 1.0), 256, [(256, 256)]),
        (Buckets(16, 4.0), 32, [(16, 64), (32, 32), (64, 16)]),
    ],
)
def test_the_sizes(buckets, resolution, sizes):
    assert list(buckets.sizes(resolution)) == sizes


@pytest.mark.parametrize("stride, resolution", [(64, 1024), (64, 512), (32, 256), (8, 64)])
def test_sizes_have_about_one_number_of_pixels(stride, resolution):
    sizes = Buckets(stride).sizes(resolution)
    assert (resolution, resolution) in sizes and {(w, h) for h, w in sizes} == set(sizes) and len(sizes) > 2
    for height, width in sizes:
        assert height % stride == width % stride == 0
        assert abs(height * width / resolution**2 - 1) < 0.5 * stride / min(height, width) + 1e-9
        assert max(height / width, width / height) <= 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Buckets(0), "stride of 0"),
        (lambda: Buckets(8, 0.5), "max_aspect 0.5"),
        (lambda: Buckets(8, float("nan")), "max_aspect nan"),
        (lambda: DataConfig(60, 2, buckets=BUCKETS), "resolution 60 is not a multiple of the stride 8"),
        (lambda: DataConfig(64, 2, low_resolution=16, crop=32, buckets=BUCKETS), "crop is a square window"),
        (lambda: DataConfig(64, 2, low_resolution=4, buckets=BUCKETS), "stride 8 is not a multiple of the factor 16"),
    ],
)
def test_bad_settings_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_sizes_are_asked_for_and_checked(mixed_forms, make):
    with pytest.raises(ValueError, match="buckets need the sizes"):
        image_batches(mixed_forms, DataConfig(64, 2, buckets=BUCKETS))
    with pytest.raises(ValueError, match="sizes of the images are for buckets"):
        image_batches(mixed_forms, DataConfig(64, 2), sizes=read_sizes(mixed_forms))
    with pytest.raises(ValueError, match="sizes of 3 images for 45 examples"):
        image_batches(mixed_forms, DataConfig(64, 2, buckets=BUCKETS), sizes=read_sizes(make(3, 8, 8)))
    nothing = ImageSizes(np.zeros((45, 2), np.int32), (("x", "gone"),) * 45)
    with pytest.raises(ValueError, match="not one of the 45 images has a header"):
        image_batches(mixed_forms, DataConfig(64, 2, buckets=BUCKETS), sizes=nothing)


def test_each_batch_has_one_size_and_images_that_are_near_it(mixed_forms):
    stream = batches(mixed_forms)
    assert stream.buckets.sizes == ((48, 88), (56, 72), (64, 64), (88, 48))
    assert stream.buckets.counts == (12, 11, 11, 11) and stream.buckets.merged == 0
    for batch in take(stream, 30):
        size = batch["image"].shape[1:3]
        (number,) = {i % 4 for i in batch["index"].tolist()}
        assert size == FITTED[number]
        assert (images.to_uint8(batch["image"])[:, 0, 0, 0] == batch["index"]).all()
        assert batch["caption"].tolist() == [f"a{i}" for i in batch["index"]]


def test_images_are_resized_to_fit_and_lose_the_ends_of_one_side():
    ramp = np.broadcast_to(np.linspace(0, 255, 160).astype(np.uint8)[None, :, None], (64, 160, 3))
    wide = images.resize(ramp, (32, 64))
    expected = np.linspace(0, 255, 160)[16:144].reshape(64, 2).mean(1)  # 16 of 160 columns go at each end
    np.testing.assert_allclose(wide[5, 2:-2, 0], expected[2:-2], atol=2)
    high = images.resize(ramp.transpose(1, 0, 2), (64, 32))
    np.testing.assert_array_equal(high, wide.transpose(1, 0, 2))
    assert images.resize(ramp, (64, 160)) is ramp
    np.testing.assert_array_equal(images.resize(ramp, 16), images.resize(ramp, (16, 16)))


def test_nothing_is_left_out_over_epochs(mixed_forms):
    """Of 45 images in batches of 4, each comes once in 45, and what fills no batch begins the next epoch."""
    stream = batches(mixed_forms)
    seen = take(stream, 45 * 4 // 4)
    assert Counter(Counter(indices(seen)).values()) == {4: 45}
    assert "9 that fill no batch of the first epoch begin the next" in str(stream.buckets)
    assert str(stream.buckets).startswith("4 buckets (height × width: images): 48 × 88: 12, 56 × 72: 11,")
    for start in range(4):  # each bucket's images once before any again
        own = [i for i in indices(seen) if i % 4 == start]
        count = len(own) // 4
        assert all(len(set(own[k * count : (k + 1) * count])) == count for k in range(4))


def test_which_bucket_comes_when_is_at_random_with_the_seed(mixed_forms):
    orders = [[batch["image"].shape[1:3] for batch in take(batches(mixed_forms, seed=seed), 18)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and orders[0][:9] != orders[0][9:]
    first, second = (indices(take(batches(mixed_forms, shuffle=False), 9)) for _ in range(2))
    assert first == second and [i for i in first if i % 4 == 0][:12] == list(range(0, 45, 4))


def test_one_epoch_has_everything_once(mixed_forms):
    seen = take(batches(mixed_forms, repeat=False), 100)
    assert sorted(indices(seen)) == list(range(45))
    assert Counter(len(batch["image"]) for batch in seen) == {4: 9, 3: 3}


@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_every_batch(mixed_forms, repeat):
    """The same size at the same step, and their rows one after the other are those of one process."""
    one = take(batches(mixed_forms, 6, repeat=repeat), 10)
    shares = [take(batches(mixed_forms, 2, repeat=repeat, process_index=i, process_count=3), 10) for i in range(3)]
    assert [len(share) for share in shares] == [len(one)] * 3
    for whole, *parts in zip(one, *shares):
        assert {part["image"].shape[1:] for part in parts} == {whole["image"].shape[1:]}
        same({key: np.concatenate([part[key] for part in parts]) for key in whole}, whole)
    if not repeat:
        assert sorted(indices(one)) == list(range(45))


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_a_saved_state_continues_exactly(mixed_forms, stop):
    expected = take(batches(mixed_forms, low_resolution=16), 30)
    first = batches(mixed_forms, low_resolution=16, read_ahead=ReadAhead(threads=2, ahead=8))
    for seen, wanted in zip(take(first, stop), expected):
        same(seen, wanted)
    second = batches(mixed_forms, low_resolution=16, read_ahead=ReadAhead(threads=0))
    second.set_state(json.loads(json.dumps(first.get_state())))
    for seen, wanted in zip(take(second, 30 - stop), expected[stop:], strict=True):
        same(seen, wanted)


@pytest.mark.slow
def test_worker_processes_change_nothing(mixed_forms):
    expected = take(batches(mixed_forms), 6)
    workers = batches(mixed_forms, read_ahead=ReadAhead(workers=2))
    for seen, wanted in zip(take(workers, 3), expected):
        same(seen, wanted)
    resumed = batches(mixed_forms, read_ahead=ReadAhead(workers=2))
    resumed.set_state(workers.get_state())
    for seen, wanted in zip(take(resumed, 3), expected[3:]):
        same(seen, wanted)


def test_the_low_resolution_image_is_the_same_shrunk(listed):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (96, 200, 3), np.uint8)
    source = listed(tuple({"image": array, "caption": "x", "name": "x"} for _ in range(4)))
    batch = next(batches(source, low_resolution=16))
    assert batch["image"].shape == (4, 48, 88, 3) and batch["low_res"].shape == (4, 12, 22, 3)
    expected = images.resize(array, (48, 88))
    np.testing.assert_array_equal(images.to_uint8(batch["image"][0]), expected)
    np.testing.assert_array_equal(images.to_uint8(batch["low_res"][3]), images.resize(expected, (12, 22)))


def test_small_buckets_go_to_the_next(listed):
    """Three panoramas in batches of four would be repeated within a batch."""
    source = make_source(listed, 23, ((64, 64),) * 7 + ((40, 80),))
    plan = batches(source).buckets
    assert plan.sizes == ((64, 64),) and plan.counts == (23,) and plan.merged == 2
    assert "1 bucket (height × width: images): 64 × 64: 23; 2 images of smaller buckets went to the next" in str(plan)
    two = batches(source, 2).buckets
    assert two.sizes == ((48, 88), (64, 64)) and two.merged == 0
    forms = (64, 64), (80, 40), (72, 58), (64, 64), (80, 40)  # the third is nearer to the square
    between = batches(make_source(listed, 25, forms), 6).buckets
    assert between.sizes == ((64, 64), (88, 48)) and between.counts == (15, 10)
    few = take(batches(make_source(listed, 3), 8), 3)  # fewer than a batch in all
    assert {batch["image"].shape for batch in few} == {few[0]["image"].shape} and sorted(set(indices(few))) == [0, 1, 2]


def with_faults(source, listed):
    faulty = list(source.examples)
    faulty[4] = {**faulty[4], "image": b"damaged"}
    faulty[5] = {**faulty[5], "caption": None}
    faulty[9] = {**faulty[9], "image": images.encode_png(np.zeros((64, 64, 3), np.uint8))[:60]}
    faulty[13] = FileNotFoundError("gone")
    return listed(tuple(faulty))


def test_a_damaged_image_gives_its_place_to_another_of_its_bucket(mixed_forms, listed):
    """So the order of sizes stays the same, and with it what other processes do."""
    stream = batches(with_faults(mixed_forms, listed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = list(itertools.islice(stream, 40))
    assert stream.skipped.reasons == {"unreadable": 3, "no caption": 1}
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == 2 and any("a5" in line for line in lines)  # the others had no header, and were named before
    assert not {4, 5, 9, 13} & set(indices(seen))
    assert all(len(batch["image"]) == 4 for batch in seen)
    assert all({FITTED[i % 4] for i in batch["index"].tolist()} == {batch["image"].shape[1:3]} for batch in seen)
    again = batches(with_faults(mixed_forms, listed))
    again.set_state({**stream.get_state()})
    same(take(again, 1)[0], take(stream, 1)[0])


def test_in_one_epoch_a_damaged_image_is_left_out(mixed_forms, listed):
    seen = take(batches(with_faults(mixed_forms, listed), repeat=False), 100)
    assert sorted(indices(seen)) == sorted(set(range(45)) - {4, 5, 9, 13})
    assert all(len(batch["image"]) for batch in seen)


def test_strict_names_the_culprit(mixed_forms, listed):
    faulty = with_faults(mixed_forms, listed)
    with pytest.raises(ValueError, match=r"set/a4: not an image .*\(strict\)"):
        batches(faulty, strict=True)
    only_caption = listed((*mixed_forms.examples[:5], faulty.examples[5], *mixed_forms.examples[6:]))
    with pytest.raises(ValueError, match=r"set/a5: no caption \(strict\)"):
        take(batches(only_caption, strict=True), 30)


def test_a_bucket_without_one_usable_image_ends(mixed_forms, listed):
    hopeless = listed(tuple({**each, "caption": None} for each in mixed_forms.examples))
    with pytest.raises(
        ValueError, match=r"not one of the 1\d images of the bucket \d\d × \d\d is usable; the last: .*no caption"
    ):
        take(batches(hopeless), 1)


def test_a_mixture_keeps_its_weights_over_the_buckets(listed):
    parts = make_source(listed, 24), make_source(listed, 40, ((64, 64), (40, 80)), "b")
    mixed = MixtureSource(parts, (3, 1))
    assert batches(mixed).buckets.counts == (26, 6, 26, 6)
    seen = take(batches(mixed), 4 * 16)
    letters = Counter(caption[0] for batch in seen for caption in batch["caption"])
    assert abs(letters["a"] - 192) <= 8
    for batch in seen:
        for index, caption in zip(batch["index"].tolist(), batch["caption"].tolist()):
            part, place = mixed.where(index)
            assert caption == f"{'ab'[part]}{place}"
    counts = Counter(caption for batch in seen for caption in batch["caption"] if caption[0] == "a")
    assert set(counts.values()) <= {7, 8, 9} and len(counts) == 24  # 192 of 24
    shape = Counter(batch["image"].shape[1:3] for batch in seen)
    assert abs(shape[48, 88] - 64 * (0.75 * 0.25 + 0.25 * 0.5)) <= 2


def test_a_plan_is_a_function_of_its_settings(mixed_forms):
    sizes = read_sizes(mixed_forms)
    plan = BucketPlan(mixed_forms, sizes, BUCKETS, 64, PlanSettings(4, seed=1))
    slots = [plan.slot(i) for i in range(500)]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.slot(i) for i in reversed(range(500))] == slots[::-1]
    far = [plan.slot(4 * 10**6 + i) for i in range(45 * 4)]
    assert {slot.index for slot in far} == set(range(45))
    other = dataclasses.replace(PlanSettings(4, seed=1), seed=2)
    assert copy.fingerprint() == plan.fingerprint() != BucketPlan(mixed_forms, sizes, BUCKETS, 64, other).fingerprint()
    moved = ImageSizes(sizes.sizes[::-1].copy())
    assert BucketPlan(mixed_forms, moved, BUCKETS, 64, PlanSettings(4, seed=1)).fingerprint() != plan.fingerprint()
    assert (
        batches(mixed_forms).varying_shapes == batches(mixed_forms, 2, process_index=1, process_count=2).varying_shapes
    )

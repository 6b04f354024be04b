"""Order, resumption, shares, crops and rejects of the one pipeline."""

import dataclasses
import itertools
import json
import warnings

import numpy as np
import pytest

from jaxdiff.data import grain_pipeline, images
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches


def take(batches, count):
    return list(itertools.islice(batches, count))


def places(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(params=["table", "grain"])
def either_shuffle(request, monkeypatch):
    """Small sets are shuffled by a table, large ones by Grain: both must behave alike."""
    monkeypatch.setattr(grain_pipeline, "SMALL", 4096 if request.param == "table" else 0)


def test_batches_hold_the_pictures(source):
    (batch,) = image_batches(source, DataConfig(32, 11, shuffle=False, repeat=False, captions=True))
    assert batch["image"].dtype == np.float32
    expected = np.stack([images.decode(example["image"]) for example in source.examples])
    np.testing.assert_array_equal(images.to_uint8(batch["image"]), expected)
    assert batch["caption"].tolist() == [example["caption"] for example in source.examples]
    assert next(image_batches(source, DataConfig(32, 4))).keys() == {"image"}


def test_every_epoch_has_everything_once_in_a_new_order(source, either_shuffle):
    seen = places(take(image_batches(source, DataConfig(32, 11, captions=True, seed=5)), 4))
    epochs = [tuple(seen[i : i + 11]) for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(epochs)) == 4
    other = places(take(image_batches(source, DataConfig(32, 11, captions=True, seed=6)), 1))
    assert tuple(other) != epochs[0]


def test_one_epoch_ends_with_a_short_batch(source, either_shuffle):
    batches = list(image_batches(source, DataConfig(32, 4, captions=True, repeat=False)))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 3]
    assert sorted(places(batches)) == list(range(11))


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_a_saved_state_continues_exactly(source, either_shuffle, stop):
    def fresh(threads):
        config = DataConfig(32, 4, low_resolution=8, crop=16, captions=True, seed=1)
        return image_batches(source, config, read_ahead=ReadAhead(threads=threads, ahead=8))

    uninterrupted = take(fresh(0), 10)
    first = fresh(2)
    for seen, expected in zip(take(first, stop), uninterrupted):
        same(seen, expected)
    state = json.loads(json.dumps(first.get_state()))
    second = fresh(3)
    second.set_state(state)
    for resumed, expected in zip(take(second, 10 - stop), uninterrupted[stop:], strict=True):
        same(resumed, expected)


def test_a_state_survives_skipped_examples(source, listed):
    damaged = {**source.examples[2], "image": b"damaged"}
    broken = listed((*source.examples[:2], damaged, *source.examples[3:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uninterrupted = take(image_batches(broken, DataConfig(32, 4, captions=True)), 9)
        first = image_batches(broken, DataConfig(32, 4, captions=True))
        take(first, 4)
        second = image_batches(broken, DataConfig(32, 4, captions=True))
        second.set_state(first.get_state())
        for resumed, expected in zip(take(second, 5), uninterrupted[4:], strict=True):
            same(resumed, expected)


@pytest.mark.parametrize("processes", [1, 2, 3, 11])
def test_the_shares_of_processes_are_a_partition(source, either_shuffle, processes):
    config = DataConfig(32, 2, captions=True, repeat=False)
    shares = [places(image_batches(source, config, process_index=i, process_count=processes)) for i in range(processes)]
    assert sorted(itertools.chain(*shares)) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_shares_together_are_the_one_process_stream(source):
    config = DataConfig(32, 6, low_resolution=8, crop=16, seed=2)
    one = take(image_batches(source, config), 5)
    half = dataclasses.replace(config, batch=3)
    halves = [take(image_batches(source, half, process_index=i, process_count=2), 5) for i in range(2)]
    for step, whole in enumerate(one):
        for i in range(2):
            same(halves[i][step], {key: value[3 * i : 3 * i + 3] for key, value in whole.items()})


def test_super_resolution_pairs_show_the_same_place(make):
    """The mean over each factor × factor block of the window is the low window; moved by one pixel it is not."""
    batch = next(image_batches(make(8, 64, 64), DataConfig(64, 8, low_resolution=16, crop=32, seed=4)))
    high, low = batch["image"], batch["low_res"]
    assert high.shape == (8, 32, 32, 3) and low.shape == (8, 8, 8, 3)
    shrunk = high.reshape(8, 8, 4, 8, 4, 3).mean((2, 4))
    aligned = np.abs(shrunk - low).mean()
    moved = min(np.abs(np.roll(shrunk, 1, axis)[:, 1:, 1:] - low[:, 1:, 1:]).mean() for axis in (1, 2))
    assert aligned < 0.03 and moved > 5 * aligned, (aligned, moved)


def test_the_low_resolution_picture_is_shrunk_before_cropping(source):
    """A crop's edge must see its neighbours, as it does in the full image at sampling."""
    (batch,) = image_batches(source, DataConfig(32, 11, low_resolution=8, shuffle=False, repeat=False))
    for low, example in zip(batch["low_res"], source.examples, strict=True):
        expected = images.resize(images.decode(example["image"]), 8)
        np.testing.assert_array_equal(images.to_uint8(low), expected)
    for cropped in take(image_batches(source, DataConfig(32, 1, low_resolution=8, crop=16, shuffle=False)), 3):
        low = images.to_uint8(cropped["low_res"][0])
        wholes = [images.to_uint8(whole) for whole in batch["low_res"]]
        windows = [whole[y : y + 4, x : x + 4] for whole in wholes for y in range(5) for x in range(5)]
        assert any(np.array_equal(low, window) for window in windows)


def test_windows_change_from_epoch_to_epoch(source):
    epochs = take(image_batches(source, DataConfig(32, 11, low_resolution=8, crop=16, shuffle=False)), 2)
    assert not np.array_equal(epochs[0]["image"], epochs[1]["image"])


def with_faults(source, listed):
    faulty = list(source.examples)
    faulty[2] = {**faulty[2], "image": faulty[2]["image"][:50]}
    faulty[5] = {**faulty[5], "caption": None}
    faulty[6] = {**faulty[6], "caption": "  "}
    faulty[8] = FileNotFoundError("set/8.png is gone")
    return listed(tuple(faulty))


def test_faulty_examples_are_skipped_and_counted_once(source, listed):
    batches = image_batches(with_faults(source, listed), DataConfig(32, 7, captions=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        epochs = take(batches, 3)
    assert all(sorted(places([epoch])) == [0, 1, 3, 4, 7, 9, 10] for epoch in epochs)
    assert batches.skipped.reasons == {"unreadable": 2, "no caption": 2} and batches.skipped.count == 4
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == 4 and not any("\n" in line for line in lines)
    assert all(any(name in line for line in lines) for name in ("set/2.png", "set/5.png", "set/6.png", "set/8.png"))


@pytest.mark.parametrize("index, culprit", [(2, "set/2.png"), (5, "set/5.png"), (8, "set/8.png")])
def test_strict_names_the_culprit(source, listed, index, culprit):
    broken = with_faults(source, listed)
    good = (example for i, example in enumerate(broken.examples) if i not in (2, 5, 6, 8))
    one = listed((*good, broken.examples[index]))
    with pytest.raises(ValueError, match=culprit) as caught:
        list(image_batches(one, DataConfig(32, 2, captions=True, repeat=False, strict=True)))
    assert "\n" not in str(caught.value)


def test_captions_that_nothing_needs_may_be_missing(source, listed):
    faulty = with_faults(source, listed)
    keep = listed(tuple(faulty.examples[i] for i in (0, 5, 6)))
    assert len(next(image_batches(keep, DataConfig(32, 3, repeat=False, strict=True)))["image"]) == 3
    config = DataConfig(32, 3, repeat=False, shuffle=False, captions=True, caption_optional=True, strict=True)
    batch = next(image_batches(keep, config))
    assert batch["caption"].tolist() == ["image number 0", "", ""]


def test_a_source_without_one_usable_example_ends(listed):
    hopeless = listed(tuple({"image": b"", "caption": "x", "name": f"{i}"} for i in range(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="not one of the 5 examples is usable"):
            next(image_batches(hopeless, DataConfig(32, 2)))


def test_few_usable_examples_are_enough(source, listed):
    """The last of one order and the first of the next may be almost two sources apart."""
    damaged = tuple({"image": b"", "caption": "x", "name": f"bad {i}"} for i in range(9))
    for seed in range(5):
        batches = image_batches(listed((*damaged, *source.examples[:2])), DataConfig(32, 2, seed=seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(take(batches, 40)) == 40


def test_a_place_of_another_pipeline_is_refused(source):
    with pytest.raises(ValueError, match="another pipeline") as error:
        image_batches(source, DataConfig(32, 2)).set_state({"workers": 2})
    assert "\n" not in str(error.value)


def test_many_faults_warn_ten_times(source, listed):
    damaged = tuple({"image": b"", "caption": "x", "name": f"bad {i}"} for i in range(30))
    batches = image_batches(listed((*damaged, *source.examples)), DataConfig(32, 11, repeat=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(batches)
    assert len(caught) == 10 and batches.skipped.count == 30


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resolution": 30, "low_resolution": 8}, "not a multiple"),
        ({"crop": 16}, "low_resolution"),
        ({"low_resolution": 8, "crop": 18}, "multiple of the factor 4"),
        ({"low_resolution": 8, "crop": 64}, "at most 32"),
        ({"batch": 0}, "positive"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"resolution": 32, "batch": 2, **settings})


def test_a_process_that_is_not_one_of_them_is_refused(source):
    with pytest.raises(ValueError, match="process 2 of 2"):
        image_batches(source, DataConfig(32, 2), process_index=2, process_count=2)


@pytest.mark.slow
def test_worker_processes_change_nothing(source):
    expected = take(image_batches(source, DataConfig(32, 4, captions=True)), 6)
    workers = image_batches(source, DataConfig(32, 4, captions=True), read_ahead=ReadAhead(workers=2))
    for seen, wanted in zip(take(workers, 3), expected):
        same(seen, wanted)
    resumed = image_batches(source, DataConfig(32, 4, captions=True), read_ahead=ReadAhead(workers=2))
    resumed.set_state(workers.get_state())
    for seen, wanted in zip(take(resumed, 3), expected[3:], strict=True):
        same(seen, wanted)

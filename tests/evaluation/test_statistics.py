"""Sums of features: whole = in parts = merged, and files that are none of ours."""

import json
from fractions import Fraction

import numpy as np
import pytest

from jaxdiff.evaluation.statistics import Origin, Statistics, add, empty, load, merge, save

FEATURES = np.random.default_rng(0).normal(3, 2, (257, 16)).astype(np.float32)
ORIGIN = Origin("shapes:held_out", "0123", "inception-2015-12-05 abcd", "clean", seed=3, size="64x48")


def same(a: Statistics, b: Statistics):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-9, atol=1e-12)


def test_sums_are_numpys_mean_and_covariance():
    whole = add(empty(16), FEATURES)
    np.testing.assert_allclose(whole.mean, FEATURES.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(FEATURES.astype(np.float64), rowvar=False), rtol=1e-9)


def test_neither_parts_nor_their_order_matter():
    whole = add(empty(16), FEATURES)
    streamed = empty(16)
    for start in range(0, len(FEATURES), 10):
        streamed = add(streamed, FEATURES[start : start + 10])
    same(streamed, whole)
    parts = [add(empty(16), part) for part in np.array_split(FEATURES, 7)]
    same(merge(*parts), whole)
    same(merge(*parts[::-1]), whole)
    same(add(empty(16), FEATURES[::-1]), whole)


def test_what_is_saved_comes_back(tmp_path):
    whole = add(empty(16), FEATURES)
    save(tmp_path / "kept.npz", whole, ORIGIN)
    found, origin = load(tmp_path / "kept.npz")
    assert origin == ORIGIN and found.count == whole.count
    assert np.array_equal(found.mean, whole.mean) and np.array_equal(found.scatter, whole.scatter)
    with np.load(tmp_path / "kept.npz") as kept:  # as other tools call it
        np.testing.assert_array_equal(kept["sigma"], whole.covariance)
    assert (
        str(ORIGIN) == "shapes:held_out 0123 (png, 64x48, seed 3), inception-2015-12-05 abcd, fit squeeze, resize clean"
    )


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", mu=1)
    old = {"images": "p", "digest": "0", "extractor": "e", "resize": "clean", "format": "png", "seed": None}
    np.savez(tmp_path / "old.npz", count=3, total=np.ones(2), products=np.ones((2, 2)), origin=json.dumps(old))
    with pytest.raises(ValueError, match=r"old.npz: written by an earlier version.*--keep-reference"):
        load(tmp_path / "old.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "pickled.npz", origin=np.array([{}], object))
    for name in ("other", "text", "pickled"):
        with pytest.raises(ValueError, match=f"{name}.npz: no statistics of ours"):
            load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("mean", [0.0, 1e5, -1e6, 3e7])
@pytest.mark.parametrize("parts", [1, 7, 257])
def test_a_mean_far_from_the_spread_costs_no_digits(mean, parts):
    """Exactly: integers about a large mean, in fractions. Sums of squares would have lost all digits from 1e8 on."""
    steps = np.random.default_rng(1).integers(-3, 4, (257, 3))
    exact = [[Fraction(int(value)) for value in row] for row in steps]
    means = [sum(column) / 257 for column in zip(*exact)]
    wanted = [
        [float(sum((r[i] - means[i]) * (r[j] - means[j]) for r in exact) / 256) for j in range(3)] for i in range(3)
    ]
    whole = merge(*(add(empty(3), part) for part in np.array_split(steps + mean, parts)))
    np.testing.assert_allclose(whole.mean, [mean + float(each) for each in means], rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(whole.covariance, wanted, rtol=0, atol=1e-8 * np.diag(wanted).max())


def test_merging_nothing():
    part = add(empty(16), FEATURES)
    same(merge(empty(16), part, empty(16)), part)
    assert merge(empty(16), empty(16)).count == 0


def test_numbers_that_say_nothing():
    with pytest.raises(ValueError, match="not finite"):
        add(empty(2), np.array([[1, np.nan]]))
    with pytest.raises(ValueError, match="no images"):
        add(empty(2), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="width 2 and 3"):
        add(empty(2), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="a covariance of 1 images"):
        _ = add(empty(2), np.ones((1, 2))).covariance


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": np.float64(1)}, r"mean of shape \(\)"),
        ({"mean": np.array(["a"] * 16)}, "mean has numbers of type <U1"),
        ({"mean": np.full(16, np.nan)}, "mean has numbers that are not finite"),
        ({"scatter": -np.eye(16)}, "scatter is no covariance"),
        ({"scatter": np.eye(16) * 1j}, "scatter has numbers of type complex128"),
        ({"scatter": np.triu(np.ones((16, 16)))}, "scatter is not symmetric"),
        ({"scatter": np.eye(4)}, r"scatter of shape \(4, 4\)"),
        ({"count": -5}, "a count of -5"),
        ({"origin": "[" * 100_000}, "nested too deeply"),
        ({"origin": json.dumps({"fit": "crop", "images": "\x1b[31mred\nrow"})}, r"images is '\\x1b"),
        ({"origin": json.dumps({"fit": "crop", "digest": 7})}, "digest is 7"),
        ({"origin": json.dumps({"fit": "crop", "seed": "x"})}, "seed is 'x'"),
        ({"origin": json.dumps({"fit": "crop", "weights": "x"})}, "images"),
    ],
)
def test_kept_numbers_that_can_be_none_are_refused(tmp_path, changes, reason):
    """In one line, without control characters, whatever somebody has put into the file."""
    save(tmp_path / "kept.npz", add(empty(16), FEATURES), ORIGIN)
    with np.load(tmp_path / "kept.npz") as kept:
        values = dict(kept)
    np.savez(tmp_path / "other.npz", **(values | changes))
    with pytest.raises(ValueError, match=r"other\.npz: no statistics of ours: .*" + reason) as raised:
        load(tmp_path / "other.npz")
    assert str(raised.value).isprintable()

"""Sums of features: whole = in parts = merged, and files that are none of ours."""

import numpy as np
import pytest

from jaxdiff.evaluation.statistics import Origin, Statistics, add, empty, load, merge, save

FEATURES = np.random.default_rng(0).normal(3, 2, (257, 16)).astype(np.float32)
ORIGIN = Origin("shapes:held_out", "0123", "inception-2015-12-05 abcd", "clean", seed=3)


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
    assert all(np.array_equal(a, b) for a, b in zip(found, whole))
    with np.load(tmp_path / "kept.npz") as kept:  # as other tools call it
        np.testing.assert_array_equal(kept["sigma"], whole.covariance)
    assert str(ORIGIN) == "shapes:held_out 0123 (png, seed 3), inception-2015-12-05 abcd, resize clean"


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", mu=1)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "pickled.npz", origin=np.array([{}], object))
    for name in ("other", "text", "pickled"):
        with pytest.raises(ValueError, match=f"{name}.npz: no statistics of ours"):
            load(tmp_path / f"{name}.npz")


def test_numbers_that_say_nothing():
    with pytest.raises(ValueError, match="not finite"):
        add(empty(2), np.array([[1, np.nan]]))
    with pytest.raises(ValueError, match="a covariance of 1 pictures"):
        _ = add(empty(2), np.ones((1, 2))).covariance

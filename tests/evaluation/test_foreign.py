"""Statistics and features of other programs as a reference: values, the line, and files that can be neither."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.evaluation import fid, foreign
from jaxdiff.evaluation.features import INCEPTION
from jaxdiff.evaluation.kid import kid
from jaxdiff.evaluation.metrics import MetricSettings, keep, kept, metrics_of, observed, seen_by
from jaxdiff.evaluation.statistics import Moments, Origin

RNG = np.random.default_rng(0)
TRUE = RNG.normal(0.5, 2, size=(60, 6))
MEAN, COVARIANCE = TRUE.mean(0), np.cov(TRUE, rowvar=False)
NETWORKS = [("clip abc", 4), (f"{INCEPTION} abc", 6)]


def drawn():
    origin = Origin("drawn", "0123", f"{INCEPTION} abc", "clean", "png", 7, size="64x64")
    return observed(origin, RNG.normal(size=(40, 6)).astype(np.float32), RNG.normal(size=(40, 4)).astype(np.float32))


def scores(path, shown):
    reference = seen_by(kept(path), NETWORKS)
    return {score.name: score for score in metrics_of(shown, reference, MetricSettings(kid_subsets=5, splits=2), 3)}


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_mu_and_sigma(tmp_path, kind):
    """As pytorch-fid and clean-fid keep them, beside whatever else is in the file."""
    np.savez(tmp_path / "fid.npz", mu=MEAN.astype(kind), sigma=COVARIANCE.astype(kind), arr_0=np.zeros((2, 3)))
    shown = drawn()
    found = scores(tmp_path / "fid.npz", shown)
    wanted = fid.distance(shown.statistics, observed(shown.origin, TRUE).statistics)
    assert found["FID"].value == pytest.approx(wanted, rel=1e-12 if kind is np.float64 else 1e-5)
    assert "n 40 against an unknown number" in found["FID"].protocol
    assert "fid.npz" in found["FID"].protocol and found["FID"].protocol.endswith("(npz, protocol unknown)")
    assert found["KID × 1000"].missing == found["recall"].missing == "the reference keeps sums alone, no features"
    assert found["FID∞"].value is not None and found["IS"].value is not None


@pytest.mark.parametrize("name", ["feats.npz", "feats.npy", "both.npz"])
def test_features(tmp_path, name):
    more = {"mu": MEAN, "sigma": COVARIANCE} if name == "both.npz" else {}
    (np.save(tmp_path / name, TRUE) if name.endswith("npy") else np.savez(tmp_path / name, feats=TRUE, **more))
    shown = drawn()
    found = scores(tmp_path / name, shown)
    reference = observed(shown.origin, TRUE)
    assert found["FID"].value == fid.distance(shown.statistics, reference.statistics)
    assert found["KID × 1000"].value == 1000 * kid(shown.features, TRUE, 5, 20, 3).value
    assert "n 40 against 60" in found["FID"].protocol and "protocol unknown" in found["FID"].protocol
    assert found["precision"].value is not None


def test_what_we_keep_other_programs_read_and_it_stays_ours(tmp_path):
    keep(tmp_path / "ours.npz", drawn())
    assert not kept(tmp_path / "ours.npz").origin.protocol_unknown
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])
    origin, moments = foreign.read(tmp_path / "theirs.npz")
    assert origin.protocol_unknown and isinstance(moments, Moments)
    with pytest.raises(ValueError, match="of another program"):
        keep(tmp_path / "again.npz", kept(tmp_path / "theirs.npz"))


def test_the_network_is_the_one_of_that_width(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=MEAN, sigma=COVARIANCE)
    reference = kept(tmp_path / "fid.npz")
    named = lambda *networks: seen_by(reference, networks).origin.extractor  # noqa: E731
    assert named(("clip a", 6), ("shapes b", 5)) == "clip a"
    assert named(("clip a", 6), (f"{INCEPTION} b", 6), ("shapes c", 6)) == f"{INCEPTION} b"
    with pytest.raises(ValueError, match=r"fid.npz: 6 features, which none of the networks have: clip a \(4\)"):
        named(("clip a", 4))
    with pytest.raises(ValueError, match="6 features, which 2 of the networks have"):
        named(("clip a", 6), ("shapes b", 6))


TURNED = COVARIANCE.copy()
TURNED[0, 1] += 5
ENDLESS = COVARIANCE.copy()
ENDLESS[2, 2] = np.inf


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"mu": MEAN, "sigma": COVARIANCE[:5]}, r"mu of shape \(6,\) and sigma of shape \(5, 6\)"),
        ({"mu": MEAN[:, None], "sigma": COVARIANCE}, r"mu of shape \(6, 1\)"),
        ({"mu": np.float64(1), "sigma": np.float64(1)}, r"mu of shape \(\)"),
        ({"mu": MEAN * np.nan, "sigma": COVARIANCE}, "mu has numbers that are not finite"),
        ({"mu": MEAN, "sigma": ENDLESS}, "sigma has numbers that are not finite"),
        ({"mu": MEAN, "sigma": TURNED}, "sigma is not symmetric"),
        ({"mu": MEAN, "sigma": COVARIANCE - 20 * np.eye(6)}, "no covariance: it has an eigenvalue of -"),
        ({"mu": MEAN + 1j, "sigma": COVARIANCE}, "numbers of type complex128"),
        ({"mu": MEAN}, "has mu, but neither mu and sigma nor feats"),
        ({"arr_0": TRUE}, "has arr_0, but neither"),
        ({}, "has nothing, but neither"),
        ({"feats": TRUE[0]}, r"features of shape \(6,\)"),
        ({"feats": TRUE[:0]}, "no images"),
        ({"feats": np.where(TRUE > 3, np.nan, TRUE)}, "features that are not finite"),
        ({"feats": np.array([{}], object)}, "allow_pickle"),
        ({"feats": TRUE.astype(str)}, "numbers of type <U"),
    ],
)
def test_files_that_can_be_neither_are_named(tmp_path, arrays, reason):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=r"other\.npz: .*" + reason) as raised:
        kept(tmp_path / "other.npz")
    assert "\n" not in str(raised.value)


def test_other_files(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "cut.npz", mu=MEAN, sigma=COVARIANCE)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    for name in ("text.npz", "empty.npy", "pickled.npy", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name}: neither statistics nor features"):
            kept(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        kept(tmp_path / "absent.npz")


def test_an_unknown_way_is_no_other_network(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=MEAN, sigma=COVARIANCE)
    reference = seen_by(kept(tmp_path / "fid.npz"), NETWORKS)
    other = dataclasses.replace(drawn().origin, extractor="clip abc")
    with pytest.raises(ValueError, match="extractor is inception"):
        metrics_of(dataclasses.replace(drawn(), origin=other), reference)

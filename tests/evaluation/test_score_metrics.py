"""Every number with its line: values against the functions they come from, reasons where there is none, kept sets."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.evaluation import fid
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.features import INCEPTION
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kid import kid
from jaxdiff.evaluation.metrics import MetricSettings, caption_metrics, keep, kept, metrics_of, observed
from jaxdiff.evaluation.precision_recall import precision_recall
from jaxdiff.evaluation.statistics import Origin

ORIGIN = Origin("drawn", "0123", "classifier-shapes abc", "clean", "png", 7, size="64x64")
HOW = MetricSettings(kid_subsets=5, splits=2)


def seen(count=40, shift=0.0, origin=ORIGIN, logits=True, seed=0):
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(count, 6)) + shift).astype(np.float32)
    return observed(origin, features, rng.normal(size=(count, 4)).astype(np.float32) if logits else None)


def true(**changes):
    origin = dataclasses.replace(ORIGIN, images="true", digest="9876", seed=None)
    return seen(60, 0.5, dataclasses.replace(origin, **changes), seed=1)


def by_name(scores):
    assert len({score.name for score in scores}) == len(scores)
    return {score.name: score for score in scores}


def test_every_number_of_a_classifier():
    drawn, reference = seen(), true()
    found = by_name(metrics_of(drawn, reference, HOW, 3))
    assert set(found) == {
        "FD-shapes",
        "FD-shapes, limit",
        "KID-shapes × 1000",
        "IS-shapes",
        "precision-shapes",
        "recall-shapes",
    }
    assert found["FD-shapes"].value == fid.distance(drawn.statistics, reference.statistics)
    assert found["FD-shapes, limit"].value == fid.limit(drawn.features, reference.statistics, seed=3).value
    score = found["KID-shapes × 1000"]
    wanted = kid(drawn.features, reference.features, 5, 20, 3)
    assert (score.value, score.error, score.deviation) == tuple(1000 * each for each in wanted)
    assert found["IS-shapes"].value == inception_score(drawn.logits, 2).value
    real = precision_recall(reference.features, drawn.features)
    assert (found["precision-shapes"].value, found["recall-shapes"].value) == tuple(real)


def test_the_line_says_how_a_number_came_about():
    score = by_name(metrics_of(seen(), true(), HOW, 3))["KID-shapes × 1000"]
    for part in ("n 40 against 60", "5 subsets of 20", "drawn 0123", "png, 64x64, seed 7", "classifier-shapes abc"):
        assert part in score.protocol
    assert "fit squeeze, resize clean" in score.protocol and "reference true 9876 (png, 64x64)" in score.protocol
    assert "15 sizes from 12" in by_name(metrics_of(seen(), true(), HOW, 3))["FD-shapes, limit"].protocol
    assert "\n" not in score.protocol


def test_only_inceptions_is_called_fid():
    inception = f"{INCEPTION} abc"
    drawn, reference = seen(origin=dataclasses.replace(ORIGIN, extractor=inception)), true(extractor=inception)
    found = by_name(metrics_of(drawn, reference, HOW, 3))
    assert set(found) == {"FID", "FID∞", "KID × 1000", "IS", "precision", "recall"}
    early = f"{INCEPTION}-64 abc"
    drawn, reference = seen(origin=dataclasses.replace(ORIGIN, extractor=early)), true(extractor=early)
    assert set(by_name(metrics_of(drawn, reference, HOW, 3))) == {
        "FID-64",
        "FID∞-64",
        "KID-64 × 1000",
        "IS",
        "precision-64",
        "recall-64",
    }
    clip = dataclasses.replace(ORIGIN, extractor="clip abc")
    assert set(by_name(metrics_of(seen(origin=clip, logits=False), true(extractor="clip abc"), HOW, 3))) == {
        "FD-clip",
        "FD-clip, limit",
        "CMMD-clip",
    }


def test_few_pictures_are_refused_unless_forced_and_then_it_says_so():
    few = seen(5)
    score = by_name(metrics_of(few, true(), HOW, 3))["FD-shapes"]
    assert score.value is None and "5 images for 6 features" in score.missing
    forced = by_name(metrics_of(few, true(), dataclasses.replace(HOW, force=True)))["FD-shapes"]
    assert forced.value > 0 and "FORCED: fewer than the 6 features" in forced.protocol
    assert (
        "FORCED" not in by_name(metrics_of(seen(), true(), dataclasses.replace(HOW, force=True)))["FD-shapes"].protocol
    )


@pytest.mark.parametrize(
    "name, other",
    [
        ("extractor", "classifier-shapes other"),
        ("resize", "legacy"),
        ("resize", "pytorch"),
        ("fit", "crop"),
        ("size", "64x65"),
        ("size", "128x64"),
    ],
)
def test_sets_that_were_seen_otherwise_are_not_compared(name, other):
    with pytest.raises(ValueError, match=f"{name} is {other}"):
        metrics_of(seen(), true(**{name: other}))


def test_kept_sets_give_the_same_numbers(tmp_path):
    reference = true()
    keep(tmp_path / "true.npz", reference)
    again = kept(tmp_path / "true.npz")
    assert again.origin == reference.origin
    assert metrics_of(seen(), again, HOW, 3) == metrics_of(seen(), reference, HOW, 3)


def test_sums_alone_give_the_distance_and_reasons(tmp_path):
    keep(tmp_path / "true.npz", dataclasses.replace(true(), features=None))
    found = by_name(metrics_of(seen(), kept(tmp_path / "true.npz"), HOW, 3))
    assert found["FD-shapes"].value == by_name(metrics_of(seen(), true(), HOW, 3))["FD-shapes"].value
    assert found["recall-shapes"].missing == "the reference keeps sums alone, no features"


def test_features_of_other_pictures_are_refused(tmp_path):
    keep(tmp_path / "true.npz", true())
    np.save(tmp_path / "true.features.npy", np.zeros((3, 6), np.float32))
    with pytest.raises(ValueError, match="features of other images"):
        kept(tmp_path / "true.npz")


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), lambda file: np.save(file, np.zeros(()))])
def test_damaged_features_are_named(tmp_path, damage):
    keep(tmp_path / "true.npz", true())
    damage(tmp_path / "true.features.npy")
    with pytest.raises(ValueError, match=r"true\.features\.npy: "):
        kept(tmp_path / "true.npz")


def test_features_that_are_not_finite_are_refused_by_name(tmp_path):
    bad = true().features.copy()
    bad[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"true, classifier-shapes abc: .*not finite: 1 rows, the first is row 7"):
        observed(true().origin, bad)
    keep(tmp_path / "true.npz", true())
    for changed in (bad, true().features.astype(str), true().features[:, :5]):
        np.save(tmp_path / "true.features.npy", changed)
        with pytest.raises(ValueError, match="features of other images"):
            kept(tmp_path / "true.npz")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the overflow that is asked for
def test_results_that_are_too_large_are_none():
    large = observed(ORIGIN, true().features * np.float64(1e120), true().features)
    score = by_name(metrics_of(large, true(), HOW, 3))["KID-shapes × 1000"]
    assert score.value is None and "the features are too large" in score.missing


def test_the_splits_of_the_inception_score_are_named():
    for seed, words in ((2020, "2 splits, shuffled by 2020"), (5, "shuffled by 5"), (None, "2 splits, not shuffled")):
        score = by_name(metrics_of(seen(), true(), dataclasses.replace(HOW, split_seed=seed), 3))["IS-shapes"]
        assert words in score.protocol
        assert score.value == inception_score(seen().logits, 2, seed).value


def test_features_of_other_sums_are_refused_and_stale_ones_go(tmp_path):
    keep(tmp_path / "true.npz", true())
    np.save(tmp_path / "true.features.npy", true().features[::-1] + np.float32(0.1))
    with pytest.raises(ValueError, match="features of other images"):
        kept(tmp_path / "true.npz")
    keep(tmp_path / "true.npz", dataclasses.replace(true(), features=None))
    assert kept(tmp_path / "true.npz").features is None


@pytest.mark.parametrize("name, value", [("kid_subsets", 0), ("kid_size", 1), ("neighbours", 0), ("splits", 0)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} {value}"):
        MetricSettings(**{name: value})


def test_clip_scores_have_their_names_and_lines():
    drawn = seen(origin=dataclasses.replace(ORIGIN, extractor="clip abc"))
    text = np.random.default_rng(5).normal(size=(40, 6))
    captions = [f"caption {i}" for i in range(40)]
    score, cosine = caption_metrics(captions, text, drawn)
    assert (score.value, cosine.value) == tuple(clip_score(text, drawn.features))
    assert (score.name, cosine.name) == ("score-clip, w 2.5", "cosine-clip")
    assert "n 40, captions " in score.protocol and ", drawn 0123 (png, 64x64, seed 7), clip abc" in score.protocol
    assert ", no prefix, " in score.protocol
    assert "prefix 'A photo depicts '" in caption_metrics(captions, text, drawn, "A photo depicts ")[0].protocol
    assert caption_metrics(captions[::-1], text, drawn)[0].protocol != score.protocol
    with pytest.raises(ValueError, match="39 captions and 40 images"):
        caption_metrics(captions[1:], text[1:], drawn)

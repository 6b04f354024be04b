"""experiments.evaluate metrics: a cascade and folders judged, resumed, against kept statistics; what it refuses."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file
from small_judges import write_judges

from experiments import evaluate
from experiments.options.metric_networks import MetricNetworks, loaded
from jaxdiff.data import png_metadata
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.image_sets import ImageFiles, open_folder
from jaxdiff.evaluation.observe import observe

ATTRIBUTES = "attributes, 1 object", "attributes, 2 objects"


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    return write_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def judged(command, judges, data_dir, tmp_path):
    """`judged(*more)`: the command with the small judges and 20 true images; its result and its scores by name."""

    def call(*more):
        named = ["--clip", judges["clip"], "--classifier", judges["classifier"], "--data-dir", data_dir]
        done = command(
            evaluate, "metrics", "--out", tmp_path / "out", *named, "--examples", 8, "--held-out", 20,
            "--kid-subsets", 3, "--splits", 2, *more
        )  # fmt: skip
        path = tmp_path / "out" / "scores.json"
        scores = json.loads(path.read_text())["scores"] if path.is_file() else []
        return done, {score["name"]: score for score in scores}

    return call


@pytest.fixture
def photos(tmp_path):
    """Twelve held-out images as files with their captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        s = scene("held_out", i)
        Image.fromarray(draw(s, 64)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption(s, "held_out", i).text)
    return folder


def test_a_cascade_by_every_judge(judged, standin, tmp_path):
    done, scores = judged("--weights", standin, "--n", 12)
    assert done.code == 0, done.err
    assert {"FD-shapes", "KID-shapes × 1000", "IS-shapes", "precision-shapes", "recall-shapes"} <= set(scores)
    assert {
        "FD-clip",
        "CMMD-clip",
        "score-clip, w 2.5",
        "cosine-clip",
        "attributes, 1 object",
        "attributes, 2 objects",
    } <= set(scores)
    missing = {name: score["missing"] for name, score in scores.items() if score["value"] is None}
    assert set(missing) == {"FD-shapes, limit", "FD-clip, limit"} and "take 24 or more" in missing["FD-clip, limit"]
    assert all(line.split()[0] in done.out for line in scores)
    assert "FID" in done.out and "experiments.export inception" in done.out
    assert "n 12 against 20" in scores["FD-shapes"]["protocol"] and len(done.out.splitlines()) < 25
    drawn = sorted((tmp_path / "out" / "images").glob("*.png"))
    assert len(drawn) == 12

    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.np*")}
    drawn[3].unlink()  # as a run that was stopped would have left it
    again, same = judged("--weights", standin, "--n", 12)
    assert again.code == 0 and same == scores
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.np*")} == stamps
    for change in (("--seed", 5), ("--dtype", "bfloat16")):
        other, _ = judged("--weights", standin, "--n", 12, *change)
        assert other.code == 2 and "sampled with other settings" in other.err


def test_true_pictures_are_near_themselves(judged, photos):
    done, scores = judged("--images", photos, "--true-n", 12)
    assert done.code == 0, done.err
    assert scores["FD-shapes"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["precision-shapes"]["value"] == scores["recall-shapes"]["value"] == 1
    assert scores["cosine-clip"]["value"] is not None


def test_kept_statistics_stand_in_for_the_pictures(judged, photos, tmp_path):
    _, scores = judged("--images", photos, "--keep-reference", tmp_path / "kept")
    files = sorted((tmp_path / "kept").glob("*.npz"))
    assert len(files) == 2
    done, same = judged("--images", photos, "--reference", *files)
    assert done.code == 0 and same == scores


def test_kept_statistics_of_another_network_are_refused(judged, photos, tmp_path, command):
    judged("--images", photos, "--keep-reference", tmp_path / "kept")
    others = write_judges(tmp_path / "others")
    path = others["classifier"] / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    file = next((tmp_path / "kept").glob("classifier*.npz"))
    done = command(
        evaluate, "metrics", "--images", photos, "--reference", file, "--classifier", others["classifier"],
        "--clip", others["clip"], "--out", tmp_path / "out2",
    )  # fmt: skip
    one_line(done, "seen by classifier-shapes")


def one_line(done, *culprits):
    assert done.code == 2, done
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: "), done.err
    for culprit in culprits:
        assert culprit in last, done.err


def test_an_empty_folder(judged, tmp_path):
    (tmp_path / "empty").mkdir()
    done, _ = judged("--images", tmp_path / "empty")
    one_line(done, str(tmp_path / "empty"), "no images")
    done, _ = judged("--images", tmp_path / "nowhere")
    one_line(done, "no such folder")


def test_mixed_sizes(judged, photos):
    Image.new("RGB", (48, 64)).save(photos / "99.png")
    done, _ = judged("--images", photos)
    one_line(done, "2 sizes", "64x64 (00.png)", "48x64 (99.png)")


@pytest.mark.parametrize("mode, what", [("L", "not RGB but L"), ("LA", "not RGB but LA"), ("P", "not RGB but P")])
def test_pictures_that_are_not_rgb(judged, photos, mode, what):
    Image.open(photos / "03.png").convert(mode).save(photos / "03.png")
    done, _ = judged("--images", photos)
    one_line(done, "03.png", what, "--convert")
    done, _ = judged("--images", photos, "--convert")
    assert done.code == 0


def test_unreadable_files_are_counted_and_named(judged, photos):
    (photos / "04.png").write_bytes((photos / "04.png").read_bytes()[:60])
    (photos / "07.png").write_bytes(b"no image")
    done, scores = judged("--images", photos)
    assert done.code == 0, done.err
    (line,) = (line for line in done.err.splitlines() if line.startswith("warning"))
    assert "2 unreadable" in line and "04.png" in line and "07.png" in line
    assert "n 10 against" in scores["FD-shapes"]["protocol"]


def test_unreadable_true_pictures_too(judged, photos):
    for i in (2, 5):
        (photos / f"{i:02d}.png").write_bytes(b"no image")
    shutil.copytree(photos, photos.with_name("true"))
    done, scores = judged("--images", photos, "--data", f"folder:{photos.with_name('true')}")
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert len(lines) == 2 and all("2 unreadable" in line for line in lines) and "02.png" in lines[1]
    assert "n 10 against 10" in scores["FD-shapes"]["protocol"]


def test_what_judges_cannot_read_is_no_picture_from_the_beginning(judged, photos, monkeypatch):
    """Captions stay with their images; numbers of unknown range and images of untold size are named, not judged."""
    Image.fromarray(np.ones((64, 64), np.float32)).save(photos / "03.tiff")
    (photos / "03.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    Image.new("RGB", (200, 200)).save(photos / "05.png")
    done, scores = judged("--images", photos, "--convert")
    assert done.code == 0, done.err
    (line,) = (line for line in done.err.splitlines() if line.startswith("warning"))
    assert "2 unreadable" in line and "03.tiff" in line and "05.png" in line
    assert scores["cosine-clip"]["protocol"].startswith("n 10, captions ")
    counts = [int(scores[name]["protocol"].split()[1].strip(",")) for name in ATTRIBUTES]
    assert min(counts) > 0 and sum(counts) == 10


def test_a_turned_photograph_has_the_size_that_is_looked_at(judged, tmp_path):
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    Image.new("RGB", (48, 64)).save(folder / "a.jpg")
    Image.new("RGB", (48, 64)).save(folder / "b.jpg", exif=exif)
    done, _ = judged("--images", folder)
    one_line(done, "2 sizes", "48x64 (a.jpg)", "64x48 (b.jpg)")


def test_attributes_of_a_folder_whose_captions_are_those_of_the_set(judged, photos):
    _, scores = judged("--images", photos)
    right = [scores[name] for name in ATTRIBUTES]
    one = sum(len(scene("held_out", i).objects) == 1 for i in range(12))
    assert [each["value"] for each in right] == [1, 1] and 0 < one < 12
    assert [each["protocol"].partition(", exact reader, ")[0] for each in right] == [f"n {one}", f"n {12 - one}"]
    assert "seed" not in scores["FD-shapes"]["protocol"].partition(";")[0]  # none has drawn these images
    assert "(png, 64x64)" in scores["FD-shapes"]["protocol"].partition("reference")[2]
    (photos / "02.txt").write_text("something else")
    _, scores = judged("--images", photos)
    assert scores["attributes right"]["value"] is None and "something else" in scores["attributes right"]["missing"]


def test_attributes_of_two_objects_are_not_averaged_with_those_of_one(judged, photos):
    """All of two objects are wrong, all of one are right; and a folder of one kind has one score."""
    two = [i for i in range(12) if len(scene("held_out", i).objects) == 2]
    for i in two:
        Image.new("RGB", (64, 64), "white").save(photos / f"{i:02d}.png")
    done, scores = judged("--images", photos)
    assert [scores[name]["value"] for name in ATTRIBUTES] == [1, 0]
    assert "attributes right" not in scores and all(name in done.out for name in ATTRIBUTES)
    for i in two:
        (photos / f"{i:02d}.png").unlink()
    _, scores = judged("--images", photos)
    assert scores[ATTRIBUTES[0]]["value"] == 1 and ATTRIBUTES[1] not in scores


@pytest.mark.parametrize(
    "more, culprit",
    [(("--true-n", 1), "--true-n 1"), (("--kid-subsets", 0), "kid_subsets 0"), (("--neighbours", 0), "neighbours 0")],
)
def test_bad_numbers(judged, photos, more, culprit):
    done, _ = judged("--images", photos, *more)
    one_line(done, culprit)


def test_two_references_of_one_network_are_refused(judged, photos, tmp_path):
    judged("--images", photos, "--keep-reference", tmp_path / "kept")
    file = next((tmp_path / "kept").glob("classifier*.npz"))
    done, _ = judged("--images", photos, "--reference", file, file)
    one_line(done, "two files of classifier-shapes")


def test_missing_weights_of_inception(judged, photos, tmp_path):
    done, _ = judged("--images", photos, "--inception", tmp_path / "inception.safetensors")
    one_line(done, "inception.safetensors", "pt_inception-2015-12-05", "experiments.export inception")


def test_too_few_pictures_say_so(judged, photos):
    for file in sorted(photos.glob("*"))[10:]:
        file.unlink()
    done, scores = judged("--images", photos)
    assert done.code == 0
    assert scores["FD-shapes"]["value"] is None and "for 6 features" in done.out
    _, forced = judged("--images", photos, "--force")
    assert forced["FD-shapes"]["value"] > 0 and "FORCED" in forced["FD-shapes"]["protocol"]


def test_a_damaged_part_is_looked_at_again(judges, tmp_path):
    networks = loaded(MetricNetworks(clip=None, classifier=judges["classifier"]))
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "a.png")
    shown = ImageFiles("one", (tmp_path / "a.png",) * 3, (None,) * 3, "png")
    first = observe(shown, networks.extractors, tmp_path / "seen")
    (file,) = (tmp_path / "seen").glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    again = observe(shown, networks.extractors, tmp_path / "seen")
    for name, each in first.items():
        np.testing.assert_array_equal(each.features, again[name].features)
        assert each.origin == again[name].origin


def test_captions_are_found_where_pictures_of_ours_have_them(photos):
    ours, others = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    ours.add_itxt(png_metadata.KEY, png_metadata.to_text(png_metadata.Metadata("a red star", 1)))
    others.add_itxt("prompt", '{"3": {"class_type": "KSampler"}}')
    Image.open(photos / "00.png").save(photos / "grid.png")
    (photos / "01.txt").unlink()
    Image.open(photos / "01.png").save(photos / "01.png", pnginfo=ours)
    (photos / "02.txt").unlink()
    Image.open(photos / "02.png").save(photos / "02.png", pnginfo=others)
    found = open_folder(photos)
    assert len(found) == 12
    assert found.caption(1) == "a red star" and found.caption(2) is None


def test_pictures_of_other_programs_have_no_captions(judged, photos):
    """Their text is not judged; one line says how many there are, and what to do."""
    others = PngImagePlugin.PngInfo()
    others.add_text("prompt", '{"3": {"class_type": "KSampler"}}')
    for i in (2, 5, 7):
        (photos / f"{i:02d}.txt").unlink()
        Image.open(photos / f"{i:02d}.png").save(photos / f"{i:02d}.png", pnginfo=others)
    done, scores = judged("--images", photos)
    assert done.code == 0, done.err
    for name in ("score-clip", "attributes right"):
        missing = scores[name]["missing"]
        assert missing.startswith("3 of 12 images have no caption") and ".txt" in missing
    assert "KSampler" not in done.out + done.err and "cosine-clip" not in scores
    assert scores["FD-shapes"]["value"] is not None

"""experiments.evaluate: images that are not square, true sets, zips, references, statistics of other programs."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from small_judges import write_judges

from experiments import evaluate
from experiments.options.metric_networks import MetricNetworks, loaded
from jaxdiff.data.images import resize
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.image_sets import CroppedImages, SourceImages, open_folder
from jaxdiff.evaluation.observe import observe
from jaxdiff.evaluation.resize import Fit


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    return write_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def judged(command, judges, tmp_path):
    """`judged(*more)`: the command with the small judges; its result and its scores by name."""

    def call(*more):
        path = tmp_path / "out" / "scores.json"
        path.unlink(missing_ok=True)
        named = ["--clip", judges["clip"], "--classifier", judges["classifier"], "--data-dir", tmp_path / "data"]
        done = command(evaluate, "metrics", "--out", tmp_path / "out", *named, "--kid-subsets", 3, "--splits", 2, *more)
        scores = json.loads(path.read_text())["scores"] if path.is_file() else []
        return done, {score["name"]: score for score in scores}

    return call


def write(folder, width, height, count=12, first=0):
    """Images of scenes, all of what they show at one side: a crop sees another part than the whole."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + count):
        image = Image.fromarray(draw(scene("held_out", i), 64)).resize((width, height))
        image.paste((10 * i, 255 - 10 * i, 99), (width // 2, height // 3, width, height // 2))
        image.save(folder / f"{i:02d}.png")
    return folder


def one_line(done, *culprits):
    assert done.code == 2, done
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: "), done.err
    for culprit in culprits:
        assert culprit in last, done.err


def nothing_apart(scores):
    for name in ("FD-shapes", "FD-clip", "CMMD-clip"):
        assert scores[name]["value"] == pytest.approx(0, abs=1e-6), name
    assert scores["precision-shapes"]["value"] == scores["recall-shapes"]["value"] == 1
    assert scores["KID-shapes × 1000"]["value"] < 3 * scores["KID-shapes × 1000"]["deviation"] + 1e-9


@pytest.mark.parametrize("width, height", [(37, 81), (81, 37), (64, 65), (17, 200), (64, 64)])
@pytest.mark.parametrize("fit", ["squeeze", "crop"])
def test_a_folder_against_itself(judged, tmp_path, width, height, fit):
    folder = write(tmp_path / "photos", width, height)
    done, scores = judged("--images", folder, "--data", f"folder:{folder}", "--fit", fit)
    assert done.code == 0, done.err
    nothing_apart(scores)
    side = min(width, height)
    size = f"{width}x{height}" if fit == "squeeze" else f"{side}x{side}"
    judged_side, true_side = scores["FD-shapes"]["protocol"].split("; reference ")
    assert (
        f"(png, {size})" in judged_side and f"(png, {size})" in true_side and f"fit {fit}, resize clean" in judged_side
    )


def test_left_out_the_whole_image_is_looked_at(judged, tmp_path):
    """As pytorch-fid and clean-fid do."""
    folder = write(tmp_path / "photos", 37, 81)
    done, scores = judged("--images", folder, "--data", f"folder:{folder}")
    assert done.code == 0 and "fit squeeze" in scores["FD-shapes"]["protocol"]
    nothing_apart(scores)


@pytest.mark.parametrize("size, other", [((64, 64), (64, 65)), ((37, 81), (81, 37)), ((64, 64), (128, 128))])
def test_two_sizes_are_compared_only_where_they_are_cropped(judged, tmp_path, size, other):
    pictures, true = write(tmp_path / "images", *size), write(tmp_path / "true", *other, count=20)
    done, _ = judged("--images", pictures, "--data", f"folder:{true}")
    one_line(done, f"{size[0]}x{size[1]} and {other[0]}x{other[1]}", str(true), "--fit crop")
    assert not (tmp_path / "out" / "seen").exists()
    done, scores = judged("--images", pictures, "--data", f"folder:{true}", "--fit", "crop")
    assert done.code == 0 and "n 12 against 20" in scores["FD-shapes"]["protocol"], done.err


def test_generated_sets_of_another_size(judged, tmp_path):
    folder = write(tmp_path / "photos", 32, 48)
    options = "--images", folder, "--data", "rainbow"
    one_line(judged(*options)[0], "32x48 and 32x32", "--fit crop")
    done, _ = judged(*options, "--fit", "crop", "--true-n", 20)
    assert done.code == 0, done.err


def test_mixed_sizes_of_true_images(judged, tmp_path):
    pictures, true = write(tmp_path / "images", 48, 48), write(tmp_path / "true", 60, 90)
    write(true, 90, 60, 2, first=12)
    write(true, 30, 30, 1, first=14)
    options = "--images", pictures, "--data", f"folder:{true}"
    one_line(judged(*options)[0], str(true), "3 sizes", "60x90 (00.png) and 90x60 (12.png)", "--fit crop")
    done, scores = judged(*options, "--fit", "crop")
    assert done.code == 0, done.err
    assert "(png, 48x48)" in scores["FD-shapes"]["protocol"].partition("; reference ")[2]
    done, scores = judged("--images", true, "--data", f"folder:{true}", "--fit", "crop")
    assert done.code == 0 and "(png, 30x30)" in scores["FD-shapes"]["protocol"]
    nothing_apart(scores)


def transparent(image):
    image.putpixel((3, 3), (1, 2, 3, 254))
    return image


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda image: image.convert("L"), "not RGB but L"),
        (lambda image: image.convert("LA"), "not RGB but LA"),
        (lambda image: transparent(image.convert("RGBA")), "transparent"),
        (lambda image: image.convert("1"), "not RGB but 1"),
    ],
)
def test_true_images_are_checked_as_judged_ones_are(judged, tmp_path, change, what):
    pictures, true = write(tmp_path / "images", 40, 40), write(tmp_path / "true", 40, 40)
    change(Image.open(true / "03.png")).save(true / "03.png")
    for both in ((pictures, true), (true, pictures)):
        options = "--images", both[0], "--data", f"folder:{both[1]}"
        one_line(judged(*options)[0], str(true / "03.png"), what, "--convert")
        done, _ = judged(*options, "--convert")
        assert done.code == 0, done.err


def test_true_images_of_other_sources_too():
    rng = np.random.default_rng(0)
    grey = [{"image": rng.integers(0, 256, (8, 8, 1), np.uint8), "caption": None, "name": "x"}]
    with pytest.raises(ValueError, match="set: image 0: not RGB but L; --convert"):
        SourceImages("set", grey, 0)[0]
    assert SourceImages("set", grey, 0, convert=True)[0].shape == (8, 8, 3)
    opaque = [{"image": np.full((8, 8, 4), 255, np.uint8), "caption": None, "name": "x"}]
    assert SourceImages("set", opaque, 0)[0].shape == (8, 8, 3)
    opaque[0]["image"][2, 2, 3] = 100
    with pytest.raises(ValueError, match="set: image 0: transparent"):
        SourceImages("set", opaque, 0)[0]


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_opaque_alpha_is_no_transparency(judged, tmp_path, suffix):
    pictures, true = write(tmp_path / "images", 40, 30), write(tmp_path / "true", 40, 30)
    for file in sorted(pictures.glob("*.png")):
        image = Image.open(file).convert("RGBA")
        file.unlink()
        image.save(file.with_suffix(f".{suffix}"), **({"lossless": True} if suffix == "webp" else {}))
    done, scores = judged("--images", pictures, "--data", f"folder:{true}")
    assert done.code == 0, done.err
    nothing_apart(scores)


def test_sets_that_come_in_several_sizes_are_refused_while_they_are_looked_at(tmp_path):
    images = [np.zeros((8, 8 + (i == 5), 3), np.uint8) for i in range(6)]
    source = [{"image": image, "caption": None, "name": "x"} for image in images]
    bench = loaded(MetricNetworks(clip=None)).extractors
    with pytest.raises(ValueError, match="set: images of several sizes, such as 8x8 and 9x8; --fit crop"):
        observe(SourceImages("set", source, 0), bench, tmp_path / "seen")
    (seen,) = observe(CroppedImages(SourceImages("set", source, 0), 8), bench, tmp_path / "seen").values()
    assert (seen.origin.fit, seen.origin.size) == ("crop", "8x8")


def test_what_is_cropped_is_what_training_sees(tmp_path):
    folder = write(tmp_path / "photos", 37, 81, 1)
    shown = open_folder(folder)
    assert shown.fit is Fit.SQUEEZE and shown.shortest == 37
    np.testing.assert_array_equal(CroppedImages(shown, 20)[0], resize(shown[0], 20))


def kept(judged, folder, to, *more):
    done, scores = judged("--images", folder, "--data", f"folder:{folder}", "--keep-reference", to, *more)
    assert done.code == 0, done.err
    return sorted(to.glob("*.npz")), scores


@pytest.mark.parametrize(
    "size, more, reason",
    [
        ((37, 80), (), "size is 37x81, and 37x80"),
        ((81, 37), (), "size is 37x81, and 81x37"),
        ((37, 81), ("--fit", "crop"), "fit is squeeze, and crop"),
        ((64, 64), (), "size is 37x81, and 64x64"),
    ],
)
def test_references_of_another_size_or_way_are_refused(judged, tmp_path, size, more, reason):
    files, scores = kept(judged, write(tmp_path / "true", 37, 81), tmp_path / "kept")
    other = write(tmp_path / "other", *size)
    done, _ = judged("--images", other, "--reference", *files, *more)
    one_line(done, "--reference", ".npz", reason)
    true = tmp_path / "true"
    done, same = judged("--images", true, "--reference", *files, "--data", f"folder:{true}")
    assert done.code == 0 and same == scores


def test_a_cascade_is_judged_by_its_squares(judged, standin, tmp_path):
    """Its drawings are squares, and true images come to them as to training; references are refused before it draws."""
    true = write(tmp_path / "true", 90, 70)
    for i in range(12):
        (true / f"{i:02d}.txt").write_text(caption(scene("held_out", i), "held_out", i).text)
    options = "--weights", standin, "--n", 8, "--data", f"folder:{true}"
    done, scores = judged(*options)
    assert done.code == 0, done.err
    assert "(png, 64x64, seed 0)" in scores["FD-shapes"]["protocol"] and "fit crop" in scores["FD-shapes"]["protocol"]
    assert "(png, 64x64)" in scores["FD-shapes"]["protocol"].partition("; reference ")[2]
    one_line(judged(*options, "--fit", "squeeze")[0], "64x64 and 90x70")
    files, _ = kept(judged, write(tmp_path / "small", 32, 32), tmp_path / "kept", "--fit", "crop")
    for file in (tmp_path / "out" / "images").iterdir():
        file.unlink()
    one_line(judged(*options, "--reference", *files)[0], "size is 32x32, and 64x64")
    assert not list((tmp_path / "out" / "images").iterdir())


def test_zips_are_read_as_folders_are(judged, tmp_path):
    folder = write(tmp_path / "photos", 37, 41)
    (folder / "04.txt").write_text("a red star")
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"00000/{file.name}")
        archive.write(folder / "00.png", "__MACOSX/00000/._00.png")
        archive.writestr("dataset.json", "{}")
    done, scores = judged("--images", path, "--data", f"folder:{path}")
    assert done.code == 0, done.err
    nothing_apart(scores)
    assert "left out 1 hidden folder or image (__MACOSX/00000/._00.png)" in done.err
    _, of_folder = judged("--images", folder, "--data", f"folder:{folder}")
    assert scores["KID-shapes × 1000"]["value"] == of_folder["KID-shapes × 1000"]["value"]
    done, mixed = judged("--images", folder, "--data", f"folder:{path}", "--true-n", 9)
    assert done.code == 0 and "n 12 against 9" in mixed["FD-shapes"]["protocol"]
    assert [open_folder(path).caption(i) for i in (3, 4)] == [None, "a red star"]


def test_zips_are_checked_as_folders_are(judged, tmp_path):
    folder = write(tmp_path / "photos", 40, 40)
    Image.open(folder / "03.png").convert("L").save(folder / "03.png")
    Image.new("RGB", (41, 40)).save(folder / "90.png")
    (folder / "91.png").write_bytes(b"no image")
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    one_line(judged("--images", path, "--data", f"folder:{path}")[0], "photos.zip/03.png", "not RGB but L")
    done, _ = judged("--images", path, "--data", f"folder:{path}", "--convert")
    one_line(done, "2 sizes", "41x40 (90.png)")
    assert "1 unreadable, left out: 91.png" in done.err
    path.write_bytes(path.read_bytes()[:-40])
    one_line(judged("--images", path)[0], "photos.zip", "damaged")


def test_statistics_of_others(judged, judges, tmp_path):
    """Of the one judge whose features are as many; both small judges have six."""
    folder = write(tmp_path / "photos", 37, 41)
    files, scores = kept(judged, folder, tmp_path / "kept")
    (ours,) = (file for file in files if file.name.startswith("classifier"))
    with np.load(ours) as read:
        np.savez(tmp_path / "fid.npz", mu=read["mu"], sigma=read["sigma"])
    np.savez(tmp_path / "kid.npz", feats=np.load(ours.with_suffix(".features.npy")))
    options = "--images", folder, "--reference", tmp_path / "fid.npz"
    one_line(judged(*options)[0], "fid.npz", "6 features, which 2 of the networks have")
    done, of_sums = judged(*options, "--clip", "None")
    assert done.code == 0, done.err
    assert of_sums["FD-shapes"]["value"] == pytest.approx(scores["FD-shapes"]["value"], abs=1e-9)
    assert "n 12 against an unknown number" in of_sums["FD-shapes"]["protocol"]
    assert "protocol unknown" in of_sums["FD-shapes"]["protocol"] and "none: the reference keeps sums" in done.out
    done, of_features = judged("--images", folder, "--reference", tmp_path / "kid.npz", "--clip", "None")
    assert of_features["KID-shapes × 1000"]["value"] == scores["KID-shapes × 1000"]["value"]
    done, _ = judged(*options, "--keep-reference", tmp_path / "again")
    one_line(done, "--keep-reference", "--reference")
    np.savez(tmp_path / "wide.npz", feats=np.ones((20, 7)))
    done, _ = judged("--images", folder, "--reference", tmp_path / "wide.npz")
    one_line(done, "wide.npz", "7 features, which none of the networks have")


def test_the_prefix_of_captions_is_named(judged, tmp_path):
    folder = write(tmp_path / "photos", 40, 40)
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(caption(scene("held_out", i), "held_out", i).text)
    options = "--images", folder, "--data", f"folder:{folder}"
    plain = judged(*options)[1]["cosine-clip"]
    with_prefix = judged(*options, "--prefix", "a small")[1]["cosine-clip"]
    assert ", no prefix, " in plain["protocol"] and ", prefix 'a small ', " in with_prefix["protocol"]
    assert plain["value"] != with_prefix["value"]
    assert judged(*options, "--prefix", "a small ")[1]["cosine-clip"] == with_prefix
    for i in range(12):  # the same words in the captions themselves
        text = folder / f"{i:02d}.txt"
        text.write_text(f"a small {text.read_text()}")
    assert judged(*options)[1]["cosine-clip"]["value"] == with_prefix["value"]


def test_the_deviation_of_kid_is_beside_its_error(judged, tmp_path):
    folder, true = write(tmp_path / "photos", 40, 40), write(tmp_path / "true", 40, 40, 20)
    done, scores = judged("--images", folder, "--data", f"folder:{true}")
    score = scores["KID-shapes × 1000"]
    assert score["deviation"] > 0 and score["error"] > 0
    assert f"± {score['error']:.3g} (subsets ± {score['deviation']:.3g})" in done.out
    assert all(each["deviation"] is None for name, each in scores.items() if not name.startswith("KID"))


def test_sheets_are_left_out_and_told(judged, tmp_path):
    folder = write(tmp_path / "photos", 40, 40)
    Image.new("RGB", (400, 40)).save(folder / "grid.png")
    done, scores = judged("--images", folder, "--data", f"folder:{folder}")
    assert done.code == 0 and "n 12 against 12" in scores["FD-shapes"]["protocol"]
    assert "grid.png: left out" in done.err

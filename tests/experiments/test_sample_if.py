"""DeepFloyd IF from the command line, on a small one in diffusers' layout: every mode, every file, bad input."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_if
from PIL import Image

from experiments import sample
from experiments.options.sampling import SamplingOptions, samplings
from jaxdiff.data import png_metadata
from jaxdiff.data.images import to_uint8
from jaxdiff.systems.deepfloyd import SAMPLING_I
from jaxdiff.systems.pipeline import SampleOptions, with_boxes
from jaxdiff.weights import imagen
from jaxdiff.weights.settings import from_json

FEW = "--steps", "3,2", "--batch", "4"
CAPTION = small_if.CAPTIONS[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if")
    imagen.export(small_if.cascade(), folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    """An image of no convenient size."""
    rows, columns = np.mgrid[:45, :38]
    picture = np.stack([rows * 5, columns * 6, 0 * rows + 90], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def drawn(done, out):
    assert done.code == 0, done.err
    (path,) = [path for path in out.glob("*.png") if path.name != "grid.png"]
    return Image.open(path)


def settings_of(image):
    return png_metadata.read(Path(image.filename).read_bytes()).settings


def test_text_to_image(exported, tmp_path, command):
    done = command(sample, CAPTION, "--weights", exported, "--out", tmp_path, "--seed", 5, *FEW)
    image = drawn(done, tmp_path)
    told = settings_of(image)
    chosen = [from_json(stage, "the PNG") for stage in told["stages"]]
    assert [s.steps for s in chosen] == [3, 2] and chosen[0].sampler == SAMPLING_I.sampler
    model = imagen.load(exported)
    boxes = [dataclasses.replace(box, sampling=sampling) for box, sampling in zip(imagen.trained(model), chosen)]
    again = with_boxes(model, boxes).sample([CAPTION], SampleOptions(seed=5))[1][0]
    assert image.size == (64, 64) and np.ptp(np.asarray(image)) > 100
    # Not bit by bit: the encoder read other captions beside this one, and a network at random makes much of little.
    assert np.abs(np.asarray(image).astype(int) - to_uint8(again)).mean() < 0.1


def test_pipelines_named_one_by_one(exported, tmp_path, command):
    stages = exported / "base64", exported / "sr256"
    both = command(sample, CAPTION, "--weights", *stages, "--out", tmp_path / "both", *FEW)
    whole = command(sample, CAPTION, "--weights", exported, "--out", tmp_path / "whole", *FEW)
    found = [np.asarray(drawn(done, tmp_path / name)) for done, name in ((both, "both"), (whole, "whole"))]
    np.testing.assert_array_equal(*found)
    first = command(sample, CAPTION, "--weights", stages[0], "--out", tmp_path / "first", "--steps", 2)
    assert drawn(first, tmp_path / "first").size == (16, 16)


def test_embeddings_are_made_once(exported, tmp_path, command):
    """With their file the text encoder is not even looked for, and the image is the same."""
    folder, file = tmp_path / "copy", tmp_path / "captions.safetensors"
    shutil.copytree(exported, folder)
    arguments = "--weights", folder, "--embeddings", file, "--negative", "a green heart", *FEW
    before = drawn(command(sample, CAPTION, *arguments, "--out", tmp_path / "a"), tmp_path / "a")
    shutil.rmtree(folder / "base64/text_encoder")
    after = drawn(command(sample, CAPTION, *arguments, "--out", tmp_path / "b"), tmp_path / "b")
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    other = command(sample, "a blue star", *arguments, "--out", tmp_path / "c")
    assert other.code == 2 and "has no embedding of 'a blue star'" in other.err
    other = command(sample, CAPTION, *arguments, "--no-clean", "--out", tmp_path / "c")
    assert other.code == 2 and "was made by" in other.err and other.err.count("\n") == 1


def test_a_prompt_that_cleaning_leaves_nothing_of(exported, tmp_path, command):
    done = command(sample, "http://example.com", "--weights", exported, "--out", tmp_path, *FEW)
    assert done.code == 0 and "nothing is left of 'http://example.com' after cleaning" in done.err


@pytest.mark.slow
def test_image_to_image(exported, photo, tmp_path, command):
    """In the shape of the given image; the less is drawn, the nearer it stays."""
    original, errors = None, []
    for strength in ("0.34,0.5", "1"):
        options = "--weights", exported, "--image", photo, "--strength", strength, *FEW
        image = drawn(command(sample, CAPTION, *options, "--out", tmp_path / strength), tmp_path / strength)
        assert image.size == (64, 72)  # 38×45, in steps of the base's stride
        original = Image.open(photo).resize(image.size, Image.Resampling.BICUBIC)
        errors.append(np.abs(np.asarray(image, float) - np.asarray(original, float)).mean())
        assert settings_of(image)["image"] == photo.name
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_inpainting(exported, photo, tmp_path, command):
    mask = np.zeros((45, 38), np.uint8)
    mask[:, 19:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = "--image", photo, "--mask", tmp_path / "mask.png", "--strength", 1
    options = "--weights", exported, *given, *FEW
    image = drawn(command(sample, CAPTION, *options, "--out", tmp_path / "out"), tmp_path / "out")
    original = np.asarray(Image.open(photo).resize(image.size, Image.Resampling.BICUBIC), float)
    difference = np.abs(np.asarray(image, float) - original)
    assert difference[:, :31].max() <= 3 and difference[:, 34:].mean() > 10


@pytest.mark.slow
def test_ones_own_picture_is_enlarged(exported, photo, tmp_path, command):
    """Of any size, without a prompt, in tiles."""
    options = "--weights", exported, "--enlarge", photo, "--tile", 64, "--tile-overlap", 32, "--respacing", ",leading"
    done = command(sample, *options, "--steps", ",2", "--out", tmp_path / "out")
    image = drawn(done, tmp_path / "out")
    assert image.size == (4 * 38, 4 * 45)


def test_respacings(exported):
    models = imagen.trained(imagen.load(exported))

    def chosen(**settings):
        return [
            (s.steps, s.spacing.grid(m.model.schedule, s.steps).t.shape[0])
            for s, m in zip(samplings(models, SamplingOptions(**settings)), models)
        ]

    assert chosen() == [(100, 101), (50, 51)]
    assert chosen(respacing="fast27,smart185") == [(27, 28), (185, 186)]
    assert chosen(steps="30") == chosen(steps="30", respacing="even") == [(30, 31)] * 2
    assert chosen(steps="30,", respacing="leading,") == [(30, 31), (50, 51)]
    with pytest.raises(ValueError, match="--respacing of 27 steps and --steps 5: leave one of them out"):
        chosen(steps="5", respacing="smart27")
    with pytest.raises(ValueError, match="unknown respacing 'slow'"):
        chosen(respacing="slow")


BAD = {
    "a strength without an image": (("--strength", "0.5"), "--strength is for an image"),
    "a mask without an image": (("--mask", "photo"), "--mask is for an image"),
    "two images": (("--image", "photo", "--enlarge", "photo"), "one image at a time"),
    "a place without an image": (("--enlarge-from", "16"), "--enlarge-from is for an image"),
    "no step left": (("--image", "photo", "--strength", "0.1", "--steps", "3"), "strength 0.1 leaves no step of 3"),
    "a strength above 1": (("--image", "photo", "--strength", "1.5"), "strength 1.5"),
    "a strength in words": (("--image", "photo", "--strength", "half"), "--strength half"),
    "no such image": (("--image", "/nowhere.png"), "/nowhere.png"),
    "no image at all": (("--image", "weights"), "not an image in any known format"),
    "a mask of another size": (("--image", "photo", "--mask", "small"), "10×10 pixels, but --image has 45×38"),
    "nothing enlarges it": (("--enlarge", "photo", "--enlarge-from", "64"), "no stage enlarges 64"),
    "no such variant": (("--variant", "fp16"), "model.fp16.safetensors"),
    "a respacing that is not for this": (("--respacing", "quick"), "unknown respacing 'quick'"),
    "no such pipeline": (("--weights", "/nowhere"), "/nowhere"),
    "embeddings that are none": (("--embeddings", "none.safetensors"), "not a complete safetensors file"),
    "embeddings of another kind": (("--embeddings", "e.bin"), "has to end in .safetensors"),
    "a size for what is enlarged": (("--enlarge", "photo", "--size", "16"), "--enlarge has the size of its image"),
    "no steps": (("--steps", "0"), "steps must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, exported, photo, tmp_path, command):
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    (tmp_path / "none.safetensors").write_text("none")
    files = {name: tmp_path / name for name in ("none.safetensors", "e.bin")}
    files |= {"photo": photo, "small": tmp_path / "small.png", "weights": exported / "base64/unet/config.json"}
    arguments, culprit = BAD[case]
    arguments = [files.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    done = command(sample, CAPTION, "--out", out, "--weights", exported, *arguments)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert culprit in done.err, done.err
    assert not out.exists()


def test_a_respacing_for_a_continuous_schedule(standin, tmp_path, command):
    done = command(
        sample, CAPTION, "--weights", standin, "--respacing", "smart27", "--up-to", 64, "--out", tmp_path / "out"
    )
    assert done.code == 2 and "the table of a discrete schedule, not Cosine" in done.err, done.err

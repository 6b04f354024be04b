"""Prompts to images on disk: what is written, what it says of itself, and that settings do what they say."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import sample
from experiments.options.sampling import SamplingOptions, mesh_of, samplings, spread
from jaxdiff.data import png_metadata
from jaxdiff.data.images import to_uint8
from jaxdiff.diffusion.samplers import DDIM, Euler, Heun
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.unet import EfficientUNet
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import SampleOptions, with_boxes
from jaxdiff.weights.imagen import load, trained
from jaxdiff.weights.settings import from_json, to_json

ROOT = Path(__file__).parents[2]


def pictures_in(folder):
    return {path.name: Image.open(path) for path in sorted(folder.glob("*.png")) if path.name != "grid.png"}


def sampled_as(model, chosen):
    """The pipeline with these sampling settings."""
    return with_boxes(model, [dataclasses.replace(m, sampling=s) for m, s in zip(trained(model), chosen, strict=True)])


def metadata_of(image):
    return png_metadata.read(Path(image.filename).read_bytes())


def test_one_png_for_each_picture_with_all_settings(standin, tmp_path, command):
    arguments = "a red circle", "a blue star", "--per-prompt", 2, "--seed", 7, "--up-to", 256, "--negative", "a square"
    done = command(sample, *arguments, "--weights", standin, "--out", tmp_path / "out", "--steps", "2,2,1")
    assert done.code == 0, done.err
    found = pictures_in(tmp_path / "out")
    assert list(found) == [f"000{i}-{slug}.png" for i, slug in enumerate(["a-red-circle"] * 2 + ["a-blue-star"] * 2)]
    assert {image.size for image in found.values()} == {(256, 256)}
    last = metadata_of(found["0003-a-blue-star.png"])
    assert (last.prompt, last.seed) == ("a blue star", 7)
    told = last.settings
    assert (told["number"], told["up_to"], told["negative"]) == (3, 256, "a square")
    chosen = [from_json(stage, "the PNG") for stage in told["stages"]]
    assert [sampling.steps for sampling in chosen] == [2, 2, 1]
    # What the file says draws the same image again.
    options = SampleOptions(seed=7, per_prompt=2, negative="a square", last=1)
    again = sampled_as(load(standin), chosen).sample(["a red circle", "a blue star"], options)[1][3]
    difference = np.asarray(found["0003-a-blue-star.png"], int) - to_uint8(again)
    assert np.abs(difference).max() <= 1  # another batch rounds differently
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 2 * 256


def test_a_picture_does_not_depend_on_the_batch_or_its_neighbours(standin):
    model, prompts = load(standin), ["a red circle", "a blue star", "a yellow cross", "two green hearts"]
    whole = model.sample(prompts, SampleOptions(seed=3, batch=16, last=1))
    assert [product.shape[:2] for product in whole] == [(4, 64), (4, 256)]
    in_twos = model.sample(prompts, SampleOptions(seed=3, batch=2, last=1))
    alone = model.sample(prompts[3:], SampleOptions(seed=3, first=3, last=1))
    for expected, two, one in zip(whole, in_twos, alone, strict=True):
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(two, expected, atol=2e-3)
        np.testing.assert_allclose(one, expected[3:], atol=2e-3)


def test_large_lists_are_drawn_in_batches(standin, tmp_path, command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n  a green heart \n")
    options = "--up-to", 64, "--batch", 2, "--weights", standin
    done = command(sample, "--prompts", prompts, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = pictures_in(tmp_path / "out")
    assert list(found) == ["0000-a-red-circle.png", "0001-a-blue-star.png", "0002-a-green-heart.png"]
    (expected,) = load(standin).sample(["a red circle", "a blue star", "a green heart"], SampleOptions(last=0))
    for image, picture in zip(found.values(), expected):
        assert np.abs(np.asarray(image).astype(int) - to_uint8(picture)).max() <= 1


@pytest.mark.parametrize("mesh", [pytest.param("data=-1", marks=pytest.mark.slow), "data=2,tensor=4"])
def test_all_devices_draw_the_same_pictures(mesh, standin, tmp_path, command):
    """Three images, which fill no mesh evenly; `tensor` splits the rows of what is enlarged."""
    arguments = "a red circle", "a blue star", "a yellow cross", "--up-to", 256, "--seed", 3, "--weights", standin
    found = {}
    for name, given in {"one": (), "all": ("--mesh", mesh)}.items():
        done = command(sample, *arguments, "--out", tmp_path / name, *given)
        assert done.code == 0, done.err
        found[name] = pictures_in(tmp_path / name)
    assert list(found["all"]) == list(found["one"]) and len(found["one"]) == 3
    for name, expected in found["one"].items():
        assert np.ptp(expected) > 60
        assert np.abs(np.asarray(found["all"][name]).astype(int) - np.asarray(expected)).max() <= 1


def test_a_mesh_compiles_each_stage_once(standin, caplog):
    """The sampler's state lies before the first steps as it does after them."""
    model = load(standin)
    model = sampled_as(model, [dataclasses.replace(each.sampling, steps=9) for each in trained(model)])
    with spread(model, mesh_of("data=2,tensor=4")) as model, jax.log_compiles():
        drawn = model.sample(["a red circle"], SampleOptions(seed=5, last=1), lambda box, done, total: None)
    assert drawn[1].shape == (1, 256, 256, 3)
    compiled = [line for line in caplog.messages if line.startswith("Compiling jit(integrate)")]
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "mesh, told",
    [
        ("fsdp=8", "only data and tensor remain"),
        ("data=3", "does not fit 8 devices"),
        ("rows=8", "write sizes of data, fsdp, tensor"),
        ("tensor=8", "rows cannot be split over 8 devices"),
    ],
)
def test_a_mesh_that_cannot_draw(mesh, told, standin, tmp_path, command):
    arguments = "a red circle", "--size", "16x16", "--weights", standin, "--out", tmp_path / "out", "--mesh", mesh
    done = command(sample, *arguments)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


def test_other_sizes_in_tiles(standin, tmp_path, command):
    arguments = "a red circle", "--size", "48x32", "--up-to", 256, "--tile", 96, "--tile-overlap", 32
    done = command(sample, *arguments, "--weights", standin, "--out", tmp_path)
    assert done.code == 0, done.err
    image = pictures_in(tmp_path)["0000-a-red-circle.png"]
    assert image.size == (128, 192)
    assert metadata_of(image).settings["stages"][1]["tiles"] == to_json(Tiles(96, 32))


def test_half_precision_draws_nearly_the_same(standin, tmp_path, command):
    drawn = {}
    for dtype in (None, "bfloat16"):
        options = ["--weights", standin, "--out", tmp_path / str(dtype), "--steps", 2, "--up-to", 256]
        options += ["--dtype", dtype] if dtype else []
        done = command(sample, "a red circle", *options)
        assert done.code == 0, done.err
        (image,) = pictures_in(tmp_path / str(dtype)).values()
        assert metadata_of(image).settings["dtype"] == dtype
        drawn[dtype] = np.asarray(image, np.float32)
    difference = np.abs(drawn[None] - drawn["bfloat16"])
    assert 0 < difference.mean() < 4  # of 255


def test_settings_for_all_stages_or_each(standin):
    models = trained(load(standin))
    own = [m.sampling for m in models]
    assert samplings(models, SamplingOptions()) == tuple(own)
    every = samplings(models, SamplingOptions(sampler="heun", steps="5", guidance="4", aug_level="0.1"))
    assert [s.sampler for s in every] == [Heun()] * 3
    assert [(s.steps, s.guidance.weight, s.aug_level) for s in every] == [(5, 4.0, 0.1)] * 3
    each = samplings(models, SamplingOptions(sampler="euler,,ddim", steps="9,,3", thresholding="static,none,dynamic"))
    assert [s.sampler for s in each] == [Euler(), own[1].sampler, DDIM()]
    assert [s.steps for s in each] == [9, own[1].steps, 3]
    assert [s.thresholding for s in each] == [StaticThreshold(), NoThreshold(), DynamicThreshold()]
    capped = samplings(models, SamplingOptions(thresholding="static,dynamic,dynamic", percentile=0.9, cap=2.0))
    assert [s.thresholding for s in capped] == [
        StaticThreshold(),
        DynamicThreshold(0.9, 2.0),
        DynamicThreshold(0.9, 2.0),
    ]
    tiled = samplings(models, SamplingOptions(tile=256))
    assert [s.tiles for s in tiled] == [None, Tiles(256, 32), Tiles(256, 32)]


def test_warnings_are_one_plain_line_each(standin, tmp_path, command):
    long = "a red circle " * 8 + "and nothing else"
    done = command(sample, "", long, "--up-to", 64, "--weights", standin, "--out", tmp_path)
    assert done.code == 0, done.err
    warned = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    # The text encoder comes first.
    assert "cut short" in warned[0] and "and nothing else" in warned[0]
    assert "empty prompt is sampled without text" in warned[1]
    assert "UserWarning" not in done.err


def test_the_shipped_models_draw_what_they_drew(tmp_path, command):
    """red_circle.png: every fourth pixel of this image on a CPU, before the library's inside became general."""
    caption = "a large red circle on a white background"
    done = command(sample, caption, "--seed", 7, "--up-to", 256, "--out", tmp_path)
    assert done.code == 0, done.err
    (image,) = pictures_in(tmp_path).values()
    expected = np.asarray(Image.open(Path(__file__).with_name("red_circle.png")), int)
    assert np.abs(np.asarray(image, int)[::4, ::4] - expected).max() <= 2


def test_few_frames_lie_between_the_command_and_the_network(standin, tmp_path, command, monkeypatch):
    """Of this project's files, ten functions at most, the command and the network among them."""
    network = EfficientUNet.__call__

    def reached(self, *inputs):
        if self.is_initializing():  # for the shapes of what is loaded
            return network(self, *inputs)
        raise RuntimeError("the network is reached")

    monkeypatch.setattr(EfficientUNet, "__call__", reached)
    jax.clear_caches()  # a program that another test has compiled would not call the network
    done = command(sample, "a red circle", "--up-to", 64, "--weights", standin, "--out", tmp_path / "out")
    assert done.code == 70 and "RuntimeError: the network is reached" in done.err, done.err
    frames = re.findall(r'File "(.+)", line \d+, in (\S+)', done.err)
    ours = [name for file, name in frames if Path(file).is_relative_to(ROOT / "jaxdiff") or "/experiments/" in file]
    assert (ours[0], ours[1], ours[-1]) == ("run", "main", "reached") and "guided" in ours
    assert len(ours) <= 10, ours


def test_seconds_belong_to_the_box_that_reports(monkeypatch):
    """Two runs of a generator, whose first report compiles, and a decoder; what lies between them belongs to none."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("jaxdiff.systems.bars.time", SimpleNamespace(perf_counter=lambda: clock.now))
    with Bars(SimpleNamespace(sides=(64, 256)), runs=2) as bars:

        def report(now, *progress):
            clock.now = float(now)
            bars(*progress)

        report(10, 0, 8, 16)
        report(12, 0, 16, 16)
        report(15, 1, 4, 4)
        clock.now = 100.0
        bars.resume()
        report(102, 0, 8, 16)
        report(104, 0, 16, 16)
        report(105, 1, 4, 4)
    assert (bars.seconds(0), bars.seconds(1)) == (16, 4)
    assert bars.per_image(0, 8) == (2 + 2 + 2) / 24 * 32 / 8  # seconds a step, times steps an image
    assert bars.per_image(1, 4) == 1 / 4 * 8 / 4


def test_an_empty_prompt_is_the_null_text(standin):
    model = load(standin)
    with pytest.warns(UserWarning, match="without text"):
        (blank,) = model.sample(["  "], SampleOptions(last=0))
    (named,) = model.sample(["a red circle"], SampleOptions(last=0))
    assert np.abs(blank - named).max() > 0.01

"""Public weights against independent implementations, on random ones: what passes, what fails, what is refused."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import small_if
import small_verified
from PIL import Image

from experiments import verify
from experiments.output.comparison import FACTOR, side_by_side
from experiments.verifications import kinds, libraries, stable_diffusion
from experiments.verifications.inputs import Inputs
from experiments.verifications.rows import LIMITS, arrays, images
from jaxdiff.core import trees
from jaxdiff.weights import clip, hub, imagen, latent_unet, t5
from jaxdiff.weights import deepfloyd as unets
from jaxdiff.weights import stable_diffusion as weights

WITHOUT_TORCH = "the independent implementations are PyTorch's"
FEW = "--steps", 2, "--size", "64x128"


def report_of(done, out):
    report = json.loads((out / "report.json").read_text())
    assert report["passed"] == (done.code == 0) == all(row["passed"] for row in report["rows"]), done.err
    return report


def failures(report):
    return {row["stage"] for row in report["rows"] if not row["passed"]}


def perturbed(load):
    """The loader, which sees the largest tensor 3 % off."""

    def loaded(*arguments, **options):
        result = load(*arguments, **options)
        *others, params = result if isinstance(result, tuple) else (result,)
        leaves = trees.flatten(params)
        name = max(leaves, key=lambda name: leaves[name].size)
        params = trees.unflatten(leaves | {name: leaves[name] * 1.03})
        return (*others, params) if others else params

    return loaded


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """These networks are small, and a collection takes half a second in a process with many objects."""
    monkeypatch.setattr(libraries, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    small_verified.stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    pytest.importorskip("diffusers", reason="IF is compared with diffusers'")
    folder = tmp_path_factory.mktemp("if")
    imagen.export(small_if.cascade(), folder)
    return folder


def test_stable_diffusion(sd, tmp_path, command):
    done = command(verify, "--weights", sd, "--against", "diffusers", "--out", tmp_path, *FEW)
    assert done.code == 0, done.out + done.err
    report = report_of(done, tmp_path)
    compared = [(row["stage"], row["what"]) for row in report["rows"]]
    assert compared == [
        ("text encoder", "prompt"),
        ("text encoder", "negative prompt"),
        *[("U-Net", f"step {step}") for step in (999, 749, 500, 250, 0)],
        ("autoencoder", "encoder"),
        ("autoencoder", "decoder"),
        ("pipeline", "2 steps"),
    ]
    assert all(row["relative"] < 1e-4 for row in report["rows"])
    assert {"jax", "torch", "transformers", "diffusers"} == report["versions"].keys()
    image = np.asarray(Image.open(tmp_path / "comparison-64x128.png"))
    assert image.std() > 20 and "pass: all 10 rows" in done.out


def test_one_tensor_that_is_wrong(sd, tmp_path, command, monkeypatch):
    """Is seen where it is, and in the image; other networks pass."""
    monkeypatch.setattr(latent_unet, "load_tensors", perturbed(latent_unet.load_tensors))
    done = command(verify, "--weights", sd, "--out", tmp_path, *FEW)
    assert done.code == 1 and "FAIL" in done.out and done.err == ""
    report = report_of(done, tmp_path)
    assert failures(report) >= {"U-Net"} and not failures(report) & {"text encoder", "autoencoder"}
    worst = max(row["relative"] for row in report["rows"] if row["stage"] == "U-Net")
    assert 5e-4 < worst < 1


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPTextModel", "CLIPVisionModelWithProjection"])
def test_clip(kind, tmp_path, command, monkeypatch):
    small_verified.clip(tmp_path / "clip", kind)
    arguments = "--weights", tmp_path / "clip", "--against", "transformers", "--out", tmp_path / "out"
    done = command(verify, *arguments)
    assert done.code == 0, done.out + done.err
    towers = {"CLIPModel": {"text", "image", "both"}, "CLIPTextModel": {"text"}}.get(kind, {"image"})
    assert {row["stage"] for row in report_of(done, tmp_path / "out")["rows"]} == towers
    monkeypatch.setattr(clip, "_params", perturbed(clip._params))
    done = command(verify, *arguments)
    assert done.code == 1 and failures(report_of(done, tmp_path / "out")) <= towers


@pytest.mark.parametrize("decodes", [True, False], ids=["encoder and decoder", "encoder"])
def test_t5(decodes, tmp_path, command, monkeypatch):
    small_verified.t5(tmp_path / "t5", decodes)
    arguments = "--weights", tmp_path / "t5", "--out", tmp_path / "out", "--prompt", "a red cat", "two blue dogs"
    done = command(verify, *arguments)
    assert done.code == 0, done.out + done.err
    assert len(report_of(done, tmp_path / "out")["rows"]) == 1 + decodes
    monkeypatch.setattr(t5, "load", perturbed(t5.load))
    done = command(verify, *arguments)
    assert done.code == 1 and "encoder" in failures(report_of(done, tmp_path / "out"))


def test_the_shipped_text_encoder(tmp_path, command):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    done = command(verify, "--weights", imagen.SHIPPED / "text", "--out", tmp_path)
    assert done.code == 0, done.out + done.err
    assert report_of(done, tmp_path)["family"] == "T5"


def test_deepfloyd(cascade, tmp_path, command):
    options = "--out", tmp_path, "--steps", 2, "--negative", "a green star"
    done = command(verify, "--weights", cascade / "base64", *options)
    assert done.code == 0, done.out + done.err
    report = report_of(done, tmp_path)
    assert [row["stage"] for row in report["rows"]] == [*["text encoder"] * 2, *["stage I"] * 5, "pipeline"]
    assert all(row["relative"] < 1e-4 for row in report["rows"][:-1]) and report["rows"][-1]["mean"] < 0.1
    assert np.asarray(Image.open(tmp_path / "comparison-16x16.png")).std() > 20


@pytest.mark.slow
def test_deepfloyd_super_resolution(cascade, tmp_path, command):
    places = cascade / "base64", cascade / "sr256"
    done = command(verify, "--weights", *places, "--out", tmp_path, "--steps", 2)
    assert done.code == 0, done.out + done.err
    report = report_of(done, tmp_path)
    stages = ["text encoder"] * 2, ["stage I"] * 5, ["pipeline"], ["stage II"] * 5, ["pipeline"]
    assert [row["stage"] for row in report["rows"]] == [stage for group in stages for stage in group]
    assert {path.name for path in tmp_path.glob("*.png")} == {"comparison-16x16.png", "comparison-64x64.png"}


@pytest.mark.slow
def test_a_folder_of_stages_one_of_which_is_wrong(cascade, tmp_path, command, monkeypatch):
    """In another size; the error of stage I is not one of stage II's network."""
    real = unets.load_unet
    monkeypatch.setattr(
        unets,
        "load_unet",
        lambda folder, *a, **b: (perturbed(real) if "base64" in str(folder) else real)(folder, *a, **b),
    )
    done = command(verify, "--weights", cascade, "--out", tmp_path, "--steps", 2, "--size", "16x24")
    assert done.code == 1
    assert "stage I" in failures(report := report_of(done, tmp_path)) and "stage II" not in failures(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("xl", "kind", "change"),
    [(True, "", {}), (False, "Inpaint", {"in_channels": 9}), (True, "Inpaint", {"in_channels": 9})],
    ids=["XL", "inpainting", "XL inpainting"],
)
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_other_stable_diffusions(xl, kind, change, negative, tmp_path, command):
    small_verified.stable_diffusion(tmp_path / "sd", xl=xl, kind=kind, **change)
    options = "--out", tmp_path / "out", "--negative", negative, *FEW
    done = command(verify, "--weights", tmp_path / "sd", "--prompt", "a red cat!", "a boat", *options)
    assert done.code == 0, done.out + done.err
    whats = {row["what"] for row in report_of(done, tmp_path / "out")["rows"]}
    assert ("pooled" in whats) == xl and ("negative prompt" in whats) == (bool(negative) or not xl)


@pytest.mark.slow
def test_bfloat16(sd, tmp_path, command):
    done = command(verify, "--weights", sd, "--out", tmp_path, "--dtype", "bfloat16", *FEW)
    report = report_of(done, tmp_path)
    assert report["limits"] == {"relative": 5e-2, "image": 8.0}
    assert done.code == 0 and max(row["relative"] for row in report["rows"]) > 1e-3, done.out


def test_networks_of_a_single_file(tmp_path):
    """Nothing is downloaded: settings and names are the package's, tensors the file's."""
    path = tmp_path / "model.safetensors"
    wanted = small_verified.single_file(path)
    import diffusers

    inputs, theirs = Inputs(("a cat",)), libraries.imported("diffusers", "float32")
    source = weights.open_source(path)
    networks = {
        "unet": stable_diffusion._network(source, "unet", diffusers.UNet2DConditionModel, inputs, theirs),
        "vae": stable_diffusion._network(source, "vae", diffusers.AutoencoderKL, inputs, theirs),
        "text_encoder": stable_diffusion._text_encoder(source, "text_encoder", inputs, theirs),
    }
    for name, network in networks.items():
        found, expected = network.state_dict(), wanted[name].state_dict()
        assert found.keys() == expected.keys()
        assert all((found[key] == expected[key]).all() for key in found), name
        assert not any(parameter.is_meta for parameter in [*network.parameters(), *network.buffers()])
    tensors = dict(source.component("vae").tensors)
    name = tensors.popitem()[0]
    with pytest.raises(ValueError, match=f"somewhere: 1 tensors do not fit AutoencoderKL .*{name}"):
        theirs.filled(networks["vae"], tensors, "somewhere")


@pytest.mark.slow
def test_a_single_file(tmp_path, command):
    small_verified.single_file(tmp_path / "model.safetensors", 768)
    done = command(verify, "--weights", tmp_path / "model.safetensors", "--out", tmp_path / "out", *FEW)
    assert done.code == 0, done.out + done.err
    assert len(report_of(done, tmp_path / "out")["rows"]) == 10


def test_without_pytorch(tmp_path, command, monkeypatch):
    """One line that says what to install, before anything is read."""
    monkeypatch.setitem(sys.modules, "torch", None)
    text = imagen.SHIPPED / "text"
    done = command(verify, "--weights", text, "--out", tmp_path / "out")
    assert done.code == 2 and "pip install torch\n" in done.err and done.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install torch diffusers$"):
        libraries.imported("diffusers", "float32")
    assert not (tmp_path / "out").exists()


BAD = {
    "no weights": ((), "--weights names nothing"),
    "no such folder": (("--weights", "/nowhere"), "/nowhere: no such file or folder"),
    "no such file": (("--weights", "model.safetensors"), "model.safetensors: no such file or folder"),
    "no such folder below": (("--weights", "a/b/c"), "a/b/c: no such file or folder"),
    "an empty folder": (("--weights", "empty"), "an empty folder"),
    "one of ours": (("--weights", str(imagen.SHIPPED)), "a model of jaxdiff's own"),
    "another network": (("--weights", "bert"), "a network of type 'bert'"),
    "another pipeline": (("--weights", "flux"), "class 'FluxPipeline' is not compared"),
    "not safetensors": (("--weights", "file.safetensors"), "not a complete safetensors file"),
    "several models": (("--weights", "text", "text"), "stages of DeepFloyd IF only"),
    "the other library": (("--weights", "text", "--against", "diffusers"), "T5 is compared with transformers"),
    "a size without images": (("--weights", "text", "--size", "64"), "--size is for models that sample images"),
    "a size in words": (("--weights", "text", "--size", "large"), "--size large"),
    "no prompt": (("--weights", "text", "--prompt", " "), "--prompt is empty"),
    "no steps": (("--weights", "text", "--steps", "0"), "--steps 0"),
    "a seed below 0": (("--weights", "text", "--seed", "-1"), "--seed -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, command, monkeypatch):
    arguments, culprit = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_text("none")
    for folder, name, content in (
        ("bert", "config.json", {"model_type": "bert"}),
        ("flux", "model_index.json", {"_class_name": "FluxPipeline"}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(content))
    (tmp_path / "text").symlink_to(imagen.SHIPPED / "text")
    monkeypatch.chdir(tmp_path)
    if case == "not safetensors":
        pytest.importorskip("torch", reason=WITHOUT_TORCH)
    done = command(verify, *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert culprit in done.err and not (tmp_path / "out").exists()


def test_sizes_and_models_that_are_refused(sd, tmp_path, command):
    done = command(verify, "--weights", sd, "--size", "64x72", "--out", tmp_path)
    assert done.code == 2 and "72 pixels are not a multiple of 16" in done.err
    settings = json.loads((sd / "unet" / "config.json").read_text()) | {"num_class_embeds": 1000}
    shutil.copytree(sd, tmp_path / "x4")
    (tmp_path / "x4" / "unet" / "config.json").write_text(json.dumps(settings))
    done = command(verify, "--weights", tmp_path / "x4", "--out", tmp_path)
    assert done.code == 2 and "the ×4 upscaler is not compared" in done.err


def test_the_refiner(sd, tmp_path, command):
    index = json.loads((sd / "model_index.json").read_text()) | {"requires_aesthetics_score": True}
    shutil.copytree(sd, tmp_path / "refiner")
    (tmp_path / "refiner" / "model_index.json").write_text(json.dumps(index))
    done = command(verify, "--weights", tmp_path / "refiner", "--out", tmp_path)
    assert done.code == 2 and "the refiner is not compared" in done.err


def test_a_hub_id(sd, monkeypatch):
    """First the settings, then the folders that they name."""
    asked = []

    def directory_of(place, what="weights", *, folders=("",), variant=None):
        asked.append((place, folders, variant))
        return sd

    monkeypatch.setattr(hub, "directory_of", directory_of)
    kind, places = kinds.recognised(["someone/sd-tiny@main"])
    assert kind is kinds.STABLE_DIFFUSION and places == ["someone/sd-tiny@main"]
    assert stable_diffusion._local(places[0], Inputs(("a cat",), variant="fp16")) == sd
    folders = ("unet", "vae", "text_encoder")
    assert asked == [(places[0], (), None), (places[0], (), None), (places[0], folders, "fp16")]


def test_rows():
    """By hand: errors, limits, and what cannot be compared."""
    limits = LIMITS["float32"]
    row = arrays("a", "b", [1.0, -4.0], [1.0, -4.001], limits)
    assert row.largest == pytest.approx(1e-3) and row.relative == pytest.approx(1e-3 / 4.001) and row.passed
    assert not arrays("a", "b", [1.0, -4.0], [1.0, -4.003], limits).passed
    assert arrays("a", "b", [1.0, -4.0], [1.0, -4.003], LIMITS["bfloat16"]).passed
    assert arrays("a", "b", [0.0], [0.0], limits).passed and not arrays("a", "b", [1e-9], [0.0], limits).passed
    for other in ([1.0], [1.0, np.nan], [np.inf, 1.0]):
        for pair in ([1.0, 1.0], other), (other, [1.0, 1.0]):
            row = arrays("a", "b", *pair, limits)
            assert not row.passed and row.note and json.loads(json.dumps(row.values(), allow_nan=False))["note"]
    image = np.zeros((1, 4, 4, 3))
    assert images("a", "b", image + 0.015, image, limits).mean == pytest.approx(127.5 * 0.015, rel=1e-5)
    assert images("a", "b", image + 0.015, image, limits).passed
    assert not images("a", "b", image + 0.017, image, limits).passed
    assert "shapes" in images("a", "b", image, image[:, :2], limits).note
    assert "FAIL (the shapes differ: (1, 4, 4, 3) and (1, 2, 4, 3))" in verify.line(
        images("a", "b", image, image[:, :2], limits)
    )


def test_the_difference_is_shown():
    ours, theirs = np.zeros((1, 128, 128, 3)), np.full((1, 128, 128, 3), -0.5)
    theirs[:, :, 64:] = -1 / (4 * FACTOR)
    shown = np.asarray(side_by_side(ours, theirs, "diffusers", ("a cat",)))
    grey, other, left, right = (shown[20, x] for x in (20, 160, 300, 380))
    assert abs(int(grey[0]) - 128) <= 1 and abs(int(other[0]) - 64) <= 1 and left[0] == 255
    assert abs(int(right[0]) - 32) <= 1  # 1/128 of the range, times 16

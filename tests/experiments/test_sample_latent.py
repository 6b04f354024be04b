"""`experiments.sample` with a Stable Diffusion of random parameters: every task, LoRAs and ControlNets."""

import json

import jax
import numpy as np
import pytest
import small_stable_diffusion as small
from PIL import Image
from safetensors.numpy import load_file, save_file

from experiments import export, sample
from jaxdiff.data import png_metadata
from jaxdiff.models import lora
from jaxdiff.models.control import ControlModel
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.weights import control, latent_unet, stable_diffusion
from jaxdiff.weights import lora as lora_files
from jaxdiff.weights.lora_names import Networks


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of diffusers, with a LoRA and a ControlNet beside it."""
    folder = tmp_path_factory.mktemp("sd")
    small.torch_pipeline("SD 1", **small.ONE_LEVEL).save_pretrained(folder / "sd")
    generator = stable_diffusion.load(folder / "sd").generator
    network = latent_unet.network_of(generator.model)
    change = lora.init(generator.params, lora.ATTENTION, 2, jax.random.key(0))
    change = jax.tree.map(lambda leaf: leaf + 0.3 * (leaf.ndim > 0), change)
    lora_files.export({"model": change}, Networks(network), folder / "lora.safetensors")
    strange = {**load_file(folder / "lora.safetensors"), "unheard.of": np.zeros(3, "f4")}
    save_file(strange, folder / "strange.safetensors")
    config = ControlNetConfig(network.unet, 4, 3, (16, 16, 16, 16))
    params = ControlModel(generator.model, config).init(jax.random.key(1))[0]
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    control.export_control(control.Network(config, network.text_width), params, folder / "control")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    image.save(folder / "image.png")
    Image.fromarray(np.pad(np.full((24, 40), 255, np.uint8), ((8, 32), (8, 16)))).save(folder / "mask.png")
    return folder


@pytest.fixture
def sampled(weights, command, tmp_path):
    """The image that a command line samples."""

    def run(*arguments, code=0):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        fixed = "--weights", weights / "sd", "--seed", 3, "--size", 64, "--out", out
        done = command(sample, "a red cat", "--steps", 3, *fixed, *arguments)
        assert done.code == code, done.err
        if code:
            assert not out.exists()
            return done.err
        (path,) = out.glob("0000*.png")
        return np.asarray(Image.open(path)).astype(int), png_metadata.read(path.read_bytes()), done.err

    return run


def apart(first, second) -> float:
    return np.abs(first - second).mean()


def test_samplers_and_settings(sampled, weights):
    plain, metadata, _ = sampled()
    assert plain.shape == (64, 64, 3) and plain.std() > 5
    (stage,) = metadata.settings["stages"]
    assert "DDIM" in json.dumps(stage["sampler"]) and stage["steps"] == 3
    for arguments in (
        ("--sampler", "dpmpp-2m-karras"),
        ("--sampler", "euler-a"),
        ("--guidance", 1),
        ("--negative", "ugly"),
        ("--prompt-weights",),
        ("--lora", weights / "lora.safetensors"),
    ):
        other, _, _ = sampled(*arguments)
        same = arguments == ("--prompt-weights",)  # without brackets it changes nothing
        assert bool(apart(other, plain) < 1e-3) is same, arguments


def test_image_to_image_and_inpainting(sampled, weights):
    image = np.asarray(Image.open(weights / "image.png")).astype(int)
    plain, _, _ = sampled()
    begun, _, _ = sampled("--image", weights / "image.png", "--strength", 0.4)
    filled, _, _ = sampled("--image", weights / "image.png", "--mask", weights / "mask.png")
    assert apart(begun, plain) > 1 and apart(filled, begun) > 1 and image.shape == filled.shape


def test_loras(sampled, weights):
    plain, _, _ = sampled()
    one, metadata, _ = sampled("--lora", weights / "lora.safetensors")
    assert metadata.settings["lora"] == [str(weights / "lora.safetensors")]
    off, _, _ = sampled("--lora", f"{weights / 'lora.safetensors'}=0")
    twice = f"{weights / 'lora.safetensors'}=0.5"
    halves, _, _ = sampled("--lora", twice, twice)
    assert apart(one, plain) > 0.1 and apart(off, plain) == 0 and apart(halves, one) < 0.01
    _, _, warned = sampled("--lora", weights / "strange.safetensors")
    assert warned.count("unheard.of") == 1
    refused = sampled("--lora", weights / "strange.safetensors", "--strict", code=2)
    assert "unheard.of" in refused and refused.count("\n") == 1
    assert "the weight after = is a number" in sampled("--lora", "a=b", code=2)


def test_controlnets(sampled, weights):
    plain, _, _ = sampled()
    given = "--control", weights / "control", "--hint", weights / "image.png"
    one, _, _ = sampled(*given)
    edges, _, _ = sampled(*given, "--edges")
    off, _, _ = sampled(*given, "--control-weight", 0)
    assert apart(one, plain) > 0.1 and apart(edges, one) > 0.01 and apart(off, plain) < 0.01
    message = "1 --hint for 0 --control: give one image for each ControlNet"
    assert message in sampled("--hint", weights / "image.png", code=2)
    assert "--edges is for ControlNets" in sampled("--edges", code=2)
    assert "is not a ControlNet" in sampled("--control", weights / "lora.safetensors", *given[2:], code=2)


def test_exported_with_a_lora(sampled, weights, command, tmp_path):
    """As a folder; it samples what the LoRA samples."""
    given = "--weights", weights / "sd", "--lora", weights / "lora.safetensors", "--out", tmp_path / "styled"
    done = command(export, "sd", *given)
    assert done.code == 0, done.err
    wanted, _, _ = sampled("--lora", weights / "lora.safetensors")
    found, _, _ = sampled("--weights", tmp_path / "styled")
    assert apart(found, wanted) < 0.01
    assert "exists; name another" in command(export, "sd", *given).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 60), "--size 60: not a multiple of 8 pixels"),
        (("--sampler", "heun"), "--sampler heun: unknown sampler 'heun' of latent diffusion: choose from ddim, plms"),
        (("--chunks", 0), "--chunks 0"),
        (("--vae", "nowhere"), "nowhere"),
        (("--weights", "{}/lora.safetensors"), "it holds a LoRA with PEFT's names"),
        (("--weights", "{}/sd", "{}/sd"), "a Stable Diffusion is one file or folder"),
        (("--up-to", 256), "no stage samples 256 pixels; this cascade samples 8, 64"),
    ],
)
def test_refused(sampled, weights, arguments, message):
    given = [each.format(weights) if isinstance(each, str) else each for each in arguments]
    error = sampled(*given, code=2)
    assert message in error and error.count("\n") == 1, error


@pytest.fixture
def upscaler(tmp_path):
    """A folder of diffusers."""
    kind = "StableDiffusionUpscalePipeline"
    small.torch_pipeline("upscaler", kind, in_channels=7, **small.ONE_LEVEL).save_pretrained(tmp_path / "x4")
    return tmp_path / "x4"


def test_an_upscaler_enlarges_an_image(command, upscaler, tmp_path):
    """Of any size, which is padded and cut; without one, and with a box to begin at, it is refused."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (21, 30, 3), np.uint8)).save(tmp_path / "image.png")
    fixed = "a cat", "--weights", upscaler, "--steps", 2, "--out", tmp_path / "out"
    done = command(sample, *fixed, "--enlarge", tmp_path / "image.png")
    assert done.code == 0, done.err
    (path,) = (tmp_path / "out").glob("0000*.png")
    assert Image.open(path).size == (120, 84)
    for arguments, message in (
        ((), "these weights enlarge an image: give one with --enlarge"),
        (("--enlarge", tmp_path / "image.png", "--enlarge-from", 64), "--enlarge-from 64: these weights enlarge"),
    ):
        done = command(sample, *fixed[:-1], tmp_path / "other", *arguments)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


def test_what_is_no_upscaler(command, weights, tmp_path):
    for arguments, message in (
        (("--upscaler", weights / "sd"), "samples from text, and enlarges no image"),
        (("--upscaler-steps", 2), "--upscaler-steps is for an --upscaler"),
    ):
        done = command(sample, "a cat", "--weights", weights / "sd", *arguments, "--out", tmp_path / "out")
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.slow
def test_an_upscaler_behind_the_pipeline(command, weights, upscaler, tmp_path):
    chained = "--upscaler", upscaler, "--upscaler-steps", 2, "--size", 64, "--weights", weights / "sd"
    done = command(sample, "a cat", "--steps", 2, *chained, "--out", tmp_path / "chained")
    assert done.code == 0 and "1 images at" in done.out, done.err
    (path,) = (tmp_path / "chained").glob("0000*.png")
    assert Image.open(path).size == (256, 256)
    assert png_metadata.read(path.read_bytes()).settings["upscaler"] == str(upscaler)

"""Stable Diffusion's families in their public topologies, from folders and from single files, against diffusers'."""

import json
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
import small_stable_diffusion as small
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import compare, image_to_image, inpainting

from jaxdiff.models.conditioners import NullText
from jaxdiff.weights import single_file, stable_diffusion
from jaxdiff.weights import single_file_families as families
from jaxdiff.weights.stable_diffusion_export import Layout, export

XL = "StableDiffusionXL{}Pipeline"


class Case(NamedTuple):
    """A family, its pipeline in diffusers and its scheduler. channels: that its U-Net reads. tasks: other pipelines of
    the same networks."""

    family: families.Family
    name: str
    kind: str
    sampler: str
    channels: int = 4
    tasks: tuple[tuple[str, object], ...] = ()


ONE = "StableDiffusion{}Pipeline"
INPAINTING = (("Inpaint", inpainting),)
BOTH = (("Img2Img", image_to_image), *INPAINTING)
CASES = {
    "SD 1": Case(families.SD_1, "SD 1", ONE.format(""), "PLMS"),
    "SD 1 inpainting": Case(families.SD_1_INPAINTING, "SD 1", ONE.format("Inpaint"), "PLMS", 9, INPAINTING),
    "SD 2": Case(families.SD_2_V, "SD 2", ONE.format(""), "DDIM", 4, BOTH),
    "upscaler": Case(families.X4_UPSCALER, "upscaler", ONE.format("Upscale"), "DDIM", 7),
    "SDXL": Case(families.SDXL, "SDXL", XL.format(""), "Euler", 4, BOTH),
    "SDXL inpainting": Case(families.SDXL_INPAINTING, "SDXL", XL.format("Inpaint"), "Euler", 9, INPAINTING),
}


def written(folder, case, theirs):
    """A single file in half precision and without metadata, as most of the public ones."""
    theirs.save_pretrained(folder)
    single_file.save(folder / "with.safetensors", small.tensors_of(folder), case.family, "float16")
    save_file(load_file(folder / "with.safetensors"), folder / "without.safetensors")
    return folder / "without.safetensors"


def rounded(theirs):
    """diffusers' networks with their parameters rounded to half precision, in place."""
    for each in theirs.components.values():
        if hasattr(each, "parameters"):
            each.half().float()


def assert_written_alike(ours, folder):
    """Our pipeline as a single file has the same names and numbers."""
    export(ours, folder / "ours.safetensors", Layout.SINGLE_FILE, "float16")
    found, wanted = load_file(folder / "ours.safetensors"), load_file(folder / "with.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not np.array_equal(found[name].view("u2"), wanted[name].view("u2"))] == []


def equal_in_half(found, wanted):
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, np.float16(b)), found, wanted)))


def test_a_single_file_is_its_folder(tmp_path):
    """The same settings and, rounded to half precision, the same parameters."""
    case = CASES["SD 1"]
    theirs = small.torch_pipeline("SD 1", sampler="PLMS", single=True)
    ours = stable_diffusion.load(written(tmp_path, case, theirs))
    folder = stable_diffusion.load(tmp_path)
    assert_written_alike(folder, tmp_path)
    public = replace(folder.generator.model, side=64), 64, 512  # the public file's: a single file has none
    assert (ours.generator.model, ours.generator.side, ours.decoders[0].side) == public
    assert ours.generator.sampling == folder.generator.sampling
    for part in ("config", "skip_last", "final_norm", "pooling", "length"):
        assert getattr(ours.text_encoder, part) == getattr(folder.text_encoder, part), part
    assert (ours.decoders[0].config, ours.decoders[0].scale) == (folder.decoders[0].config, folder.decoders[0].scale)
    for name in ("generator", "text_encoder"):
        equal_in_half(getattr(ours, name).params, getattr(folder, name).params)
    equal_in_half(ours.decoders[0].params, folder.decoders[0].params)
    captions = ["Hi! a cat", ""]
    np.testing.assert_array_equal(ours.text_encoder.tokenize(captions).ids, folder.text_encoder.tokenize(captions).ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_families(name, tmp_path, monkeypatch):
    """From the folder, and from a single file; in all tasks."""
    case = CASES[name]
    theirs = small.torch_pipeline(case.name, case.kind, case.sampler, single=True, in_channels=case.channels)
    path = written(tmp_path, case, theirs)
    assert_written_alike(stable_diffusion.load(tmp_path), tmp_path)
    for source in (tmp_path, path):
        if source == path:
            rounded(theirs)
        loaded = stable_diffusion.load(source)
        ours = small.sampled_as(loaded, theirs, small.STEPS)
        read = replace(loaded.generator.sampling, steps=small.STEPS)
        assert ours.generator.sampling == read and ours.generator.model == loaded.generator.model
        if name == "upscaler":
            small.compare_upscaling(monkeypatch, theirs, ours)
            continue
        if "Inpaint" not in case.kind:
            compare(monkeypatch, theirs, ours)
        for task, init in case.tasks:
            kind = (XL if case.name == "SDXL" else ONE).format(task)
            other = small.in_class(theirs.components, kind)
            for strength in (1.0,) if case.sampler == "PLMS" else (0.6, 1.0):
                compare(monkeypatch, other, ours, init(strength))


@pytest.mark.slow
def test_xl_whose_null_text_is_the_empty_prompt(tmp_path, monkeypatch):
    """As its index says."""
    pair = small.pair(tmp_path, "SDXL", XL.format(""), sampler="Euler")
    theirs, _ = pair.in_class(XL.format(""))
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    theirs.save_config(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False
    ours = stable_diffusion.load(tmp_path)
    assert ours.generator.model.text.null is NullText.EMPTY
    compare(monkeypatch, theirs, small.sampled_as(ours, theirs, small.STEPS), negative=None)

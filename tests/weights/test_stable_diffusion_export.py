"""Stable Diffusion written as diffusers' folders: the same numbers there, here and after a round trip."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import small_stable_diffusion as small
from small_stable_diffusion import ONE_LEVEL

from jaxdiff.core import trees
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM, Heun
from jaxdiff.diffusion.schedules import CosineSchedule
from jaxdiff.models.conditioners import NullText
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.weights import stable_diffusion
from jaxdiff.weights.stable_diffusion_export import Layout, described, export, is_latent_diffusion

KINDS = {
    "2 inpainting": ("SD 2", "StableDiffusionInpaintPipeline", "DPM++ 2M Karras", 9),
    "upscaler": ("upscaler", "StableDiffusionUpscalePipeline", "DDIM", 7),
    "XL": ("SDXL", "StableDiffusionXLPipeline", "Euler", 4),
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name == "upscaler" else ()) for name in KINDS]
)
def case(request, tmp_path_factory):
    family, kind, sampler, channels = KINDS[request.param]
    change = ONE_LEVEL | {"in_channels": channels}
    return small.pair(tmp_path_factory.mktemp("theirs"), family, kind, sampler=sampler, **change)


def encoders(pipeline):
    return getattr(pipeline.text_encoder, "encoders", (pipeline.text_encoder,))


def assert_same(found, wanted):
    """All that a folder has, bit for bit."""
    assert found.generator.model == wanted.generator.model and found.generator.sampling == wanted.generator.sampling
    towers = zip(encoders(found), encoders(wanted), strict=True)
    assert all(one.fingerprint == other.fingerprint for one, other in towers)
    for one, other in ((found.generator, wanted.generator), (found.decoders[0], wanted.decoders[0])):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    for name in ("config", "scale", "upcast", "side"):
        assert getattr(found.decoders[0], name) == getattr(wanted.decoders[0], name), name


def test_round_trip(case, tmp_path):
    export(case.ours, tmp_path)
    assert_same(stable_diffusion.load(tmp_path), case.ours)


def test_read_by_diffusers(case, tmp_path):
    import torch

    export(case.ours, tmp_path)
    again = type(case.theirs).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    listed = {name: value for name, value in case.theirs.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in listed} == listed
    for name, network in case.theirs.components.items():
        if isinstance(network, torch.nn.Module):
            wanted, found = network.state_dict(), again.components[name].state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), name
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    if "Upscale" in type(again).__name__:
        arguments["image"] = (small.SMALL_IMAGES[:1] + 1) / 2
    else:
        arguments |= {"height": small.HEIGHT, "width": small.WIDTH}
    if "Inpaint" in type(again).__name__:
        arguments |= {"image": (small.IMAGE + 1) / 2, "mask_image": small.MASK.astype("f4")}
    images = []
    for pipeline in (case.theirs, again):
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(small.PROMPT, negative_prompt="!", generator=generator, **arguments).images)
    np.testing.assert_array_equal(*images)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return small.pair(tmp_path_factory.mktemp("theirs"), "SD 1", sampler="PLMS", **ONE_LEVEL).ours


def test_version_1(ours, tmp_path):
    export(ours, tmp_path)
    assert_same(stable_diffusion.load(tmp_path), ours)


def test_half_precision(ours, tmp_path):
    export(ours, tmp_path, dtype="float16")
    found = stable_diffusion.load(tmp_path).generator.params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float16(b)), found, ours.generator.params)


def changed(ours, **change):
    """The pipeline with other settings of its model, sampling, decoder or text encoder."""
    for name, value in change.items():
        model, sampling = ours.generator.model, ours.generator.sampling
        match name:
            case "conditioners" | "schedule" | "prediction":
                ours = replace(ours, generator=replace(ours.generator, model=replace(model, **{name: value})))
            case "text_encoder":
                ours = replace(ours, text_encoder=value)
            case _:
                ours = replace(ours, generator=replace(ours.generator, sampling=replace(sampling, **{name: value})))
    return ours


def test_refused_before_anything_is_written(ours, tmp_path):
    text, encoder = ours.generator.model.text, ours.text_encoder
    local = replace(ours.decoders[0], config=replace(ours.decoders[0].config, norm_groups=0))
    zero = replace(encoder, tokenizer=clip_tokenizer(Padding.ZERO))
    narrow = replace(ours.generator, params={"stem": {"kernel": np.zeros(3)}})
    cases = {
        "no sampler = Heun": changed(ours, sampler=Heun()),
        "no sampler = DDPM": changed(ours, sampler=DDPM(0.5)),
        "no schedule = CosineSchedule": changed(ours, schedule=CosineSchedule()),
        "no prediction = Prediction.X0": changed(ours, prediction=Prediction.X0),
        "no clean_known = True": changed(ours, clean_known=True),
        "no fresh_start = False": changed(ours, fresh_start=False),
        "reads no coordinates, mean of the text": changed(ours, conditioners=(replace(text, mean=True),)),
        "no null text NullText.ZEROS": changed(ours, conditioners=(replace(text, null=NullText.ZEROS),)),
        "no final_norm = False in the text_encoder": changed(ours, text_encoder=replace(encoder, final_norm=False)),
        "no skip_last = 1 in the text_encoder": changed(ours, text_encoder=replace(encoder, skip_last=1)),
        "no pads_with_a_word = True": changed(ours, text_encoder=zero),
        "not one text tower of CLIP": changed(ours, text_encoder=CombinedTextEncoder((encoder,), Axis.TOKENS)),
        "the U-Net to export": replace(ours, generator=narrow),
        "no layer norm: norm_groups = 0 is not": replace(ours, decoders=(local,)),
        "the CLIP to export": changed(ours, text_encoder=replace(encoder, params={"text": narrow.params})),
        "a latent diffusion model and an autoencoder": replace(ours, decoders=()),
    }
    for message, pipeline in cases.items():
        for layout in Layout:
            with pytest.raises(ValueError, match=message) as error:
                export(pipeline, tmp_path / "new", layout)
            assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_what_only_a_folder_expresses(ours, tmp_path):
    with pytest.raises(
        ValueError, match=r"no single file has a U-Net of 4 input channels, text of width 32 .* a folder"
    ):
        export(ours, tmp_path / "model.safetensors", Layout.SINGLE_FILE)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, not int8"):
        export(ours, tmp_path / "folder", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_folders_of_another_pipeline(ours, tmp_path):
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="holds text_encoder_2 of another pipeline"):
        export(ours, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder_2"]


def test_which_pipelines(ours):
    assert is_latent_diffusion(ours) and not is_latent_diffusion(Pipeline(ours.text_encoder, ours.generator))
    assert described(ours).index["_class_name"] == "StableDiffusionPipeline"
    assert len(trees.flatten(ours.generator.params)) > 50

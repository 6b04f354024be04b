"""Training on top of a Stable Diffusion by commands: all parameters, and LoRAs of its text encoders."""

import json

import jax
import numpy as np
import pytest
import small_stable_diffusion as small

from experiments import sample, train
from jaxdiff.core import trees
from jaxdiff.weights import latent_unet, pretrained
from jaxdiff.weights import lora as lora_files
from jaxdiff.weights.adapters import LoRAFile, LoRAs
from jaxdiff.weights.lora_names import Networks
from jaxdiff.weights.pretrained import LoadOptions

KINDS = {"SD 1": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline"}
FAMILIES = ["SD 1", pytest.param("SDXL", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Stable Diffusion of one level of each family, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("bases")
    for name, kind in KINDS.items():
        small.torch_pipeline(name, kind, **small.ONE_LEVEL).save_pretrained(folder / name)
    return folder


@pytest.fixture
def trained(folder, command):
    """Trains for two steps; returns the folder and what was printed."""

    def run(model, name, *arguments, out, code=0):
        data = "--data", "shapes", "--examples", 6, "--held-out", 2, "--data-dir", folder / "data", "--side", 64
        short = "--steps", 2, "--batch", 2, "--learning-rate", 1e-3, "--warmup", 0, "--evaluate-n", 2
        done = command(train, model, "--weights", folder / name, *data, *short, "--out", out, *arguments)
        assert done.code == code, done.err
        return done.err if code else done.out

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_all_parameters_are_trained(trained, folder, name, command, tmp_path):
    """The result is a pipeline in the base's layout: another U-Net, the same text encoder and autoencoder."""
    printed = trained("sd.finetune", name, out=tmp_path / "run")
    assert "a pipeline in diffusers' layout" in printed
    before, after = pretrained.load(folder / name), pretrained.load(tmp_path / "run" / "model")
    one, other = (trees.flatten(pipeline.generator.params) for pipeline in (before, after))
    changed = [key for key in one if not np.array_equal(one[key], other[key])]
    assert len(changed) > 0.9 * len(one)
    assert max(np.abs(np.asarray(one[key]) - np.asarray(other[key])).max() for key in one) < 0.02
    assert before.text_encoder.fingerprint == after.text_encoder.fingerprint
    assert before.generator.sampling == after.generator.sampling
    jax.tree.map(np.testing.assert_array_equal, before.decoders[0].params, after.decoders[0].params)
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses[-1]["held_out_loss"])


@pytest.mark.slow
def test_from_random_parameters(trained, folder, tmp_path):
    trained("sd.finetune", "SD 1", "--fresh", "--seed", 3, out=tmp_path / "run")
    before, after = pretrained.load(folder / "SD 1"), pretrained.load(tmp_path / "run" / "model")
    one, other = (trees.flatten(pipeline.generator.params) for pipeline in (before, after))
    kernels = [key for key in one if key.endswith("conv_1/kernel")]
    assert all(np.corrcoef(np.ravel(one[key]), np.ravel(other[key]))[0, 1] < 0.2 for key in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_of_the_text_encoders(trained, folder, name, command, tmp_path):
    """Its file has both; loaded, it changes the embeddings too. The base's files stay as they are."""
    trained("sd.lora", name, "--train-text", "--rank", 2, out=tmp_path / "run")
    file = tmp_path / "run" / "lora.safetensors"
    before = pretrained.load(folder / name)
    towers = getattr(before.text_encoder, "encoders", (before.text_encoder,))
    networks = Networks(latent_unet.network_of(before.generator.model), tuple(tower.config for tower in towers))
    loaded = lora_files.load(file, networks, strict=True)
    assert loaded.keys() == {"model", *("text", "text_2")[: len(towers)]}
    for tree in loaded.values():
        assert any(np.abs(leaf).max() > 0 for path, leaf in trees.flatten(tree).items() if path.endswith("up"))
    after = pretrained.load(folder / name, LoadOptions(loras=LoRAs((LoRAFile(file),), strict=True)))
    embedded = [pipeline.text_encoder.encode(["a red circle"]).tokens for pipeline in (before, after)]
    assert np.abs(embedded[0] - embedded[1]).max() > 1e-4
    done = command(
        sample, "a cat", "--weights", folder / name, "--lora", file, "--steps", 2, "--size", 64,
        "--out", tmp_path / "images",
    )  # fmt: skip
    assert done.code == 0, done.err


def test_what_cannot_be_trained(trained, folder, tmp_path):
    refused = trained("sd.finetune", "SD 1", "--text-dropout", 2, out=tmp_path / "run", code=2)
    assert "dropout 2" in refused and refused.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()

"""diffusers' pipeline of Karlo with the networks of `small_unclip`, fed with our noise, and what it sampled.

`karlo.npz` holds the embedded captions and the images of a run. With diffusers' pipeline installed,
`PYTHONPATH=tests:. python tests/small_karlo.py` writes it again.
"""

import itertools
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unclip
from safetensors.numpy import save_file
from small_stable_diffusion import to_torch, torch_text

from jaxdiff.diffusion import noise
from jaxdiff.text.clip_tokenizer import clip_tokenizer

FIXTURE = Path(__file__).parent / "karlo.npz"
STEPS = {"prior": 5, "decoder": 4, "super_res": 3}
SETTINGS = {
    "prior": {"prediction_type": "sample", "clip_sample_range": 5.0},
    "decoder": {"variance_type": "learned_range"},
    "super_res": {},
}
"""Of the public schedulers."""
PROMPTS = ["a red cat!", "two blue stars left of a green heart"]
LENGTH = 77


def keys():
    return noise.sample_keys(jax.random.key(0), jnp.arange(len(PROMPTS)))


@cache
def networks():
    """diffusers' small networks, with captions of 77 tokens."""
    torch, diffusers = small_unclip.torch_and_diffusers()
    prior = diffusers.PriorTransformer(**small_unclip.SMALL["prior"] | {"num_embeddings": LENGTH})
    drawn = small_unclip.tensors_of(small_unclip.shapes_of(prior))
    prior.load_state_dict({name: torch.tensor(value) for name, value in drawn.items()})
    return {
        "prior": prior.eval(),
        "text_proj": small_unclip.theirs("projection"),
        "decoder": small_unclip.theirs("decoder"),
        "super_res_first": small_unclip.theirs("upsampler"),
        "super_res_last": small_unclip.theirs("upsampler", seed=1),
    }


def pipeline():
    """diffusers' UnCLIPPipeline; the test is skipped without it."""
    _, diffusers = small_unclip.torch_and_diffusers()
    if not hasattr(diffusers, "UnCLIPPipeline"):
        pytest.skip("diffusers no longer has Karlo's pipeline")
    schedulers = {f"{name}_scheduler": diffusers.UnCLIPScheduler(**values) for name, values in SETTINGS.items()}
    width = small_unclip.EMBEDDING
    text = {"text_encoder": torch_text("quick_gelu", width, width), "tokenizer": clip_tokenizer()}
    found = diffusers.UnCLIPPipeline(**networks(), **schedulers, **text)
    found.set_progress_bar_config(disable=True)
    return found


def feed(monkeypatch, pipeline):
    """Makes diffusers' pipeline draw our noise: each box's own, at its start and in each step."""
    starts, steps = itertools.count(), itertools.count()
    runs = [(box, i) for box, count in enumerate(STEPS.values()) for i in range(count - 1)]  # the last step draws none

    def noise_of(keys, shape):
        if len(shape) == 2:
            import torch

            return torch.tensor(np.asarray(noise.normal_like(keys, tuple(shape[1:]))))
        return to_torch(noise.normal_like(keys, (*shape[2:], shape[1])))

    def start(shape, **_):
        return noise_of(noise.fold(noise.fold(keys(), next(starts)), 0), shape)

    def step(shape, **_):
        box, i = runs[next(steps)]
        return noise_of(noise.fold(noise.fold(noise.fold(keys(), box), 1), i), shape)

    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", start, raising=False)
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", step)


def images_of(pipeline):
    """What diffusers' pipeline samples, (b h w 3) in [0, 1]."""
    counts = {f"{name}_num_inference_steps": count for name, count in STEPS.items()}
    return pipeline(PROMPTS, output_type="np", **counts).images


def write(directory):
    """The folders of the networks and schedulers from the kept files alone, as diffusers writes them."""
    folders = {"text_proj": "projection", "decoder": "decoder", "super_res_first": "upsampler"}
    for folder, name in folders.items():
        small_unclip.write(name, directory / folder)
    small_unclip.write("upsampler", directory / "super_res_last", seed=1)
    small_unclip.write("prior", directory / "prior")
    settings, shapes, _ = small_unclip.kept("prior")
    shapes["positional_embedding"][1] += LENGTH - settings["num_embeddings"]
    save_file(small_unclip.tensors_of(shapes), directory / "prior" / small_unclip.FILE)
    (directory / "prior" / "config.json").write_text(json.dumps(settings | {"num_embeddings": LENGTH}))
    for name, values in SETTINGS.items():
        folder = directory / f"{name}_scheduler"
        folder.mkdir()
        (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "UnCLIPScheduler"} | values))


def kept():
    """The embedded captions, those without text first: pooled, tokens, mask; and the images."""
    with np.load(FIXTURE) as file:
        return {name: file[name].astype("f4") if name != "mask" else file[name] for name in file}


def make():
    theirs, monkeypatch = pipeline(), pytest.MonkeyPatch()
    pooled, tokens, mask = (
        value.detach().numpy() for value in theirs._encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    )
    tokens = np.where(mask[..., None], tokens, 0.0)
    feed(monkeypatch, theirs)
    return {"pooled": pooled, "tokens": tokens, "mask": mask, "images": images_of(theirs).astype("f2")}


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **make())

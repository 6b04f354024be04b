"""DeepFloyd IF against diffusers: the folders of its stages, in order.

    text encoder   the prompts, cleaned as in IF's training, and the negative prompt
    stage I, II    the U-Net in both branches of guidance at five noise levels
    pipeline       the images of a few steps of every stage, each implementation with its own text and lower stages

The U-Nets read the same arrays, so that an error is that of the network alone. Super-resolution reads jaxdiff's image
with the same noise. Both pipelines add the same noise at each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.verifications import networks
from experiments.verifications.inputs import Inputs, entries
from experiments.verifications.libraries import Libraries, freed, noise_from, to_images, to_numpy
from experiments.verifications.networks import Texts
from experiments.verifications.rows import Row, arrays, images
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.models.conditioner import SampleInputs
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.weights import deepfloyd_pipeline, hub

FOLDERS = ("unet", "text_encoder")
"""Of stage I; the others need only the first."""
NUMERALS = ("I", "II", "III")


class _Stage(NamedTuple):
    """What jaxdiff computed with a stage. trained: without its parameters. given: the network's input beside x, in both
    branches."""

    number: int
    trained: TrainedModel
    given: Conditioning
    x: np.ndarray
    outputs: list[np.ndarray]
    image: np.ndarray

    @property
    def name(self) -> str:
        return f"stage {NUMERALS[self.number]}"


def compare(places: Sequence[str | Path], inputs: Inputs, libraries: Libraries) -> Iterator[Row]:
    """The rows of a cascade. ValueError for an unsupported stage or size."""
    folders = [
        hub.directory_of(place, "DeepFloyd IF", folders=FOLDERS[: 1 if number else 2], variant=inputs.variant)
        for number, place in enumerate(places)
    ]
    if len(folders) > len(NUMERALS):
        raise ValueError(f"{len(folders)} stages of DeepFloyd IF: there are at most {len(NUMERALS)}")
    texts = freed(_our_texts, folders[0], inputs)
    prompts, negative = freed(_their_texts, folders[0], inputs, libraries)
    yield arrays("text encoder", "prompt", texts.prompts.tokens, to_numpy(prompts), inputs.limits)
    yield arrays("text encoder", "negative prompt", texts.negative.tokens, to_numpy(negative), inputs.limits)
    ours = theirs = None
    for number, folder in enumerate(folders):
        stage = freed(_ours, folder, inputs, texts, number, ours)
        outputs, theirs = freed(_theirs, folder, inputs, libraries, stage, (prompts, negative), theirs)
        for entry, a, b in zip(entries(stage.trained.model.schedule), stage.outputs, outputs):
            yield arrays(stage.name, f"step {entry}", a, b, inputs.limits)
        ours = stage.image
        yield images("pipeline", f"{stage.name}, {inputs.steps} steps", ours, to_images(theirs), inputs.limits)


def _our_texts(folder: Path, inputs: Inputs) -> Texts:
    encoder = deepfloyd_pipeline.load_text_encoder(folder, inputs.dtype, variant=inputs.variant)
    return networks.embedded(encoder, inputs)


def _their_texts(folder: Path, inputs: Inputs, libraries: Libraries) -> tuple[Any, Any]:
    transformers = libraries.transformers
    encoder = libraries.loaded(transformers.T5EncoderModel, folder / "text_encoder", inputs.variant)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    pipeline = _pipeline(libraries, "IFPipeline", text_encoder=encoder, tokenizer=tokenizer)
    with libraries.torch.inference_mode():
        negative = [inputs.negative] * len(inputs.prompts)
        return pipeline.encode_prompt(list(inputs.prompts), negative_prompt=negative, clean_caption=True)


def _ours(folder: Path, inputs: Inputs, texts: Texts, number: int, lower: np.ndarray | None) -> _Stage:
    trained = deepfloyd_pipeline.load_stage(folder, inputs.dtype, variant=inputs.variant)
    if (lower is None) != (trained.model.low_res is None):
        raise ValueError(f"{folder}: name stage I first, then the stages that enlarge its images")
    sampling = replace(trained.sampling, steps=inputs.steps)
    if isinstance(sampling.spacing, Respaced):
        sampling = replace(sampling, spacing=Respaced((inputs.steps,)))
    trained, keys = replace(trained, sampling=sampling), inputs.keys(number)
    size = _size(trained, inputs, lower)
    text, negative = texts.of(trained, inputs)
    x = inputs.start(number, size, 3)
    low_res = None if lower is None else jnp.asarray(lower)
    given = SampleInputs(text, negative, low_res, sampling.aug_level)
    given = networks.conditioning(trained.model, given, keys, size)
    outputs = networks.outputs(trained, x, given)
    image = np.asarray(trained.decode(low_res, SampleRequest(keys, size, text, negative)))
    return _Stage(number, replace(trained, params={}), given, np.asarray(x), outputs, image)


def _size(trained: TrainedModel, inputs: Inputs, lower: np.ndarray | None) -> tuple[int, int]:
    """Height and width of a stage's images. ValueError if the network cannot sample them."""
    if lower is not None:
        size = tuple(side * trained.factor for side in lower.shape[1:3])
    else:
        size = inputs.size or (trained.side, trained.side)
    trained.check(size)
    return size


def _theirs(
    folder: Path, inputs: Inputs, libraries: Libraries, ours: _Stage, texts: tuple[Any, Any], lower: Any
) -> tuple[list[np.ndarray], Any]:
    """The network's outputs, and the image of their pipeline from their lower image (b c h w), clipped."""
    diffusers = libraries.diffusers
    unet = libraries.loaded(diffusers.UNet2DConditionModel, folder / "unet", inputs.variant)
    components = {"unet": unet, "scheduler": _scheduler(diffusers, folder / "scheduler")}
    size, draws = ours.x.shape[1:3], [ours.x]
    arguments: dict[str, Any] = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "output_type": "pt"}
    if lower is not None:
        noising = folder / "image_noising_scheduler"
        components["image_noising_scheduler"] = _scheduler(diffusers, noising)
        draws.append(np.asarray(inputs.on_low_res(ours.number, size, 3)))
        arguments |= {"image": lower, "noise_level": round(1000 * ours.trained.sampling.aug_level)}
    kind = "IFPipeline" if lower is None else "IFSuperResolutionPipeline"
    pipeline = _pipeline(libraries, kind, **components)
    arguments |= {"guidance_scale": ours.trained.sampling.guidance.weight, "height": size[0], "width": size[1]}
    spacing = ours.trained.sampling.spacing
    if isinstance(spacing, Respaced):
        arguments["timesteps"] = spacing.entries(ours.trained.model.schedule.steps)[::-1]
    else:
        arguments["num_inference_steps"] = inputs.steps
    steps = inputs.of_steps(ours.number, size, 3)
    with libraries.torch.inference_mode(), noise_from(libraries, {pipeline: iter(draws), pipeline.scheduler: steps}):
        return _their_outputs(unet, libraries, ours), pipeline(**arguments).images.clamp(-1, 1)


def _their_outputs(unet: Any, libraries: Libraries, ours: _Stage) -> list[np.ndarray]:
    given, x = ours.given, np.concatenate([ours.x, ours.x])
    arguments = {"encoder_hidden_states": libraries.tensor(given.tokens)}
    if given.concat is not None:
        x = np.concatenate([x, given.concat], -1)
        arguments["class_labels"] = libraries.tensor(np.round(1000 * np.asarray(given.aug_level)).astype(np.int64))
    x = libraries.images(x)
    return [to_images(unet(x, entry, **arguments).sample) for entry in entries(ours.trained.model.schedule)]


def _scheduler(diffusers: Any, folder: Path) -> Any:
    settings = hub.read_json(folder / "scheduler_config.json", "scheduler")
    return getattr(diffusers, settings["_class_name"]).from_config(settings)


def _pipeline(libraries: Libraries, kind: str, **components: Any) -> Any:
    names = ["text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor", "watermarker"]
    names += ["image_noising_scheduler"] * (kind == "IFSuperResolutionPipeline")
    made = getattr(libraries.diffusers, kind)
    pipeline = made(**dict.fromkeys(names) | components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

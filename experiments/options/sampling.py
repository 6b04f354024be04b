"""Sampling settings of commands: one value for all stages, or one per stage."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.options import names
from jaxdiff.core.products import LatentSpec, TokenSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.models.autoregressive import TrainedAutoregressive
from jaxdiff.models.boxes import Decoder, Generator
from jaxdiff.models.diffusion import executed
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.systems.pipeline import Pipeline, models_of, with_boxes, with_models
from jaxdiff.training.mesh import BATCH_AXES, make_mesh, parse

FEWEST = {DDPM: 32, DDIM: 16, DPMSolverPP2M: 8, Heun: 8, Euler: 16}
"""Number of steps below which a sampler's images are blurred or noisy, for any model."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Sampling settings: one value for all stages, or one per stage, separated by commas. An omitted or empty value
    (`50,,`) keeps the stage's own setting."""

    sampler: str = ""
    """ddpm | ddim | dpmpp | heun | euler; of latent diffusion ddim | plms | euler | euler-a | dpmpp-2m |
    dpmpp-2m-karras, each with the timesteps of diffusers."""
    steps: str = ""
    """Steps of the sampler."""
    respacing: str = ""
    """Subset of DeepFloyd IF's 1000 steps: fast27 | smart27 | smart50 | smart100 | smart185 | super27 | super40 |
    super100 | even | leading (the last two use --steps)."""
    eta: float | None = None
    """Randomness of ddim, 0 (none) to 1."""
    guidance: str = ""
    """Guidance weight; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Apply guidance only between these log-SNRs."""
    guidance_rescale: float | None = None
    """Rescale the guided prediction towards the standard deviation of the unguided one, 0 (off) to 1."""
    thresholding: str = ""
    """static | dynamic | none"""
    percentile: float | None = None
    """Percentile of dynamic thresholding, as a fraction (0.995)."""
    cap: float | None = None
    """Maximum scale of dynamic thresholding; 1 makes it static."""
    aug_level: str = ""
    """Noise level on the input of super-resolution, 0 to 1."""
    temperature: float | None = None
    """Of models that sample tokens: divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities reach this sum; 1: from all."""
    tile: int | None = None
    """Side in pixels of overlapping super-resolution tiles; default: no tiles."""
    tile_overlap: int = 32
    """Overlap of neighbouring tiles, in pixels."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type of the generators; use bfloat16 on accelerators. DeepFloyd IF's parameters and T5 are also loaded in
    it."""
    mesh: str = ""
    """Devices of this machine: data=-1 distributes images over all of them; data=2,tensor=4 also splits each
    super-resolution image by rows over four. Parameters are replicated. Default: one device."""


def with_samplings(pipeline: Pipeline, options: SamplingOptions) -> Pipeline:
    """The pipeline with the sampling settings of the command line. ValueError naming the bad option."""
    if dataclasses.replace(options, dtype=None, mesh="") == SamplingOptions():
        return pipeline
    if isinstance(pipeline.generator, TrainedAutoregressive):
        sampling = token_sampling(pipeline.generator.sampling, options)
        return dataclasses.replace(pipeline, generator=dataclasses.replace(pipeline.generator, sampling=sampling))
    if isinstance(pipeline.generator, TrainedPriorCodes):
        pipeline, options = _with_token_sampling(pipeline, pipeline.generator, options)
    if given := [name for name in TOKENS if getattr(options, name) is not None]:
        raise ValueError(f"{flags(given)}: only for models that sample tokens")
    models = models_of(pipeline)
    chosen = samplings(models, options)
    return with_models(pipeline, [dataclasses.replace(each, sampling=new) for each, new in zip(models, chosen)])


def _with_token_sampling(
    pipeline: Pipeline, prior: TrainedPriorCodes, options: SamplingOptions
) -> tuple[Pipeline, SamplingOptions]:
    """The pipeline whose prior has the settings of tokens, and the others, which are those of its decoders."""
    own = SamplingOptions(**{name: getattr(options, name) for name in TOKENS})
    transformer = dataclasses.replace(prior.transformer, sampling=token_sampling(prior.sampling, own))
    rest = dataclasses.replace(options, **dict.fromkeys(TOKENS))
    return dataclasses.replace(pipeline, generator=dataclasses.replace(prior, transformer=transformer)), rest


TOKENS = ("temperature", "top_k", "top_p")
"""Settings of models that sample tokens alone."""


def token_sampling(sampling: TokenSampling, options: SamplingOptions) -> TokenSampling:
    """The settings of a model that samples tokens, overridden by the command line. ValueError naming the bad option."""
    shared = {*TOKENS, "guidance", "dtype", "mesh"}
    if other := [
        field.name
        for field in dataclasses.fields(options)
        if field.name not in shared and getattr(options, field.name) != field.default
    ]:
        raise ValueError(f"{flags(other)}: this model samples tokens, and has no such setting")
    given = {name: value for name in TOKENS if (value := getattr(options, name)) is not None}
    (weight,) = each("guidance", options.guidance, 1, _guidance_weight)
    try:
        return dataclasses.replace(sampling, **given, **({} if weight is None else {"guidance": weight}))
    except ValueError as error:
        raise ValueError(f"{flags(list(given))}: {error}") from error


def flags(names: Sequence[str]) -> str:
    """The flags of these fields."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def box_of(pipeline: Pipeline, side: int | None) -> int | None:
    """Index of the box that produces images of this side; None for None."""
    if side is None:
        return None
    if side not in pipeline.sides:
        raise ValueError(f"no stage samples {side} pixels; this cascade samples {', '.join(map(str, pipeline.sides))}")
    return pipeline.sides.index(side)


def mesh_of(text: str) -> Mesh | None:
    """The mesh of --mesh; None if empty. ValueError for an impossible one, before weights are read."""
    if not text:
        return None
    shape = parse(text).over(jax.device_count())
    if shape.fsdp != 1:
        raise ValueError(
            f"--mesh {text}: each device has all parameters when sampling, so that only data and tensor remain"
        )
    return make_mesh(*shape.sizes)


@contextmanager
def spread(pipeline: Pipeline, mesh: Mesh | None) -> Iterator[Pipeline]:
    """Place the pipeline on a mesh and enter the mesh; unchanged if `mesh` is None."""
    if mesh is None:
        yield pipeline
        return

    with jax.set_mesh(mesh):
        yield with_boxes(pipeline, [_placed(box, mesh) for box in pipeline.boxes])


def _placed(box: Generator | Decoder, mesh: Mesh) -> Generator | Decoder:
    """The box with its parameters on all devices, which share its batches. Others than models of diffusion and of
    codes are unchanged: their parameters follow their inputs."""
    if isinstance(box, TrainedPriorCodes):
        transformer = _placed(box.transformer, mesh)
        assert isinstance(transformer, TrainedAutoregressive)
        return dataclasses.replace(box, transformer=transformer)
    if not isinstance(box, TrainedModel | TrainedAutoregressive):
        return box
    params = jax.device_put(box.params, NamedSharding(mesh, PartitionSpec()))
    if isinstance(box, TrainedAutoregressive):
        return dataclasses.replace(box, params=params, sharding=ActivationSharding(BATCH_AXES))
    rows = ("tensor",) if box.model.low_res is not None else ()
    model = executed(box.model, sharding=ActivationSharding(BATCH_AXES, rows))
    return dataclasses.replace(box, model=model, params=params)


def warn_of_few_steps(before: Pipeline, after: Pipeline) -> None:
    """Warn if the command line sets too few steps. The weights' own number of steps never warns."""
    for old, new in zip(before.boxes, after.boxes):
        if isinstance(old, TrainedModel) and isinstance(new, TrainedModel):
            name, steps = type(new.sampling.sampler), new.sampling.steps
            fewest = min(FEWEST.get(name, 1), old.sampling.steps)
            if steps < fewest:
                line = f"--steps {steps}: {name.__name__} needs {fewest} or more for clear images"
                warnings.warn(line, stacklevel=2)


def samplings(models: Sequence[TrainedModel], options: SamplingOptions) -> tuple[SamplingConfig, ...]:
    """Each stage's sampling settings, overridden by the command line. ValueError naming the bad option."""
    chosen = {
        "sampler": each("sampler", options.sampler, len(models), str),
        "steps": each("steps", options.steps, len(models), int),
        "spacing": each("respacing", options.respacing, len(models), names.respacing),
        "guidance": each("guidance", options.guidance, len(models), _guidance_weight),
        "thresholding": each("thresholding", options.thresholding, len(models), names.thresholding),
        "aug_level": each("aug-level", options.aug_level, len(models), float),
    }
    changed = []
    for number, model in enumerate(models):
        given = {name: values[number] for name, values in chosen.items() if values[number] is not None}
        given = _sampler(model, given) | given
        given |= _spaced(model.sampling, given)
        given |= _learned(model, given)
        given["guidance"] = _guidance(model.sampling.guidance, given.get("guidance"), options)
        if options.tile is not None and model.model.low_res is not None:
            given["tiles"] = Tiles(options.tile, options.tile_overlap)
        sampling = _dynamic(_random(dataclasses.replace(model.sampling, **given), options), options)
        changed.append(sampling)
    if options.eta is not None and not any(isinstance(s.sampler, DDIM) for s in changed):
        raise ValueError("--eta is for the sampler ddim, and no stage uses it here")
    if (options.percentile, options.cap) != (None, None) and not any(
        isinstance(s.thresholding, DynamicThreshold) for s in changed
    ):
        raise ValueError("--percentile and --cap are for dynamic thresholding, and no stage uses it here")
    return tuple(changed)


def each(name: str, text: str, stages: int, convert: Callable[[str], Any]) -> list[Any]:
    """One value per stage, None if omitted. ValueError naming the option."""
    values = [value.strip() for value in text.split(",")]
    if len(values) not in (1, stages):
        raise ValueError(f"--{name} {text}: {len(values)} values for {stages} stages; give one, or one for each")
    try:
        converted = [convert(value) if value else None for value in values]
    except ValueError as error:
        raise ValueError(f"--{name} {text}: {error}") from error
    return converted * stages if len(converted) == 1 else converted


def _guidance_weight(text: str) -> float:
    weight = float(text)
    if weight < 0:
        raise ValueError("a weight below 0 leads away from the caption; use --negative, or 1 for no guidance")
    return weight


def _guidance(guidance: Guidance, weight: float | None, options: SamplingOptions) -> Guidance:
    given = {"weight": weight, "interval": options.guidance_interval, "rescale": options.guidance_rescale}
    return dataclasses.replace(guidance, **{name: value for name, value in given.items() if value is not None})


def _sampler(model: TrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that a sampler's name sets; the name is removed from `given`. ValueError for an unknown name."""
    name = given.pop("sampler", None)
    if name is None:
        return {}
    try:
        if not isinstance(model.model.product, LatentSpec):
            return {"sampler": names.sampler(name)}
        return names.solver(name).of(model.model.prediction)._asdict()
    except ValueError as error:
        raise ValueError(f"--sampler {name}: {error}") from error


def _spaced(sampling: SamplingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Consistent steps and spacing: a respacing sets the number of steps; another --steps takes them evenly."""
    spacing, steps = given.get("spacing", sampling.spacing), given.get("steps")
    if not isinstance(spacing, Respaced) or steps == spacing.steps or (steps is not None and steps < 1):
        return {}
    if "spacing" in given and spacing.counts != (1,):
        if steps is not None:
            raise ValueError(f"--respacing of {spacing.steps} steps and --steps {steps}: leave one of them out")
        return {"steps": spacing.steps}
    steps = sampling.steps if steps is None else steps
    return {"steps": steps, "spacing": Respaced((steps,))}


def _learned(model: TrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """DDPM with the learned variance, if the network predicts it."""
    if not isinstance(given.get("sampler"), DDPM) or not model.model.unet.learned_variance:
        return {}
    return {"sampler": DDPM(None)}


def _random(sampling: SamplingConfig, options: SamplingOptions) -> SamplingConfig:
    """Set eta if the sampler is DDIM."""
    if options.eta is None or not isinstance(sampling.sampler, DDIM):
        return sampling
    return dataclasses.replace(sampling, sampler=dataclasses.replace(sampling.sampler, eta=options.eta))


def _dynamic(sampling: SamplingConfig, options: SamplingOptions) -> SamplingConfig:
    """Set percentile and cap if the thresholding is dynamic."""
    given = {"percentile": options.percentile, "cap": options.cap}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or not isinstance(sampling.thresholding, DynamicThreshold):
        return sampling
    return dataclasses.replace(sampling, thresholding=dataclasses.replace(sampling.thresholding, **given))


def size_of(text: str, pipeline: Pipeline) -> tuple[int, int] | None:
    """The size of the generator's product for `SIDE` or `HEIGHTxWIDTH`, in pixels of its image; None if empty."""
    size, pixels = sides_of(text), pixels_of(pipeline)
    if size is None or pixels == 1:
        return size
    if any(side % pixels for side in size):
        raise ValueError(f"--size {text}: not a multiple of {pixels} pixels, which one latent represents")
    return size[0] // pixels, size[1] // pixels


def pixels_of(pipeline: Pipeline) -> int:
    """Pixels along each axis that a value of the generator's product represents: 1 for images."""
    product = pipeline.generator.produces
    return product.stride if isinstance(product, LatentSpec | TokenSpec) else 1


def unit_of(pipeline: Pipeline) -> int:
    """What the sides of the generator's product are multiples of."""
    generator = pipeline.generator
    return generator.model.unet.stride if isinstance(generator, TrainedModel) else generator.produces.stride


def sides_of(text: str) -> tuple[int, int] | None:
    """Parse `SIDE` or `HEIGHTxWIDTH`; None if empty."""
    if not text:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError as error:
        raise ValueError(f"--size {text}: not of the form SIDE or HEIGHTxWIDTH") from error
    return height, width

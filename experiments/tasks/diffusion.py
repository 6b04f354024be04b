"""Training a stage of Imagen: a diffusion model of images, from text or from a smaller image.

    python -m experiments.train imagen.base64 --data shapes --text runs/t5/encoder --out runs/base64
    python -m experiments.train imagen.sr256 --data shapes --out runs/sr256
    python -m experiments.train imagen.sr1024 --data shapes --examples 2000 --init runs/sr256 --out runs/sr1024

OUT also gets samples/ (a grid every --sample-every steps). The shipped models' costs are in
jaxdiff/weights/tiny/README.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.options.training import ComputeOptions, PresetOptimizer, Rule, TrainSettings
from experiments.tasks.held_out import held_out_source
from experiments.tasks.initial import initial, warn_of_other_text
from experiments.tasks.noise_levels import NoiseLevels
from experiments.tasks.samples import Samples
from experiments.tasks.spaces import Pixels, Space, crop_of
from experiments.tasks.task import Inference, Start, Task, Work
from experiments.tasks.text_embeddings import TextOptions, find, stored
from jaxdiff.core.files import usable
from jaxdiff.core.products import LatentSpec
from jaxdiff.data import sources
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import Batches
from jaxdiff.diffusion import noise
from jaxdiff.models.conditioners import AnyConditioner, LowResConditioner, NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel, check_crop, executed
from jaxdiff.models.hints import HintImage
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.execution import Remat
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.nets.unet import EfficientUNetConfig
from jaxdiff.text.encoder import TextEmbedding, TextEncoder
from jaxdiff.training import multihost
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.distributed import check_shared, once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon
from jaxdiff.training.param_sharding import ParamSharding
from jaxdiff.training.param_sharding import Rule as ShardingRule
from jaxdiff.training.state import Params, abstract_state
from jaxdiff.weights.runs import TextSource, save_text_source
from jaxdiff.weights.stages import save_model, save_settings


@dataclass(frozen=True)
class DiffusionOptions:
    """Training settings of a stage; defaults are the preset's."""

    crop: int | None = None
    """Side of super-resolution's training crops in pixels; 0: full images; default: a quarter of the image."""
    buckets: bool = False
    """Aspect-ratio buckets instead of centre crops: each batch has one of a few heights and widths with about the same
    number of pixels. One program is compiled per bucket."""
    logsnr: tuple[float, float] | None = None
    """Train at log-SNRs uniform in this range. If images are sharp but do not follow their captions, training at the
    noise levels that decide it is faster: -5.5 to 0 for shapes at 64 pixels."""
    logsnr_fraction: float | None = None
    """Fraction of the training in that range; the rest follows the model's own schedule. Default: 1, or the preset's
    for the preset's range."""
    snr_power: float | None = None
    """Weight the x0 error by SNR to this power (0: equal weights at all noise levels); default: the preset's."""
    text_dropout: float | None = None
    """Fraction of captions to drop; guidance needs it above 0."""
    max_aug_level: float | None = None
    """Maximum noise level on the input of super-resolution."""

    def levels(self, preset: NoiseLevels) -> NoiseLevels:
        """The preset's noise levels with the changes of the command line."""
        fraction = self.logsnr_fraction
        if fraction is None:
            fraction = preset.fraction if self.logsnr is None else 1.0
        power = preset.snr_power if self.snr_power is None else self.snr_power
        return NoiseLevels(self.logsnr or preset.logsnr, fraction, power)


@dataclass(frozen=True)
class UNetCompute(ComputeOptions):
    """Compute settings of a U-Net."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer stay float32. Use bfloat16 on accelerators."""
    remat: Remat = "none"
    """Recomputed in the backward pass to save memory: none | outputs (norms, activations, attention) | blocks (all)."""
    scan: bool = False
    """Run consecutive equal blocks as one loop, which compiles faster (Efficient U-Nets)."""
    rows: bool = False
    """Split the rows of images over the mesh's tensor axis, instead of layers: for full images of 1024 pixels."""


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train one stage of Imagen."""

    text_encoder: TextOptions = TextOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    compute: UNetCompute = UNetCompute()


@dataclass(frozen=True)
class Preset:
    """A model, its sampling settings, and its training defaults.

    reads: length and width of the text embeddings for planning and benchmarks; training uses the text encoder's.
    optimizer, levels: defaults of the command line.
    """

    model: DiffusionModel
    sampling: SamplingConfig
    reads: tuple[int, int]
    optimizer: PresetOptimizer = PresetOptimizer("adam", 1e-4)
    levels: NoiseLevels = NoiseLevels()


def sampling_step(model: DiffusionModel, sampling: SamplingConfig, count: int) -> Inference:
    """One sampling step of full images, with both branches of guidance."""
    sampling, side = dataclasses.replace(sampling, steps=1), model.side
    keys = jax.eval_shape(lambda: noise.sample_keys(jax.random.key(0), jnp.arange(count)))
    batch = model.batch_spec(count, side)
    text = None
    if "text" in batch:
        pooled = batch["text_pooled"].update(dtype=jnp.float32) if "text_pooled" in batch else None
        text = TextEmbedding(batch["text"].update(dtype=jnp.float32), batch["text_mask"], pooled)

    def step(params, text, negative, keys, low_res, hint, given):
        hints = () if hint is None else (HintImage(hint),)
        request = SampleRequest(keys, (side, side), text, negative, hints=hints, given=given)
        return TrainedModel(model, params, sampling).decode(low_res, request)

    given = {each.entry: batch[each.entry] for each in model.representations}
    return Inference(step, (text, text, keys, batch.get("low_res"), batch.get("hint"), given))


@dataclass(frozen=True)
class DiffusionTask(Task):
    """A stage of Imagen."""

    takes_init: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(b2=0.99), "adafactor": Adafactor(), "muon": Muon()}
    presets: dict[str, Preset] = dataclasses.field(default_factory=dict)
    settings: Settings = Settings()

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        return settings.config(self.rules, name, self.unit, self.preset(settings.preset).optimizer)

    def model(self, preset: str, compute: UNetCompute) -> DiffusionModel:
        chosen = self.preset(preset)
        return split(executed(chosen.model.reading(*chosen.reads), dtype=compute.dtype), compute)

    def side(self, model: DiffusionModel, crop: int | None) -> int:
        side = crop_of(model, crop) or model.side
        check_crop(model, side)
        return side

    def placement(self, model: DiffusionModel, compute: UNetCompute) -> ParamSharding:
        return placement(model, compute)

    def on_one_device(self, model: DiffusionModel) -> DiffusionModel:
        return executed(model, sharding=ActivationSharding())

    def inference(self, preset: str, model: DiffusionModel, count: int) -> Inference:
        return sampling_step(model, self.preset(preset).sampling, count)

    def resized(self, model: DiffusionModel, side: int) -> DiffusionModel:
        return resized(model, side)

    def space(self, settings: Settings, model: DiffusionModel) -> Space:
        """What the model is trained in."""
        return Pixels(model)

    def text_of(
        self, settings: Settings, model: DiffusionModel, space: Space
    ) -> tuple[TextEncoder | None, Embeddings | None]:
        """The text encoder, if it is named or needed, and stored embeddings, if they are named."""
        return find(settings.text_encoder, settings.dataset, self.preset(settings.preset), model)

    def text_source(self, settings: Settings, embeddings: Embeddings) -> TextSource | None:
        """Where the run's text encoder is; None if it is unknown."""
        options = settings.text_encoder
        if options.text is None and options.embeddings is not None:
            return None
        return TextSource(options.source, embeddings.length, options.text_dtype, embeddings.encoder)

    def samples(
        self, space: Space, trained: TrainedModel, source: Source, embeddings: Embeddings | None, folder: Path
    ) -> Callable[[int, Params, Any], None] | None:
        """The sample hook."""
        return Samples(trained, source, embeddings, folder, space.decode)

    def prepare(self, settings: Settings, start: Start) -> Work:
        space = self.space(settings, self.trained_model(settings))
        preset, model = self.preset(settings.preset), space.model
        spec = settings.dataset.spec()
        encoder, embeddings = self.text_of(settings, model, space)
        text = embeddings or encoder
        model = model.reading(*(preset.reads if text is None else (text.length, text.width)))
        if model.text is not None:  # embeddings are stored without padding: the empty caption has no tokens
            unpadded = dataclasses.replace(model.text, null=NullText.ZEROS)
            conditioners = tuple(unpadded if each is model.text else each for each in model.conditioners)
            model = dataclasses.replace(model, conditioners=conditioners)
        initial = self._initial(settings, model, start.mesh, text)
        if start.processes > 1 or settings.out.is_file():
            check_shared(usable(settings.out))
        data_dir = settings.dataset.data_dir
        dataset = once(data_dir, lambda: sources.open(spec, space.side, "train", data_dir))
        limit = settings.dataset.limit
        source = spread(dataset, limit) if limit else dataset
        if encoder is not None and embeddings is None:
            embeddings = once(data_dir, lambda: stored(settings.dataset, source, len(dataset), encoder))
        held_out = held_out_batches(settings, space, encoder, text=text is not None)
        del encoder  # the stored embeddings suffice; T5-XXL would take 19 GB during training
        stream = space.batches(settings, source, embeddings)
        if stream.buckets is not None and multihost.index() == 0:
            print(stream.buckets)
        # Compute settings of training are not part of the model.
        plain = executed(model, dtype="float32")
        fingerprint = None if embeddings is None else embeddings.encoder
        folder = settings.out / "model"

        def begin() -> None:
            save_settings(TrainedModel(plain, {}, preset.sampling, fingerprint), folder)
            space.record(settings.out)
            location = None if embeddings is None else self.text_source(settings, embeddings)
            if location is not None:
                save_text_source(settings.out, location)

        def finish(params: Params, extra: Any) -> str:
            save_model(TrainedModel(plain, params, preset.sampling, fingerprint), folder)
            lines = [f"{folder}: the averaged parameters of step {settings.run.steps}"]
            if summary := stream.skipped.summary(len(source)):
                shard = f" (in the shard of process 0 of {start.processes})" if start.processes > 1 else ""
                lines.insert(0, f"{summary}{shard}")
            return "\n".join(lines)

        return Work(
            space.trainable(split(model, settings.compute)),
            stream,
            data=space.data | data_of(settings, model, stream, (len(source), len(dataset)), embeddings),
            frozen=space.frozen,
            initial=initial,
            begin=begin,
            finish=finish,
            placement=self.placement(model, settings.compute),
            sample_hook=self.samples(
                space, TrainedModel(model, {}, preset.sampling), source, embeddings, settings.out / "samples"
            ),
            held_out=held_out,
        )

    def trained_model(self, settings: Settings) -> DiffusionModel:
        """The preset with the changes of the command line."""
        preset = self.preset(settings.preset)
        model, options = executed(preset.model, dtype=settings.compute.dtype), settings.diffusion
        for option, conditioner, lacks in (
            ("text_dropout", model.text, "reads no text"),
            ("max_aug_level", model.low_res, "is no super-resolution"),
        ):
            if getattr(options, option) is not None and conditioner is None:
                flag = f"--{option.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(options, option)}: --preset {settings.preset} {lacks}")
        conditioners = tuple(_conditioner(each, options) for each in model.conditioners)
        model = options.levels(preset.levels).applied(dataclasses.replace(model, conditioners=conditioners))
        if crop := crop_of(model, options.crop):
            check_crop(model, crop)
        return model

    def _initial(
        self, settings: Settings, model: DiffusionModel, mesh: Mesh, text: Embeddings | TextEncoder | None
    ) -> dict | None:
        if settings.run.init is None or settings.resumes:
            return None
        if text is not None:
            fingerprint = text.encoder if isinstance(text, Embeddings) else text.fingerprint
            warn_of_other_text(settings.run.init, fingerprint)
        shardings = abstract_state(model, self.config(settings, "").optimizer, mesh).ema
        return initial(settings.run.init, model, shardings)


def resized(model: DiffusionModel, side: int) -> DiffusionModel:
    """The model for images of this side in pixels. ValueError if it is not a multiple of the stride."""
    pixels = model.product.stride if isinstance(model.product, LatentSpec) else 1
    if side % (pixels * model.unet.stride):
        raise ValueError(f"--side {side}: not a multiple of {pixels * model.unet.stride}")
    return dataclasses.replace(model, side=side // pixels)


def placement(model: DiffusionModel, compute: UNetCompute) -> ParamSharding:
    """Layers are sharded over the tensor axis, unless it splits the rows of images."""
    rules = () if compute.rows else (ShardingRule(*rule) for rule in model.unet.tensor_rules())
    return ParamSharding(tuple(rules))


def split(model: DiffusionModel, compute: UNetCompute) -> DiffusionModel:
    """The model computed over a mesh. ValueError for --scan if no blocks are equal."""
    equal: tuple[int, ...] = (0,)
    if isinstance(model.unet, EfficientUNetConfig):
        equal = model.unet.blocks
    elif isinstance(model.unet, LatentUNetConfig):
        equal = (*model.unet.transformer_layers, model.unet.middle_layers)
    if compute.scan and max(equal) < 2:
        raise ValueError("--scan: this network has no equal blocks in a row")
    axes = ActivationSharding(BATCH_AXES, ("tensor",) if compute.rows else ())
    return executed(model, remat=compute.remat, scan=compute.scan, sharding=axes)


def _conditioner(conditioner: AnyConditioner, options: DiffusionOptions) -> AnyConditioner:
    """The conditioner with the changes of the command line."""
    changed = {}
    if isinstance(conditioner, TextConditioner):
        changed = {"dropout": options.text_dropout}
    elif isinstance(conditioner, LowResConditioner):
        changed = {"max_level": options.max_aug_level}
    return dataclasses.replace(conditioner, **{name: value for name, value in changed.items() if value is not None})


def held_out_batches(
    settings: Settings, space: Space, encoder: TextEncoder | None, text: bool
) -> HeldOutBatches | None:
    """Fixed held-out examples; None if the dataset has none, or if the model reads `text` and there is no encoder."""
    source = held_out_source(settings, space.side)
    if source is None:
        return None
    if encoder is None and text:
        if multihost.index() == 0:
            print("no held-out loss: give --text too, as --embeddings has no embeddings of held-out captions")
        return None
    data_dir = settings.dataset.data_dir
    some = spread(source, settings.dataset.evaluate_n)
    embeddings = None
    if encoder is not None:
        embeddings = once(data_dir, lambda: stored(settings.dataset, some, len(source), encoder, "held-out-"))
    in_order = {"shuffle": False, "repeat": False}
    return lambda: space.batches(settings, some, embeddings, **in_order)


def data_of(
    settings: Settings, model: DiffusionModel, stream: Batches, counts: tuple[int, int], embeddings: Embeddings | None
) -> dict[str, Any]:
    """Description of a run's batches, which must be unchanged when it resumes. counts: of the used and of all
    examples."""
    varying = {} if stream.varying_shapes is None else {"shapes": stream.varying_shapes}
    return varying | {
        "data": settings.dataset.shown,
        "batch": settings.run.batch,
        "workers": settings.dataset.workers,
        "crop": "buckets" if settings.diffusion.buckets else crop_of(model, settings.diffusion.crop),
        "examples": counts[0],
        "of": counts[1],
        "text": None if embeddings is None else embeddings.encoder,
    }

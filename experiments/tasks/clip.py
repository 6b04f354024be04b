"""Training a CLIP from scratch on captioned images.

    python -m experiments.train clip --optimizer muon --learning-rate 4e-3 --weight-decay 0.05 --warmup 50 --steps 1400
    python -m experiments.train clip --loss sigmoid --out runs/clip-sigmoid
    python -m experiments.evaluate retrieval --clip runs/clip/model

The first command takes half an hour on 2 CPU cores; R@1 among 100 held-out pairs is 70 for images by caption and 81 for
captions by image. jaxdiff/weights/tiny/README.md describes the further training of the shipped CLIP. OUT/model holds
config.json, model.safetensors and the tokenizer in the layout of transformers' CLIPModel, for `--clip` of other
commands. OUT/tokenizer holds the tokenizer, written before the first step.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from experiments.options.training import (
    ComputeOptions,
    DataOptions,
    OptimizerOptions,
    Rule,
    RunOptions,
    TrainSettings,
)
from experiments.tasks.held_out import held_out_source, in_full_batches
from experiments.tasks.streams import stream
from experiments.tasks.task import Inference, Start, Task, Work
from experiments.tasks.tokenizers import captions_of, save_tokenizer
from jaxdiff.data import sources
from jaxdiff.data.pipeline import Batches, DataConfig, image_batches
from jaxdiff.models.clip import CLIPTraining, ContrastiveLoss, SigmoidLoss, finished
from jaxdiff.nets import clip as nets
from jaxdiff.nets.clip import CLIPConfig
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, load_tokenizer, tokenize, train_tokenizer
from jaxdiff.training.distributed import on_process_0, once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.mesh import BATCH_AXES
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.state import Params
from jaxdiff.weights import clip as weights

NO_MATRICES = ("embedding", "positions", "first", "patches", "projection")
LOSSES = {"contrastive": ContrastiveLoss(), "sigmoid": SigmoidLoss()}


@dataclass(frozen=True)
class CLIPOptions:
    """Settings of a CLIP."""

    resolution: int | None = None
    """Side of the input images in pixels; default: the preset's."""
    patch: int | None = None
    """Side of the image tower's patches in pixels; default: the preset's."""
    tokenizer: str = "trained"
    """`trained` (a new one, from these captions), or a directory or hub id."""
    vocab: int = 512
    """Vocabulary size of a newly trained tokenizer."""
    loss: Literal["contrastive", "sigmoid"] = "contrastive"
    """CLIP's or SigLIP's loss."""
    chunk: int = 1024
    """Columns of the logits computed at a time."""


@dataclass(frozen=True)
class TowerCompute(ComputeOptions):
    """Compute settings of the towers."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; use bfloat16 on accelerators."""
    remat: bool = False
    """Recompute blocks in the backward pass, to save memory."""


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train a CLIP."""

    run: RunOptions = RunOptions(steps=1200, batch=128, ema_decay=0.99, save_every=200)
    dataset: DataOptions = DataOptions()
    optimization: OptimizerOptions = OptimizerOptions(warmup=100, weight_decay=0.2)
    clip: CLIPOptions = CLIPOptions()
    compute: TowerCompute = TowerCompute()


@dataclass(frozen=True)
class CLIPTask(Task):
    """A CLIP."""

    unit: ClassVar[str] = "pairs"
    least_batch: ClassVar[int] = 2  # each pair is compared with others
    takes_init: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule]] = {
        "adam": AdamW(b2=0.98, eps=1e-6, decay_all=False),
        "muon": Muon(adam_for=NO_MATRICES, decay_all=False),
    }
    presets: dict[str, CLIPConfig] = field(
        default_factory=lambda: {
            "tiny": nets.TINY,
            "b32": nets.VIT_B_32,
            "l14": nets.VIT_L_14,
            "h14": nets.OPEN_VIT_H_14,
        }
    )
    settings: Settings = Settings()

    def model(self, preset: str, compute: TowerCompute) -> CLIPTraining:
        config = dataclasses.replace(self.preset(preset), dtype=compute.dtype, remat=compute.remat)
        return CLIPTraining(config, axes=BATCH_AXES)

    def side(self, model: CLIPTraining, crop: int | None) -> int:
        super().side(model, crop)
        return model.config.image.resolution

    def on_one_device(self, model: CLIPTraining) -> CLIPTraining:
        return dataclasses.replace(model, axes=())

    def inference(self, preset: str, model: CLIPTraining, count: int) -> Inference:
        """The embeddings of captions and of images."""
        network = nets.CLIP(model.config)
        batch = model.batch_spec(count, self.side(model, None))

        def embed(params, ids, image):
            variables = {"params": {name: value for name, value in params.items() if name != "logit_bias"}}
            text = network.apply(variables, ids, method="embed_text").embedding
            return text, network.apply(variables, image, method="embed_image").embedding

        return Inference(embed, (batch["ids"], batch["image"]))

    def prepare(self, settings: Settings, start: Start) -> Work:
        options, run = settings.clip, settings.run
        config, spec = config_of(self.preset(settings.preset), settings), settings.dataset.spec()
        initial = None
        if run.init is not None and not settings.resumes:
            initial = weights.load(run.init / "model", place=np.asarray)[1]
        side, data_dir = config.image.resolution, settings.dataset.data_dir
        source = once(data_dir, lambda: sources.open(spec, side, "train", data_dir))
        tokenizer = tokenizer_of(settings, spec)
        text = dataclasses.replace(config.text, vocab=len(tokenizer), eos_id=tokenizer.eos_token_id)
        config = dataclasses.replace(config, text=text)
        images = stream(settings, source, side, captions=True)
        model = CLIPTraining(config, LOSSES[options.loss], options.chunk, axes=BATCH_AXES)
        if initial is not None and isinstance(model.compare, SigmoidLoss):
            initial["logit_bias"] = np.float32(model.compare.bias)

        def finish(params: Params, extra: Any) -> str:
            plain, folder = dataclasses.replace(config, dtype="float32", remat=False), settings.out / "model"
            weights.export(plain, finished(model, params), folder)
            save_tokenizer(tokenizer, folder)
            summary = images.skipped.summary(len(source))
            line = f"{folder}: a CLIP of {side} pixels, {len(tokenizer)} ids"
            return f"{summary}\n{line}" if summary else line

        data: dict[str, Any] = {"data": settings.dataset.shown, "batch": run.batch, "workers": settings.dataset.workers}
        data |= {"tokenizer": options.tokenizer, "examples": len(source)}
        held_out = _held_out(settings, config, tokenizer)
        return Work(model, Pairs(images, tokenizer, config.text.length), data, finish, initial, held_out=held_out)


def _held_out(settings: Settings, config: CLIPConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOutBatches | None:
    """Held-out pairs in batches of the training size: the loss depends on the number of negatives."""
    side, rows = config.image.resolution, settings.run.batch // jax.process_count()
    source = held_out_source(settings, side)
    some = None if source is None else in_full_batches(settings, source)
    if some is None:
        return None
    in_order = DataConfig(side, rows, shuffle=False, repeat=False, captions=True, strict=settings.dataset.strict)

    def batches() -> Pairs:
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return Pairs(image_batches(some, in_order, **processes), tokenizer, config.text.length)

    return batches


def config_of(preset: CLIPConfig, settings: Settings) -> CLIPConfig:
    """The preset with the changes of the command line."""
    options, compute = settings.clip, settings.compute
    given = {name: value for name in ("resolution", "patch") if (value := getattr(options, name)) is not None}
    image = dataclasses.replace(preset.image, **given)
    return dataclasses.replace(preset, image=image, dtype=compute.dtype, remat=compute.remat)


def tokenizer_of(settings: Settings, spec: sources.DataSpec) -> PreTrainedTokenizerBase:
    """The tokenizer: trained or loaded once, and reused when the run resumes."""
    kept, options, init = settings.out / "tokenizer", settings.clip, settings.run.init

    def begin() -> PreTrainedTokenizerBase:
        if (kept / "tokenizer_config.json").is_file():
            return load_tokenizer(kept)
        if init is not None:
            tokenizer = load_tokenizer(init / "model")
        elif options.tokenizer == "trained":
            tokenizer = train_tokenizer(captions_of(spec, settings.dataset.data_dir), options.vocab)
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{options.tokenizer}: a tokenizer without an end of captions, which CLIP reads")
        save_tokenizer(tokenizer, kept)
        return tokenizer

    return on_process_0(begin) or load_tokenizer(kept)


class Pairs:
    """Batches of images with the token ids of their captions."""

    def __init__(self, stream: Batches, tokenizer: PreTrainedTokenizerBase, length: int):
        self._stream, self._tokenizer, self._length = stream, tokenizer, length

    def __iter__(self) -> "Pairs":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._stream)
        return {"image": batch["image"], "ids": tokenize(self._tokenizer, list(batch["caption"]), self._length).ids}

    def get_state(self) -> dict:
        return self._stream.get_state()

    def set_state(self, state: dict) -> None:
        self._stream.set_state(state)

"""Pre-training a T5 on captions by span corruption; generators use its frozen encoder.

    python -m experiments.train t5 --data shapes --out runs/t5

Writes OUT/encoder/: config.json, model.safetensors and tokenizer.json in the transformers layout, for
`experiments.train imagen.base64 --text runs/t5/encoder`. The tiny preset takes about ten minutes on 2 CPU cores with
the defaults.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax

from experiments.options.training import ComputeOptions, OptimizerOptions, Rule, RunOptions, TrainSettings
from experiments.tasks.held_out import held_out_source, kept
from experiments.tasks.task import Inference, Start, Task, Work
from experiments.tasks.tokenizers import captions_in, captions_of, lines_of, save_tokenizer
from jaxdiff.data.mixture import spread
from jaxdiff.models.t5 import T5Pretraining, span_batches
from jaxdiff.nets import t5
from jaxdiff.nets.t5 import T5Config
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, byte_tokenizer, load_tokenizer, train_tokenizer
from jaxdiff.training.distributed import on_process_0, once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.prefetch import OwnRows
from jaxdiff.training.state import Params
from jaxdiff.weights import t5 as weights

PLANNED_LENGTH = 128
"""Tokens per caption for planning and benchmarks, as for large text encoders."""


@dataclass(frozen=True)
class T5Options:
    """Text and tokenizer of a T5."""

    texts: Path | None = None
    """A file with further texts, one per line (such as that of experiments.recipes.glosses). As many of them as there
    are captions, evenly spread over the file, are added to the training data."""
    tokenizer: str = "trained"
    """`trained` (a new unigram one, from these captions), `bytes` (ByT5's), or a directory or hub id."""
    vocab: int = 512
    """Vocabulary size of a newly trained tokenizer."""
    length: int = 24
    """Tokens per caption, including the end token."""


@dataclass(frozen=True)
class T5Compute(ComputeOptions):
    """Compute settings of a T5."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; use bfloat16 on accelerators."""
    remat: bool = False
    """Recompute blocks in the backward pass, to save memory."""


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Pre-train a T5."""

    run: RunOptions = RunOptions(steps=2000, batch=64, ema_decay=0.99)
    optimization: OptimizerOptions = OptimizerOptions(learning_rate=2e-3)
    t5: T5Options = T5Options()
    compute: T5Compute = T5Compute()


@dataclass(frozen=True)
class T5Task(Task):
    """A T5."""

    unit: ClassVar[str] = "captions"
    replicated_parameters: ClassVar[bool] = False  # T5-XXL does not fit one chip
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(), "muon": Muon()}
    presets: dict[str, T5Config] = field(
        default_factory=lambda: {
            "micro": t5.MICRO,
            "tiny": t5.TINY,
            "mini": t5.MINI,
            "midi": t5.MIDI,
            "small": t5.SMALL,
            "base": t5.BASE,
            "large": t5.LARGE,
            "xl": t5.XL,
            "xxl": t5.XXL,
        }
    )
    settings: Settings = Settings()

    def model(self, preset: str, compute: T5Compute) -> T5Pretraining:
        config = dataclasses.replace(self.preset(preset), dtype=compute.dtype, remat=compute.remat)
        return T5Pretraining(config, PLANNED_LENGTH)

    def inference(self, preset: str, model: T5Pretraining, count: int) -> Inference:
        """The frozen encoder on captions."""
        encoder = t5.T5Encoder(dataclasses.replace(model.config, decoder_layers=0))
        batch = model.batch_spec(count, 0)

        def encode(params, tokens, mask):
            return encoder.apply({"params": params}, tokens, mask)

        def used(params: Params, frozen: Any) -> Params:
            """The encoder's parameters, in its compute type."""
            return jax.tree.map(lambda leaf: leaf.astype(model.config.dtype), t5.encoder_params(params))

        return Inference(encode, (batch["inputs"], batch["input_mask"]), used)

    def prepare(self, settings: Settings, start: Start) -> Work:
        if settings.run.init is not None:
            raise ValueError("--init: T5 is trained from scratch; use a public T5 with --text")
        options = settings.t5
        captions = _captions(settings)
        tokenizer, stream = _stream(settings, captions)
        compute = settings.compute
        config = dataclasses.replace(
            self.preset(settings.preset), vocab=len(tokenizer), dtype=compute.dtype, remat=compute.remat
        )
        data: dict[str, Any] = {"data": settings.dataset.shown, "batch": settings.run.batch}
        data |= {name: getattr(options, name) for name in ("length", "tokenizer", "vocab")}
        data |= {"captions": len(captions)} | ({} if options.texts is None else {"texts": str(options.texts)})

        def finish(params: Params, extra: Any) -> str:
            plain = dataclasses.replace(config, decoder_layers=0, dtype="float32", remat=False)
            encoder = settings.out / "encoder"
            weights.export(plain, t5.encoder_params(params), encoder)
            reads = f"{len(tokenizer)} ids, {options.length} tokens per caption"
            return f"{encoder}: an encoder of width {config.d_model}, {reads}"

        held_out = _held_out(settings, tokenizer)
        return Work(T5Pretraining(config, options.length), stream, data, finish, held_out=held_out)


def _captions(settings: Settings) -> list[str]:
    """The captions of the data, then the further texts."""
    spec, data_dir, texts = settings.dataset.spec(), settings.dataset.data_dir, settings.t5.texts
    captions = once(data_dir, lambda: captions_of(spec, data_dir))
    return captions if texts is None else captions + lines_of(texts, len(captions))


def _held_out(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> HeldOutBatches | None:
    """Held-out captions with fixed masked spans, in full batches; the last one is filled up with repeated captions."""
    source = held_out_source(settings, 64)
    if source is None:
        return None
    captions = captions_in(spread(source, settings.dataset.evaluate_n))
    batch = settings.run.batch
    stream = OwnRows(span_batches(tokenizer, captions, batch, settings.t5.length, seed=0))
    return kept(stream, -(-len(captions) // batch))


def _stream(settings: Settings, captions: list[str]) -> tuple[PreTrainedTokenizerBase, OwnRows]:
    """The tokenizer, trained or loaded once by process 0 and reused when the run resumes, and its batches.

    It is saved only after the stream is created, so an unusable tokenizer leaves no files.
    """
    folder, options, run = settings.out / "encoder", settings.t5, settings.run

    def read_with(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, OwnRows]:
        return tokenizer, OwnRows(span_batches(tokenizer, captions, run.batch, options.length, run.seed))

    def begin() -> tuple[PreTrainedTokenizerBase, OwnRows]:
        if settings.resumes:
            return read_with(load_tokenizer(folder))
        tokenizer, stream = read_with(_tokenizer(options.tokenizer, captions, options.vocab))
        save_tokenizer(tokenizer, folder)
        return tokenizer, stream

    return on_process_0(begin) or read_with(load_tokenizer(folder))


def _tokenizer(wanted: str, captions: list[str], vocab: int) -> PreTrainedTokenizerBase:
    if wanted == "trained":
        return train_tokenizer(captions, vocab)
    return byte_tokenizer() if wanted == "bytes" else load_tokenizer(wanted)

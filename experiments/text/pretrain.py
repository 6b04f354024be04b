"""Pre-train a T5 on captions by span corruption, then keep its encoder, frozen, for the generators.

    python -m experiments.text.pretrain --data shapes --out runs/t5

Writes `OUT/encoder/`: config.json, model.safetensors and tokenizer.json in the transformers layout, which
`experiments.imagen.train --text runs/t5/encoder` reads. The tiny preset takes about ten minutes on 2 CPU cores with
the defaults; run again with the same folder to go on after an interruption.
"""

import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from experiments.cli import run
from experiments.cores import use_cores
from experiments.texts import lines as read_lines
from jaxdiff.data import example, sources
from jaxdiff.models.t5 import T5Pretraining, span_batches
from jaxdiff.nets import t5
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, byte_tokenizer, load_tokenizer, train_tokenizer
from jaxdiff.training import multihost
from jaxdiff.training.distributed import Cluster, alike, gathered, on_process_0, once, start
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged, Layout, TrainConfig, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import AdamW, Muon, OptimizerConfig
from jaxdiff.training.prefetch import OwnRows
from jaxdiff.weights import t5 as t5_weights

PRESETS = {
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
OPTIMIZERS = {"adam": AdamW(), "muon": Muon()}


@dataclass(frozen=True)
class Pretraining:
    """The settings of one pre-training run."""

    data: str = "shapes"
    """shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"""
    out: Path = Path("runs/t5")
    """Folder of the run."""
    preset: Literal["micro", "tiny", "mini", "midi", "small", "base", "large", "xl", "xxl"] = "tiny"
    """Size of the network."""
    texts: Path | None = None
    """A file of further texts, one a line (experiments.data.glosses writes one): as many of them as there are captions,
    spread over the file, are learned beside these."""
    tokenizer: str = "trained"
    """`trained` (a new unigram one, from these captions), `bytes` (ByT5's), or a directory or hub id."""
    vocab: int = 512
    """Number of ids of a newly trained tokenizer."""
    length: int = 24
    """Tokens per caption, the end token included."""
    steps: int = 2000
    """Updates."""
    batch: int = 64
    """Captions per update."""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam | muon; in a short run of a wide T5, Muon gets as far in a quarter of the updates."""
    learning_rate: float = 2e-3
    """At its peak, after a warm-up of a tenth of the steps; it falls to 0 at the end."""
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    fsdp: int = 1
    """Devices that share each parameter."""
    examples: int = 20_000
    """How many pictures of shapes to draw; the same as for the base model draws them only once."""
    held_out: int = 1_000
    """How many held-out ones beside them."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""
    cluster: Cluster = Cluster()
    """The other processes of the run."""


def pretrain(settings: Pretraining) -> None:
    """Pre-train a T5 on the captions of a data set and write its encoder."""
    if settings.steps < 1 or settings.batch < 1:
        raise ValueError(f"steps {settings.steps}, batch {settings.batch}: both must be at least 1")
    use_cores(settings.batch // start(settings.cluster))
    alike(vars(settings))
    mesh = make_mesh(fsdp=settings.fsdp)
    captions = _captions(settings)
    with locked(settings.out):
        words, stream = _stream(settings, captions)
        config = replace(PRESETS[settings.preset], vocab=len(words))
        made_of = {name: getattr(settings, name) for name in ("data", "batch", "length", "tokenizer", "vocab")}
        made_of |= {"captions": len(captions)} | ({} if settings.texts is None else {"texts": str(settings.texts)})
        model, layout = T5Pretraining(config, settings.length), Layout(mesh)
        state = train(model, stream, config_of(settings), settings.out, data=made_of, layout=layout)
        params, encoder = gathered(state.ema), settings.out / "encoder"

        def finish() -> None:
            t5_weights.export(replace(config, decoder_layers=0), t5.encoder_params(params), encoder)
            reads = f"{len(words)} ids, {settings.length} tokens per caption"
            print(f"{encoder}: an encoder of width {config.d_model}, {reads}")

        on_process_0(finish)


def config_of(settings: Pretraining) -> TrainConfig:
    rates = OptimizerConfig(
        kind=OPTIMIZERS[settings.optimizer],
        learning_rate=settings.learning_rate,
        warmup=settings.steps // 10,
        total=settings.steps,
    )
    return TrainConfig(
        optimizer=rates,
        steps=settings.steps,
        ema_decay=0.99,
        log_every=50,
        save_every=settings.save_every,
        seed=settings.seed,
        stall=settings.cluster.stall,
        stall_exit=settings.cluster.stall_exit,
        description="t5",
    )


def _captions(settings: Pretraining) -> list[str]:
    """The captions of the data, and the further texts behind them."""
    spec = sources.parse(settings.data)
    spec = sources.Shapes(settings.examples, settings.held_out) if isinstance(spec, sources.Shapes) else spec
    captions = once(settings.data_dir, lambda: captions_of(spec, settings.data_dir))
    return captions if settings.texts is None else captions + lines_of(settings.texts, len(captions))


def _stream(settings: Pretraining, captions: list[str]) -> tuple[PreTrainedTokenizerBase, OwnRows]:
    """The tokenizer, which process 0 trains or loads once (a run that goes on has the same), and batches made with it.

    It is written when a stream could be made of it: one that cannot be used leaves nothing behind.
    """
    folder = settings.out / "encoder"

    def read_with(words: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, OwnRows]:
        return words, OwnRows(span_batches(words, captions, settings.batch, settings.length, settings.seed))

    def begin() -> tuple[PreTrainedTokenizerBase, OwnRows]:
        if any((settings.out / "checkpoints").glob("[0-9]*")):
            return read_with(load_tokenizer(folder))
        words, stream = read_with(_tokenizer(settings.tokenizer, captions, settings.vocab))
        save_tokenizer(words, folder)
        return words, stream

    return on_process_0(begin) or read_with(load_tokenizer(folder))


def captions_of(data: sources.DataSpec, data_dir: Path) -> list[str]:
    """Every caption of a set's training split; examples without one are left out, with one warning of how many."""
    source = sources.open(data, 64, "train", data_dir)
    read = tqdm(
        example.captions(source), total=len(source), desc="read captions", unit="caption", disable=multihost.index() > 0
    )
    found = [caption for text in read if (caption := (text or "").strip())]
    if len(found) < len(source):
        warnings.warn(f"{len(source) - len(found)} of {len(source)} examples have no caption: left out", stacklevel=2)
    return found


def lines_of(texts: Path, most: int) -> list[str]:
    """The lines of a file that are not blank, or `most` of them, spread over it. ValueError for a file without any."""
    lines = read_lines(texts)
    if not lines:
        raise ValueError(f"{texts}: no lines of text")
    count = min(most, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def _tokenizer(wanted: str, captions: list[str], vocab: int) -> PreTrainedTokenizerBase:
    if wanted == "trained":
        return train_tokenizer(captions, vocab)
    return byte_tokenizer() if wanted == "bytes" else load_tokenizer(wanted)


def save_tokenizer(words: PreTrainedTokenizerBase, folder: Path) -> None:
    """Before the first step, so that a run that goes on has the same token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        words.save_pretrained(temporary)
        # The file by which a tokenizer is known comes last: where it is, all of it is.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "tokenizer_config.json"):
            os.replace(file, folder / file.name)


if __name__ == "__main__":
    run(pretrain, stopped_by=(Diverged,))

"""Pre-train a T5 on captions by span corruption, then keep its encoder, frozen, for the generators.

    python -m experiments.text.pretrain --data shapes --out runs/t5

Writes `OUT/encoder/`: config.json, model.safetensors and tokenizer.json in the transformers layout, which
`experiments.imagen.train --text runs/t5/encoder` reads. The tiny preset takes about ten minutes on 2 CPU cores with
the defaults; run again with the same folder to go on after an interruption.
"""

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from experiments.cli import run
from experiments.cores import use_cores
from experiments.texts import lines as read_lines
from jaxdiff.data import example, sources
from jaxdiff.models.t5 import T5Pretraining, span_batches
from jaxdiff.nets import t5
from jaxdiff.text.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
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
ALONE = Cluster()
"""Unless this machine or the command line says otherwise."""


def pretrain(
    data: str = "shapes",
    out: Path = Path("runs/t5"),
    preset: Literal["micro", "tiny", "mini", "midi", "small", "base", "large", "xl", "xxl"] = "tiny",
    texts: Path | None = None,
    tokenizer: str = "trained",
    vocab: int = 512,
    length: int = 24,
    steps: int = 2000,
    batch: int = 64,
    optimizer: Literal["adam", "muon"] = "adam",
    learning_rate: float = 2e-3,
    save_every: int = 500,
    seed: int = 0,
    fsdp: int = 1,
    examples: int = 20_000,
    held_out: int = 1_000,
    data_dir: Path = Path("runs/data"),
    cluster: Cluster = ALONE,
) -> None:
    """Pre-train a T5 on the captions of a data set and write its encoder.

    Args:
        data: shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH
        out: folder of the run
        preset: size of the network
        texts: a file of further texts, one a line (experiments.data.glosses writes one): as many of them as there are
            captions, spread over the file, are learned beside these
        tokenizer: `trained` (a new unigram one, from these captions), `bytes` (ByT5's), or a directory or hub id
        vocab: number of ids of a newly trained tokenizer
        length: tokens per caption, the end token included
        steps: updates
        batch: captions per update
        optimizer: adam | muon; in a short run of a wide T5, Muon gets as far in a quarter of the updates
        learning_rate: at its peak, after a warm-up of a tenth of the steps; it falls to 0 at the end
        save_every: steps between checkpoints
        seed: of the initial parameters and the order of the data
        fsdp: devices that share each parameter
        examples: how many pictures of shapes to draw; the same as for the base model draws them only once
        held_out: how many held-out ones beside them
        data_dir: where prepared data sets live
        cluster: the other processes of the run
    """
    given = dict(locals())
    if steps < 1 or batch < 1:
        raise ValueError(f"steps {steps}, batch {batch}: both must be at least 1")
    use_cores(batch // start(cluster))
    alike(given)
    rates = OptimizerConfig(kind=OPTIMIZERS[optimizer], learning_rate=learning_rate, warmup=steps // 10, total=steps)
    settings = TrainConfig(optimizer=rates, steps=steps, ema_decay=0.99, log_every=50, save_every=save_every, seed=seed)
    settings = replace(settings, stall=cluster.stall, stall_exit=cluster.stall_exit, description="t5")
    spec, mesh = sources.parse(data), make_mesh(fsdp=fsdp)
    spec = sources.Shapes(examples, held_out) if isinstance(spec, sources.Shapes) else spec
    captions = once(data_dir, lambda: captions_of(spec, data_dir))
    captions += [] if texts is None else lines_of(texts, len(captions))

    def read_with(words: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, OwnRows]:
        return words, OwnRows(span_batches(words, captions, batch, length, seed))

    def begin() -> tuple[PreTrainedTokenizerBase, OwnRows]:
        if any((out / "checkpoints").glob("[0-9]*")):
            return read_with(load_tokenizer(out / "encoder"))
        words, stream = read_with(_tokenizer(tokenizer, captions, vocab))
        save_tokenizer(words, out / "encoder")
        return words, stream

    with locked(out):
        words, stream = on_process_0(begin) or read_with(load_tokenizer(out / "encoder"))
        config = replace(PRESETS[preset], vocab=len(words))
        made_of = {"data": data, "captions": len(captions), "batch": batch, "length": length}
        made_of |= {"tokenizer": tokenizer, "vocab": vocab} | ({} if texts is None else {"texts": str(texts)})
        state = train(T5Pretraining(config, length), stream, settings, out, data=made_of, layout=Layout(mesh))
        params = gathered(state.ema)

        def finish() -> None:
            t5_weights.export(replace(config, decoder_layers=0), t5.encoder_params(params), out / "encoder")
            reads = f"{len(words)} ids, {length} tokens per caption"
            print(f"{out / 'encoder'}: an encoder of width {config.d_model}, {reads}")

        on_process_0(finish)


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

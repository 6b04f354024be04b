"""Compute and store the T5 embeddings of a dataset's captions, so that training runs no text encoder.

    python -m experiments.embed --data records:runs/data/laion --text-encoder google/flan-t5-xxl \
        --dtype bfloat16 --length 128 --out runs/data/laion-t5

Then train with `--embeddings runs/data/laion-t5`. If it is killed, run it again with the same arguments: it resumes,
loses only the part in progress, and stores nothing twice.

The encoder runs on all devices of the process. `--fsdp N` shards its parameters over N of them; T5-XXL (9.5 GB in
bfloat16) needs this on devices with 16 GB. Several processes, on one machine or several with a shared folder, split a
dataset by `--shard I/N`: each computes every N-th part, and the process that sees all parts completes the store. They
do not communicate, so a killed or slow process does not delay the others. JAX processes that were started together
split the parts automatically and wait for each other at the end; if one dies, start all of them again.

Cost: one pass of the encoder over the captions. On disk a caption takes 2 bytes × tokens × the encoder's width (8 kB
per token for T5-XXL); the total is estimated before the start. Result: the embeddings in ArrayRecord, and
embeddings.json with the encoder's fingerprint, so that a model of another encoder rejects them.
"""

import dataclasses
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from experiments.cli import run
from jaxdiff.data import sources
from jaxdiff.data.embeddings import Embeddings, RowEncoder, Shard, StoreProgress, store_rows
from jaxdiff.data.example import captions
from jaxdiff.text.bulk import LENGTHS, BulkEncoder
from jaxdiff.text.tokenizer import Tokens
from jaxdiff.training.distributed import Cluster, all_done, start
from jaxdiff.training.lock import FolderLock
from jaxdiff.training.mesh import batch_devices, batch_sharding, make_mesh
from jaxdiff.training.param_sharding import shardings
from jaxdiff.weights.t5 import load_text_encoder

SAMPLE = 1024
"""Captions used for the estimate."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Dataset, encoder and output."""

    data: str
    """shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH"""
    text_encoder: str
    """Directory or hub id (id@revision) of a T5 in the transformers layout."""
    out: Path
    """The folder to write."""
    length: int = 128
    """Tokens per caption; longer captions are truncated."""
    split: str = "train"
    """The split of the dataset."""
    resolution: int = 64
    """Stored resolution of shapes or emoji to open; the captions are the same in all."""
    batch: int = 64
    """Full-length captions per batch over all devices; shorter captions use proportionally larger batches."""
    lengths: tuple[int, ...] = LENGTHS
    """Further padded lengths; one program is compiled per length."""
    part: int = 8192
    """Captions per file. Increase it for very large datasets: training keeps 512 files open."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type of the encoder; bfloat16 halves its memory."""
    fsdp: int = 1
    """Number of devices over which each parameter is sharded."""
    shard: str | None = None
    """I/N: compute every N-th part, starting at I (0 … N-1); other processes compute the rest."""
    verify: bool = False
    """Verify all stored data, not only the end of each part."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings) -> None:
    """Store the text embeddings of a dataset."""
    if settings.shard is None:
        start(Cluster())  # processes that were started together split the parts
    shard = _shard(settings.shard)
    if settings.part < 1:
        raise ValueError(f"part {settings.part}: at least one caption a file")
    spec = sources.parse(settings.data)
    source = captions(sources.open(spec, settings.resolution, settings.split, settings.data_dir))
    bulk = _bulk(settings)
    fingerprint = bulk.encoder.fingerprint
    # Other shards may be written at the same time, but two processes must not write the same one.
    lock = FolderLock(settings.out, f"shard-{shard.index}-of-{shard.count}.lock")
    with lock, _Progress(bulk, source, settings.out) as progress:
        stored = store_rows(
            source,
            RowEncoder(progress.encode, fingerprint, bulk.prepare),
            settings.out,
            part=settings.part,
            shard=shard,
            verify=settings.verify,
            progress=StoreProgress(progress.begun),
        )
    print(_summary(stored, settings.out, progress.tokens, shard))
    all_done()


def _bulk(settings: Settings) -> BulkEncoder:
    """The encoder on all devices of this process, with a batch size that they divide."""
    mesh = make_mesh(fsdp=settings.fsdp, devices=jax.local_devices())
    encoder = load_text_encoder(
        settings.text_encoder,
        settings.length,
        settings.dtype,
        place=lambda a: jax.device_put(a, shardings(a, mesh)),
    )
    rows = -(-settings.batch // batch_devices(mesh)) * batch_devices(mesh)
    return BulkEncoder(encoder, rows, settings.lengths, batch_sharding(mesh))


def _shard(text: str | None) -> Shard:
    if text is None:
        return Shard(jax.process_index(), jax.process_count())
    parsed = re.fullmatch(r"(\d+)/(\d+)", text)
    if parsed is None:
        raise ValueError(f"--shard {text}: not of the form I/N, such as 0/4 for the first of four processes")
    return Shard(*map(int, parsed.groups()))


def _announce(bulk: BulkEncoder, source: Sequence[str | None], out: Path, todo: int) -> None:
    """Print an estimate of the output size, from captions spread evenly over the dataset."""
    places = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int))
    with warnings.catch_warnings(action="ignore"):  # encoding warns about long captions
        tokens = float(bulk.prepare([(source[int(i)] or "").strip() for i in places]).mask.sum(1).mean())
    size = todo * tokens * 2 * bulk.encoder.width
    free = shutil.disk_usage(out).free
    print(f"{todo} captions to encode, of about {tokens:.3g} tokens: about {_bytes(size)}, {_bytes(free)} are free")
    if size > free:
        warnings.warn(f"{out}: about {_bytes(size)} will be written and {_bytes(free)} are free there", stacklevel=2)


def _summary(stored: Embeddings | None, out: Path, tokens: int, shard: Shard) -> str:
    size = sum(file.stat().st_size for file in out.glob("part-*.array_record"))
    held = f"{tokens} tokens encoded now, {_bytes(size)} on disk"
    if stored is None:
        return f"shard {shard.index}/{shard.count} is stored, others are not yet (the last completes it): {held}"
    return f"{stored.count} embeddings of {stored.length} × {stored.width} at most, {held}: --embeddings {out}"


def _bytes(size: float) -> str:
    return tqdm.format_sizeof(size, "B")


class _Progress:
    """An encoder with a progress bar in captions and a count of tokens; prints an estimate at the start."""

    def __init__(self, bulk: BulkEncoder, source: Sequence[str | None], out: Path):
        self.tokens = 0
        self._bulk, self._source, self._out = bulk, source, out
        self._bar: tqdm | None = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def begun(self, stored: int, total: int) -> None:
        if stored < total:
            _announce(self._bulk, self._source, self._out, total - stored)
        self._bar = tqdm(
            desc="embed",
            unit=" captions",
            initial=stored,
            total=total,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def encode(self, prepared: Tokens) -> tuple[list[np.ndarray], int]:
        return self._bulk.encode(prepared, self._encoded)

    def _encoded(self, captions: int, tokens: int) -> None:
        self.tokens += tokens
        self._bar.update(captions)


if __name__ == "__main__":
    run(main)

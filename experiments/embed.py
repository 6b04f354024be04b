"""Computes the T5 embeddings of a set's captions once and stores them, so that training runs no text encoder.

    python -m experiments.embed --data records:runs/data/laion --text-encoder google/flan-t5-xxl \
        --dtype bfloat16 --length 128 --out runs/data/laion-t5

Then train with `--embeddings runs/data/laion-t5`. Killed at any moment, it continues when run again with the same
arguments: nothing is lost but the part in progress, and nothing is stored twice.

The encoder runs on all devices of the process; `--fsdp N` splits its parameters over N of them, as T5-XXL (9.5 GB in
bfloat16) needs where a device has 16 GB. Several processes, on one machine or many that see the same folder, share a
set by `--shard I/N`: each makes every N-th part, and the one that finds all parts there finishes the store. They say
nothing to one another: the encoder fits the devices of one host, so there is nothing to compute together, and one that
is killed or slow holds up none of the others. JAX processes that were started together take their shares unasked, and
end together: each waits for the others at its end, and where one dies all go on when they are started again.

Cost: one pass of the encoder over the captions; a caption takes 2 bytes × its tokens × the encoder's width on disk
(8 kB a token for T5-XXL), which is estimated before it begins. Result: the embeddings in ArrayRecord, and
embeddings.json, which names the encoder by a fingerprint, so that a model made for another one refuses them.
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
"""Captions that the estimate is made from."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is embedded, by which encoder, and how it is stored."""

    data: str
    """shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH"""
    text_encoder: str
    """Directory or hub id (id@revision) of a T5 in the transformers layout."""
    out: Path
    """The folder to write."""
    length: int = 128
    """Tokens per caption; longer ones are cut."""
    split: str = "train"
    """The split of the data."""
    resolution: int = 64
    """Which stored size of shapes or emoji to open: the captions are the same in all of them."""
    batch: int = 64
    """Captions of full length encoded at a time, of all devices together; of shorter ones as many more."""
    lengths: tuple[int, ...] = LENGTHS
    """What captions are padded to, beside the full length; a program is compiled for each."""
    part: int = 8192
    """Captions a file. Larger for very large sets, of which training keeps 512 files open."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the encoder is kept and computed in; bfloat16 halves the memory of a large one."""
    fsdp: int = 1
    """Devices that share each parameter."""
    shard: str | None = None
    """I/N: make every N-th part, from the I-th (0 … N-1), beside other processes that make the others."""
    verify: bool = False
    """Read again all that is stored already, not only the end of each part."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Settings) -> None:
    """Store the text embeddings of a data set."""
    if settings.shard is None:
        start(Cluster())  # of processes that were started together each takes its share
    share = _shard(settings.shard)
    if settings.part < 1:
        raise ValueError(f"part {settings.part}: at least one caption a file")
    spec = sources.parse(settings.data)
    source = captions(sources.open(spec, settings.resolution, settings.split, settings.data_dir))
    bulk = _bulk(settings)
    made_by = bulk.encoder.fingerprint
    # Other shards may be written at the same time; a second start of this one would do its work twice.
    lock = FolderLock(settings.out, f"shard-{share.index}-of-{share.count}.lock")
    with lock, _Progress(bulk, source, settings.out) as progress:
        stored = store_rows(
            source,
            RowEncoder(progress.encode, made_by, bulk.prepare),
            settings.out,
            part=settings.part,
            shard=share,
            verify=settings.verify,
            progress=StoreProgress(progress.begun),
        )
    print(_told(stored, settings.out, progress.tokens, share))
    all_done()


def _bulk(settings: Settings) -> BulkEncoder:
    """The encoder on all devices of this process, a batch of which divides over them."""
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
        raise ValueError(f"--shard {text}: two numbers are wanted, such as 0/4 for the first of four processes")
    return Shard(*map(int, parsed.groups()))


def _announce(bulk: BulkEncoder, source: Sequence[str | None], out: Path, todo: int) -> None:
    """What is about to be written, judged by captions spread evenly over the set."""
    places = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int))
    with warnings.catch_warnings(action="ignore"):  # those that are too long are told of when they are encoded
        tokens = float(bulk.prepare([(source[int(i)] or "").strip() for i in places]).mask.sum(1).mean())
    size = todo * tokens * 2 * bulk.encoder.width
    free = shutil.disk_usage(out).free
    print(f"{todo} captions to encode, of about {tokens:.3g} tokens: about {_bytes(size)}, {_bytes(free)} are free")
    if size > free:
        warnings.warn(f"{out}: about {_bytes(size)} will be written and {_bytes(free)} are free there", stacklevel=2)


def _told(stored: Embeddings | None, out: Path, tokens: int, shard: Shard) -> str:
    size = sum(file.stat().st_size for file in out.glob("part-*.array_record"))
    held = f"{tokens} tokens encoded now, {_bytes(size)} on disk"
    if stored is None:
        return f"shard {shard.index}/{shard.count} is stored, others are not yet (the last to end finishes it): {held}"
    return f"{stored.count} embeddings of {stored.length} × {stored.width} at most, {held}: --embeddings {out}"


def _bytes(size: float) -> str:
    return tqdm.format_sizeof(size, "B")


class _Progress:
    """An encoder that shows how far it is, in captions, and counts its tokens; first it says what is to be done."""

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

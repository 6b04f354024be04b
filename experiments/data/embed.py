"""Computes the T5 embeddings of a set's captions once and stores them, so that training runs no text encoder.

    python -m experiments.data.embed --data records:runs/data/laion --text-encoder google/flan-t5-xxl \
        --length 128 --out runs/data/laion-t5

Then train with `--embeddings runs/data/laion-t5`. Killed, it continues when run again with the same arguments.
Cost: one pass of the encoder over the captions; a caption takes 2 bytes × its tokens × the encoder's width on disk
(8 kB a token for T5-XXL). Result: the embeddings in ArrayRecord, and embeddings.json, which names the encoder by a
fingerprint, so that a model made for another one refuses them.
"""

from pathlib import Path
from typing import Literal

from tqdm import tqdm

from experiments.cli import run
from jaxdiff.data import sources
from jaxdiff.data.embeddings import fingerprint, store_embeddings
from jaxdiff.data.example import captions
from jaxdiff.text.t5 import encode
from jaxdiff.weights.t5 import load_text_encoder


def main(
    data: str,
    text_encoder: str,
    out: Path,
    length: int = 128,
    split: str = "train",
    resolution: int = 64,
    batch: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    data_dir: Path = Path("runs/data"),
) -> None:
    """Store the text embeddings of a data set.

    Args:
        data: shapes | emoji | folder:PATH | tfds:NAME | records:PATH
        text_encoder: directory or hub id (id@revision) of a T5 in the transformers layout
        out: the folder to write
        length: tokens per caption; longer ones are cut
        split: the split of the data
        resolution: which stored size of shapes or emoji to open: the captions are the same in all of them
        batch: captions encoded at a time
        dtype: what the encoder is kept and computed in; bfloat16 halves the memory of a large one
        data_dir: where prepared data sets live
    """
    source = sources.open(sources.parse(data), resolution, split, data_dir)
    encoder = load_text_encoder(text_encoder, length, dtype)
    with tqdm(total=len(source), desc="embed", unit=" captions") as bar:
        stored = store_embeddings(
            captions(source),
            lambda texts: encode(encoder, texts),
            out,
            encoder=fingerprint(encoder),
            batch=batch,
            progress=bar.update,
        )
    print(f"{stored.count} embeddings of {stored.length} × {stored.width} at most: --embeddings {out}")


if __name__ == "__main__":
    run(main)

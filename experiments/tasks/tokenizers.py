"""Captions for training a tokenizer, and saving it before the first step."""

import os
import tempfile
import warnings
from pathlib import Path

from tqdm import tqdm

from experiments.options.texts import lines as read_lines
from jaxdiff.data import example, sources
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase
from jaxdiff.training import multihost


def captions_of(data: sources.DataSpec, data_dir: Path) -> list[str]:
    """All captions of a dataset's training split. Examples without one are skipped and counted in one warning."""
    return captions_in(sources.open(data, 64, "train", data_dir))


def captions_in(source: example.Source) -> list[str]:
    """`captions_of` for an open dataset."""
    read = tqdm(
        example.captions(source), total=len(source), desc="read captions", unit="caption", disable=multihost.index() > 0
    )
    captions = [caption for text in read if (caption := (text or "").strip())]
    if len(captions) < len(source):
        missing = len(source) - len(captions)
        warnings.warn(f"{missing} of {len(source)} examples have no caption: left out", stacklevel=2)
    return captions


def lines_of(texts: Path, most: int) -> list[str]:
    """The non-blank lines of a file, at most `most`, evenly spread over it. ValueError if there are none."""
    lines = read_lines(texts)
    if not lines:
        raise ValueError(f"{texts}: no lines of text")
    count = min(most, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer; called before the first step, so that a resumed run has the same token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tokenizer.save_pretrained(temporary)
        # tokenizer_config.json comes last: its presence marks a complete tokenizer.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "tokenizer_config.json"):
            os.replace(file, folder / file.name)

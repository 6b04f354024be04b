"""Training DALL·E 1's transformer, on captions and the codes of their images.

    python -m experiments.train dalle.dvae --data shapes --out runs/dvae
    python -m experiments.train dalle.transformer --data shapes --codes runs/dvae --out runs/dalle
    python -m experiments.sample "a large red circle" --weights runs/dalle

All images are encoded once and their codes stored below --data-dir. The byte-pair tokenizer is trained on the captions.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import TrainSettings
from experiments.tasks.held_out import held_out_source
from experiments.tasks.streams import stream
from experiments.tasks.task import Start, Work
from experiments.tasks.tokenizers import captions_of, save_tokenizer
from experiments.tasks.transformers import CodesTask, TransformerCompute, finished, initial
from jaxdiff.data import grids, sources
from jaxdiff.data.example import Source, captions
from jaxdiff.data.latents import ExtendedBatches, LatentBatches, stored_latents
from jaxdiff.data.mixture import Spread, spread
from jaxdiff.diffusion import noise
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.dvae import TrainedDVAE
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.text.bpe import SMALLEST, TokenTextEncoder, train_bpe
from jaxdiff.text.tokenizer import load_tokenizer
from jaxdiff.training import multihost
from jaxdiff.training.distributed import gathered, on_process_0, once
from jaxdiff.training.state import Params
from jaxdiff.weights import dalle

SHOWN = 8
"""Images of a sample grid."""


@dataclass(frozen=True)
class TransformerOptions:
    """Codes and text; defaults are the preset's."""

    codes: str = ""
    """Run of dalle.dvae; or a VQ autoencoder: a run of sd.autoencoder, a folder or hub id in diffusers' layout, or the
    folder of dalle-mini's VQGAN."""
    tokenizer: str = "trained"
    """`trained` (byte pairs, from these captions), or a directory or hub id."""
    vocab: int | None = None
    """Vocabulary size of a newly trained tokenizer."""
    text_length: int | None = None
    """Tokens per caption."""
    text_dropout: float | None = None
    """Fraction of captions replaced by padding, for guidance."""
    text_weight: float | None = None
    """Weight of the text in the loss; that of the codes has the rest."""

    def check(self) -> None:
        """ValueError naming the flag."""
        if not self.codes:
            raise ValueError(
                "--codes is missing: name the run of a dVAE (python -m experiments.train dalle.dvae) or of a VQ "
                "autoencoder"
            )
        for flag, value in (("--text-dropout", self.text_dropout), ("--text-weight", self.text_weight)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{flag} {value:g}: a fraction from 0 to below 1")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"--text-length {self.text_length}: at least 1")
        if self.vocab is not None and self.vocab < SMALLEST:
            raise ValueError(f"--vocab {self.vocab}: at least {SMALLEST}, as all bytes are tokens")


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train a transformer of text and codes."""

    transformer: TransformerOptions = TransformerOptions()
    compute: TransformerCompute = TransformerCompute()


@dataclass(frozen=True)
class TransformerTask(CodesTask):
    """A transformer of text and an image's codes."""

    settings: Settings = Settings()

    def prepare(self, settings: Settings, start: Start) -> Work:
        data, options = settings.dataset, settings.transformer
        options.check()
        decoder = dalle.load_decoder(options.codes)
        encoder = TokenTextEncoder(*_tokenizer(settings, self.preset(settings.preset).model))
        model = _fitted(self.model(settings.preset, settings.compute), options, decoder, encoder)
        side = model.network.columns * decoder.factor
        source = once(data.data_dir, lambda: sources.open(data.spec(), side, "train", data.data_dir))
        source = spread(source, data.limit) if data.limit else source
        read = partial(_batches, settings, side, decoder, encoder)
        stream, held_out = read(source), held_out_source(settings, side)
        some = None if held_out is None else spread(held_out, min(data.evaluate_n, len(held_out)))
        plain = dataclasses.replace(model, network=dataclasses.replace(model.network, execution=ExecutionConfig()))
        trained = TrainedAutoregressive(plain, {}, self.preset(settings.preset).sampling, encoder.fingerprint)
        folder = settings.out / "model"

        def begin() -> None:
            dalle.save_settings(trained, folder)
            dalle.save_source(settings.out, dalle.CodesSource(options.codes, dalle.fingerprint_of(decoder)))

        def finish(params: Params, extra: Any) -> str:
            dalle.save(dataclasses.replace(trained, params=params), folder)
            return finished(settings, folder, stream, source)

        contents = {"data": data.shown, "batch": settings.run.batch, "examples": len(source)}
        contents |= {"codes": dalle.fingerprint_of(decoder), "text": encoder.fingerprint}
        return Work(
            model,
            stream,
            contents,
            finish,
            initial=initial(settings, plain),
            begin=begin,
            sample_hook=Samples(trained, source if some is None else some, encoder, decoder, settings.out / "samples"),
            held_out=None if some is None else (lambda: read(some, shuffle=False, repeat=False)),
        )


def _fitted(
    model: AutoregressiveModel, options: TransformerOptions, decoder: TrainedDVAE | VQCodes, encoder: TokenTextEncoder
) -> AutoregressiveModel:
    """The preset for these codes and this text, with the changes of the command line."""
    side = decoder.side // decoder.factor
    network = dataclasses.replace(
        model.network,
        codes=decoder.consumes.classes,
        rows=side,
        columns=side,
        vocab=len(encoder.tokenizer),
        text_length=encoder.length,
    )
    changes = {"dropout": options.text_dropout, "text_weight": options.text_weight}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(model, network=network, product=decoder.consumes, **given)


def _tokenizer(settings: Settings, preset: AutoregressiveModel) -> tuple[Any, int]:
    """The tokenizer, trained or loaded once, and reused when the run resumes; and the tokens per caption."""
    kept, options = settings.out / dalle.TOKENIZER, settings.transformer
    length = preset.network.text_length if options.text_length is None else options.text_length

    def begin() -> Any:
        if (kept / "tokenizer_config.json").is_file():
            return load_tokenizer(kept)
        if settings.run.init is not None:
            tokenizer = load_tokenizer(settings.run.init / dalle.TOKENIZER)
        elif options.tokenizer == "trained":
            vocab = preset.network.vocab if options.vocab is None else options.vocab
            tokenizer = train_bpe(captions_of(settings.dataset.spec(), settings.dataset.data_dir), vocab)
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        save_tokenizer(tokenizer, kept)
        return tokenizer

    return on_process_0(begin) or load_tokenizer(kept), length


def _batches(
    settings: Settings,
    side: int,
    decoder: TrainedDVAE | VQCodes,
    encoder: TokenTextEncoder,
    source: Source,
    **order: bool,
) -> LatentBatches:
    """Batches of ids and codes."""
    data_dir = settings.dataset.data_dir
    images = stream(settings, source, side, captions=True, **order)

    def entries(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = encoder.tokenize([str(caption) for caption in batch["caption"]])
        return {"ids": tokens.ids, "text_mask": tokens.mask}

    codes = once(data_dir, lambda: _codes(source, side, decoder, data_dir / "codes"))
    return LatentBatches(ExtendedBatches(images, entries), codes)


def _codes(source: Source, side: int, decoder: TrainedDVAE | VQCodes, folder: Path) -> np.ndarray:
    """The stored codes of a source."""
    encode: Callable = lambda images: decoder.encode(jnp.asarray(images))  # noqa: E731
    with tqdm(total=len(source), desc="encode images", unit="image", disable=multihost.index() > 0) as bar:
        return stored_latents(source, side, encode, folder, dalle.fingerprint_of(decoder), bar.update, np.int32)


class Samples:
    """A sample hook of the training loop: writes a grid of fixed captions."""

    def __init__(
        self,
        trained: TrainedAutoregressive,
        source: Source,
        encoder: TokenTextEncoder,
        decoder: TrainedDVAE | VQCodes,
        folder: Path,
    ) -> None:
        self._captions = [text or "" for text in captions(Spread(source, min(SHOWN, len(source))))]
        self._text = encoder.encode(self._captions)
        self._trained, self._decoder, self._folder = trained, decoder, folder

    def __call__(self, step: int, params: Params, extra: Any) -> None:
        network, count = self._trained.model.network, len(self._captions)
        keys = noise.sample_keys(jax.random.key(0), jnp.arange(count))
        # A progress callback splits sampling into several programs, so that a signal is handled sooner.
        request = SampleRequest(keys, (network.rows, network.columns), self._text, progress=lambda done: None)
        codes = dataclasses.replace(self._trained, params=params).generate(request)
        images = gathered(jnp.clip(self._decoder.decoded(codes), -1.0, 1.0))
        if images is None:
            return
        grids.write(self._folder / f"{step:07d}.png", grids.grid(list(images), self._captions, 128, SHOWN // 2))
        tqdm.write(f"samples: {self._folder / f'{step:07d}.png'}")

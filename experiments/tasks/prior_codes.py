"""Training DALL·E 2's autoregressive prior: the codes of CLIP's image embeddings, from captions.

    python -m experiments.train unclip.autoregressive --data shapes --out runs/prior
    python -m experiments.sample "a large red circle" --weights runs/prior runs/decoder

The codes are principal components of the training images' embeddings. `--clip-model` names the CLIP, as for
`unclip.prior`; prior and decoder need the same one.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import TrainSettings
from experiments.tasks.held_out import held_out_source
from experiments.tasks.streams import stream
from experiments.tasks.task import Start, Work
from experiments.tasks.transformers import CodesTask, TransformerCompute, finished, initial
from experiments.tasks.transformers import Preset as TransformerPreset
from experiments.tasks.unclip import CLIPOptions, embedded_images, spec_of
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.core.trees import digest_of
from jaxdiff.data import sources
from jaxdiff.data.example import Source, captions
from jaxdiff.data.latents import IndexedBatches
from jaxdiff.data.mixture import Spread, spread
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.prior_codes import coded, fit, training_batch
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.training import multihost
from jaxdiff.training.distributed import once
from jaxdiff.training.state import Params
from jaxdiff.weights import dalle, embedding_codes, unclip
from jaxdiff.weights.embedding_codes import Coding

PAIRS = 2**16
"""Pairs, evenly spread over the dataset, from which the codes are computed."""


@dataclass(frozen=True)
class CodesOptions:
    """The codes; defaults are the preset's."""

    components: int | None = None
    """Principal components of an embedding, at most its width."""
    buckets: int | None = None
    """Buckets of each component and of the dot product."""
    text_dropout: float | None = None
    """Fraction of captions replaced by padding, for guidance."""

    def check(self) -> None:
        """ValueError naming the flag."""
        for flag, value, least in (("--components", self.components, 1), ("--buckets", self.buckets, 2)):
            if value is not None and value < least:
                raise ValueError(f"{flag} {value}: at least {least}")
        if self.text_dropout is not None and not 0 <= self.text_dropout < 1:
            raise ValueError(f"--text-dropout {self.text_dropout:g}: a fraction from 0 to below 1")


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train an autoregressive prior."""

    clip: CLIPOptions = CLIPOptions()
    codes: CodesOptions = CodesOptions()
    compute: TransformerCompute = TransformerCompute()


@dataclass(frozen=True)
class Preset(TransformerPreset):
    """embeddings: those of the preset's CLIP, which are coded."""

    embeddings: EmbeddingSpec = EmbeddingSpec()


@dataclass(frozen=True)
class PriorCodesTask(CodesTask):
    """An autoregressive prior."""

    settings: Settings = Settings()

    def prepare(self, settings: Settings, start: Start) -> Work:
        data = settings.dataset
        settings.codes.check()
        clip = settings.clip.load(data.data)
        side, data_dir = clip.image.resolution, data.data_dir
        source = once(data_dir, lambda: sources.open(data.spec(), side, "train", data_dir))
        source = spread(source, data.limit) if data.limit else source
        coding = _kept(settings, clip) or self._computed(settings, clip, source)
        model = self._fitted(settings, coding, clip)
        read = partial(_batches, settings, clip, coding)
        batches, held_out = read(source), held_out_source(settings, side)
        some = None if held_out is None else spread(held_out, min(data.evaluate_n, len(held_out)))
        plain = dataclasses.replace(model, network=dataclasses.replace(model.network, execution=ExecutionConfig()))
        trained = TrainedAutoregressive(plain, {}, self.preset(settings.preset).sampling, clip.text.fingerprint)
        folder = settings.out / "model"

        def begin() -> None:
            embedding_codes.save_coding(coding, settings.out)
            unclip.save_clip_source(settings.out, clip)
            dalle.save_settings(trained, folder)

        def finish(params: Params, extra: Any) -> str:
            dalle.save(dataclasses.replace(trained, params=params), folder)
            return finished(settings, folder, batches, source)

        contents = {"data": data.shown, "batch": settings.run.batch, "examples": len(source)}
        contents |= {"clip": clip.fingerprint, "codes": digest_of(coding.codes._asdict())}
        return Work(
            model,
            batches,
            contents,
            finish,
            initial=initial(settings, plain),
            begin=begin,
            held_out=None if some is None else (lambda: read(some, shuffle=False, repeat=False)),
        )

    def _computed(self, settings: Settings, clip: unclip.CLIPTowers, source: Source) -> Coding:
        """The codes of a dataset. ValueError, before it is embedded, for more components than it can have."""
        preset, options = self.preset(settings.preset), settings.codes
        assert isinstance(preset, Preset)
        network, spec = preset.model.network, spec_of(preset.embeddings, clip.image)
        components = network.columns - 1 if options.components is None else options.components
        buckets = network.codes if options.buckets is None else options.buckets
        shown = Spread(source, min(PAIRS, len(source)))
        if components > (most := min(spec.width, len(shown))):
            flag = f"--components {components}"
            raise ValueError(f"{flag}: {len(shown)} embeddings of width {spec.width} have at most {most}")
        places = [shown.place(number) for number in range(len(shown))]
        pairs = _embedded(settings, clip, source)[places].astype(np.float32), _embedded_captions(clip, shown)
        codes = fit(*(jnp.asarray(spec.normalized(each)) for each in pairs), components, buckets)
        return Coding(codes, spec, clip.text.width)

    def _fitted(self, settings: Settings, coding: Coding, clip: unclip.CLIPTowers) -> AutoregressiveModel:
        """The preset for these codes and this CLIP."""
        model = self.model(settings.preset, settings.compute)
        if settings.codes.text_dropout is not None:
            model = dataclasses.replace(model, dropout=settings.codes.text_dropout)
        return coded(model, clip.text.length, _vocab(clip), len(coding.codes.components), coding.codes.buckets)


def _kept(settings: Settings, clip: unclip.CLIPTowers) -> Coding | None:
    """The codes of this run if it resumes, or of the run that it begins with. ValueError if they are another CLIP's."""
    kept = settings.out if settings.resumes else settings.run.init
    if kept is None or not embedding_codes.is_stored(kept):
        return None
    source = unclip.read_clip_source(kept)
    if f"{source.text} {source.image}" != clip.fingerprint:
        raise ValueError(f"{kept}: its codes are of another CLIP's embeddings ({source.source})")
    return embedding_codes.load_coding(kept)


def _vocab(clip: unclip.CLIPTowers) -> int:
    assert clip.text.config.text is not None  # see `CLIPTextEncoder`
    return clip.text.config.text.vocab


def _embedded(settings: Settings, clip: unclip.CLIPTowers, source: Source) -> np.ndarray:
    """The stored embeddings (n e) of all images."""
    data_dir = settings.dataset.data_dir
    seen = once(data_dir, lambda: embedded_images(clip.image, source, data_dir / "image-embeddings"))
    return seen[:, 0, 0]


def _embedded_captions(clip: unclip.CLIPTowers, source: Source, batch: int = 256) -> np.ndarray:
    """The embeddings (n e) of all captions."""

    def blocks() -> Iterator[np.ndarray]:
        with tqdm(total=len(source), desc="embed captions", unit="caption", disable=multihost.index() > 0) as bar:
            texts = [text or "" for text in captions(source)]
            for first in range(0, len(texts), batch):
                block = texts[first : first + batch]
                embedded = clip.text.encode(block + [""] * (batch - len(block))).pooled  # so that one program suffices
                yield np.asarray(embedded, np.float32)[: len(block)]
                bar.update(len(block))

    return np.concatenate(list(blocks()))


def _batches(
    settings: Settings, clip: unclip.CLIPTowers, coding: Coding, source: Source, **order: bool
) -> IndexedBatches:
    """Batches of prefixes and codes."""
    spec, vocab = coding.embeddings, _vocab(clip)
    images = stream(settings, source, clip.image.resolution, captions=True, **order)
    seen = _embedded(settings, clip, source)

    def entries(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        text = clip.text.encode([str(caption) for caption in batch["caption"]])
        image = jnp.asarray(spec.normalized(seen[batch["index"]].astype(np.float32)))
        made = _training_batch(coding.codes, text.ids, text.mask, image, spec.normalized(text.pooled), vocab)
        return {name: np.asarray(value) for name, value in made.items()}

    return IndexedBatches(images, entries)


_training_batch = jax.jit(training_batch, static_argnums=5)

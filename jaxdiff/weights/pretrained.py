"""`jaxdiff.from_pretrained` and `jaxdiff.save_pretrained`: any system's pipeline from disk or the hub, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp

from jaxdiff.models.autoregressive import TrainedAutoregressive
from jaxdiff.models.embedding_boxes import RankedPrior, StandardizedPrior
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.weights import (
    dalle,
    dalle_mini,
    hub,
    imagen,
    kandinsky,
    karlo,
    latent_runs,
    stable_diffusion,
    stable_diffusion_export,
    stages,
    t5,
    unclip,
)
from jaxdiff.weights.adapters import with_adapters
from jaxdiff.weights.imagen import SHIPPED, STAGES, Weights
from jaxdiff.weights.karlo import Loading


@dataclass(frozen=True)
class LoadOptions(stable_diffusion.Reading):
    """How weights of any system are read; those of others than Stable Diffusion ignore what they have not.

    dtype: compute type of the networks, and of public parameters; None: as saved, or float32. clean: clean captions as
    in DeepFloyd IF's training.
    """

    clean: bool = True


def load(weights: Weights, options: LoadOptions = LoadOptions(), text: TextEncoder | None = None) -> Pipeline:
    """Load a pipeline of any system. text: replaces the text encoder of the weights, which is then not loaded.

    Raises FileNotFoundError or ValueError as the system's own loader does.
    """
    if (public := _public_unclip(weights, options)) is not None:
        return public.pipeline(text)
    if (path := _stable_diffusion(weights)) is not None:
        return stable_diffusion.load(path, options, text)
    if (run := _latent_run(weights)) is not None:
        if options.vae is not None:
            raise ValueError(f"{run} names its own autoencoder: another one ({options.vae}) would not fit its latents")
        pipeline = latent_runs.load(run, text, options.dtype)
        assert isinstance(pipeline.generator, TrainedModel)
        dtype = options.dtype or "float32"
        adapted = with_adapters(pipeline.generator, options.loras, options.controls, dtype, options.place)
        return replace(pipeline, generator=adapted)
    if options.loras.files or options.controls:
        named = [weights] if isinstance(weights, str | Path) else weights
        raise ValueError(f"{', '.join(map(str, named))}: LoRAs and ControlNets are for a Stable Diffusion")
    if (folder := _dalle_mini(weights)) is not None:
        return dalle_mini.load(folder, options.vae, text, options.dtype, options.place)
    if (run := _dalle_run(weights)) is not None:
        return dalle.load(run, text, options.dtype)
    if (places := _unclip(weights)) is not None:
        return unclip.load(places, text, options.dtype)
    pipeline = imagen.load(
        weights, dtype=options.dtype, variant=options.variant, clean=options.clean, text=text, place=options.place
    )
    return imagen.with_dtype(pipeline, options.dtype)


def load_text(weights: Weights, options: LoadOptions = LoadOptions()) -> TextEncoder:
    """The text encoder of `load`, without the rest: to embed captions first and free it."""
    if (folder := _public_unclip_text(weights)) is not None:
        return karlo.load_text_encoder(folder, Loading(variant=options.variant, place=options.place))
    if (folder := _dalle_mini(weights)) is not None:
        return dalle_mini.load_text(folder)
    if (path := _stable_diffusion(weights)) is not None:
        return stable_diffusion.load_text(stable_diffusion.open_source(path, options), options)
    if (run := _dalle_run(weights)) is not None:
        return dalle.load_text(run)
    if (places := _unclip(weights)) is not None:
        return unclip.load_text(places)
    return imagen.load_text(
        weights, dtype=options.dtype, variant=options.variant, clean=options.clean, place=options.place
    )


def text_length(weights: Weights) -> int:
    """Tokens per caption in the training of the first stage of `weights`."""
    if (folder := _public_unclip_text(weights)) is not None:
        return karlo.load_text_encoder(folder).length
    if (folder := _dalle_mini(weights)) is not None:
        return dalle_mini.load_text(folder).length
    if (run := _dalle_run(weights)) is not None:
        return dalle.load_text(run).length
    if (places := _unclip(weights)) is not None:
        return unclip.load_text(places).length
    return imagen.text_length(weights) if _stable_diffusion(weights) is None else stable_diffusion.presets.TOKENS


def _public_unclip(weights: Weights, options: LoadOptions) -> karlo.Boxes | kandinsky.Boxes | None:
    """The boxes of the folder of Karlo, or of both folders of Kandinsky 2.2; None for other systems. ValueError for a
    prior of Kandinsky without its decoder."""
    folder = _public_unclip_text(weights)
    if folder is None:
        return None
    if options.loras.files or options.controls:
        raise ValueError(f"{folder}: LoRAs and ControlNets are for a Stable Diffusion")
    loading = Loading(options.dtype or "float32", options.variant, options.place)
    places = [weights] if isinstance(weights, str | Path) else list(weights)
    if karlo.is_karlo(folder):
        if len(places) > 1:
            raise ValueError(f"{', '.join(map(str, places))}: Karlo is one folder")
        return karlo.load(folder, loading)
    if len(places) != 2:
        raise ValueError(f"{folder} is the prior of Kandinsky 2.2: name it and the folder of the decoder")
    return kandinsky.load(folder, places[1], loading)


def _public_unclip_text(weights: Weights) -> Path | None:
    """The folder of Karlo, or of Kandinsky's prior, which has the text encoder; None for other systems."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    first = Path(listed[0]) if listed else Path()
    return first if listed and (karlo.is_karlo(first) or kandinsky.is_prior(first)) else None


def _stable_diffusion(weights: Weights) -> str | Path | None:
    """The file, folder or id of a Stable Diffusion; None for other systems. ValueError for several."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    if not any(map(stable_diffusion.is_stable_diffusion, listed)):
        return None
    if len(listed) > 1:
        raise ValueError(f"{', '.join(map(str, listed))}: a Stable Diffusion is one file or folder")
    return listed[0]


def _latent_run(weights: Weights) -> Path | None:
    """The run of a latent diffusion model; None for others."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    return Path(listed[0]) if len(listed) == 1 and latent_runs.is_latent_run(Path(listed[0])) else None


def _dalle_run(weights: Weights) -> Path | None:
    """The run of a transformer of codes; None for others."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    return Path(listed[0]) if len(listed) == 1 and dalle.is_run(Path(listed[0])) else None


def _dalle_mini(weights: Weights) -> Path | None:
    """The folder of a dalle-mini; None for others."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    return Path(listed[0]) if len(listed) == 1 and dalle_mini.is_dalle_mini(listed[0]) else None


def _unclip(weights: Weights) -> Sequence[str | Path] | None:
    """The places of a prior, a decoder and upsamplers, or the folder of a DALL·E 2; None for others."""
    listed: Sequence[str | Path] = [weights] if isinstance(weights, str | Path) else list(weights)
    return listed if listed and unclip.is_unclip(listed[0]) else None


def from_pretrained(
    weights: Weights = SHIPPED,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    text_encoder: TextEncoder | None = None,
    place: hub.Place = jnp.asarray,
) -> Pipeline:
    """Load a pipeline: `from_pretrained("runs/base64").sample(["a red circle"])`.

    weights: the folder of a cascade or of a training run, several of them (of DALL·E 2 the prior's, the decoder's and
    the upsamplers'), a single file or folder of Stable Diffusion, the folder of a dalle-mini with its decoder or of
    Karlo, both of Kandinsky 2.2, or a hub id; by default the tiny cascade of the package. dtype: compute type of the
    networks ("float32" or "bfloat16"). variant: "fp16" selects the files of that name. text_encoder: replaces the one
    of the weights. place: puts an array on its devices. Other settings: `load` with `LoadOptions`. Raises
    FileNotFoundError or ValueError.
    """
    return load(weights, LoadOptions(dtype, variant, place), text_encoder)


def save_pretrained(pipeline: Pipeline, directory: str | Path, dtype: str = "float32") -> None:
    """Write a pipeline as a folder for `from_pretrained`: text/, base64/ and, for its decoders, sr256/ and sr1024/; a
    Stable Diffusion in diffusers' layout; a DALL·E 1 as a run, a dalle-mini in its own layout, both with the decoder
    of their codes; a DALL·E 2 as `weights/unclip.py` describes, a Karlo in diffusers' layout.

    dtype: type of the stored parameters; "float16" and "bfloat16" halve the files. ValueError for an unsupported
    pipeline, before anything is written; OSError if writing fails.
    """
    if stable_diffusion_export.is_latent_diffusion(pipeline):
        return stable_diffusion_export.export(pipeline, directory, dtype=dtype)
    if isinstance(pipeline.generator, TrainedAutoregressive):
        mini = isinstance(pipeline.generator.model.network, EncoderDecoderConfig)
        return (dalle_mini if mini else dalle).export(pipeline, directory, dtype)
    if isinstance(pipeline.generator, RankedPrior | TrainedPriorCodes):
        return unclip.export(pipeline, directory, dtype)
    if isinstance(pipeline.generator, StandardizedPrior):
        return karlo.export(karlo.boxes_of(pipeline), directory, dtype)
    directory, models, encoder = Path(directory), imagen.trained(pipeline), pipeline.text_encoder
    if len(models) > len(STAGES):
        raise ValueError(f"a folder of stages holds {len(STAGES)}, not {len(models)}")
    if not isinstance(encoder, T5TextEncoder):
        raise ValueError("save_pretrained needs a T5 text encoder, and this pipeline has none")
    if others := [name for name in STAGES[len(models) :] if (directory / name).exists()]:
        raise ValueError(f"{directory} holds {' and '.join(others)} of another cascade: choose another folder")
    t5.export(encoder.config, encoder.params, directory / "text")
    encoder.tokenizer.save_pretrained(str(directory / "text"))
    for name, model in zip(STAGES, models):
        stages.save_model(model, directory / name, dtype)

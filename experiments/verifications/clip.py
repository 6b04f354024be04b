"""CLIP in the transformers layout, against transformers: both towers, or one.

Compared are the states of each tower, its embedding (without a projection, its pooled state), and the logits of a CLIP
with both towers, whose embeddings are unit vectors. The image is synthetic. Without a tokenizer beside the weights the
package's is used, or random tokens for another vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verifications.inputs import Inputs, picture
from experiments.verifications.libraries import Libraries, freed, to_numpy
from experiments.verifications.rows import Row, arrays
from jaxdiff.models.clip import normalised
from jaxdiff.nets import clip as nets
from jaxdiff.text.clip_tokenizer import clip_tokenizer
from jaxdiff.text.tokenizer import load_tokenizer, tokenize, with_special_tokens
from jaxdiff.weights import clip, hub

TOWERS = {"clip": None, "clip_text_model": "text", "clip_vision_model": "image"}
"""The only tower of each model_type."""


def compare(places: Sequence[str | Path], inputs: Inputs, libraries: Libraries) -> Iterator[Row]:
    """The rows of one model. ValueError for an unsupported one."""
    (place,) = places
    folder = hub.directory_of(place, "CLIP", variant=inputs.variant)
    settings = hub.read_json(folder / "config.json", "CLIP")
    config, ours = freed(_ours, folder, settings, inputs)
    theirs = freed(_theirs, folder, settings, inputs, libraries, config)
    for name, array in ours.items():
        stage, _, what = name.partition(" ")
        yield arrays(stage, what, array, theirs[name], inputs.limits)


def _ours(folder: Path, settings: dict[str, Any], inputs: Inputs) -> tuple[nets.CLIPConfig, dict[str, np.ndarray]]:
    load = {None: clip.load, "text": clip.load_text, "image": clip.load_image}[TOWERS[settings["model_type"]]]
    config, params = load(folder, inputs.dtype, variant=inputs.variant)
    towers: dict[str, nets.TowerOutput] = {}
    if config.text is not None:
        towers["text"] = _text(config, params, jnp.asarray(_ids(folder, config.text, inputs)))
    if config.image is not None:
        towers["image"] = _image(config, params, _pixels(config.image))
    outputs: dict[str, Any] = {f"{tower} states": output.states for tower, output in towers.items()}
    if len(towers) == 2:
        a, b = (nets.l2_normalize(output.embedding) for output in towers.values())
        logits = np.exp(np.asarray(params["logit_scale"], np.float32)) * np.asarray(a @ b.T)
        outputs |= {"text embedding": a, "image embedding": b, "both logits": logits}
    else:
        [(tower, output)] = towers.items()
        outputs[f"{tower} embedding"] = output.pooled if output.embedding is None else output.embedding
    return config, {name: np.asarray(array) for name, array in outputs.items()}


@partial(jax.jit, static_argnums=0)
def _text(config: nets.CLIPConfig, params: Any, ids: jax.Array) -> nets.TowerOutput:
    return nets.CLIP(config).apply({"params": params}, ids, method="embed_text")


@partial(jax.jit, static_argnums=0)
def _image(config: nets.CLIPConfig, params: Any, image: jax.Array) -> nets.TowerOutput:
    return nets.CLIP(config).apply({"params": params}, image, method="embed_image")


def _ids(folder: Path, tower: nets.TextTowerConfig, inputs: Inputs) -> np.ndarray:
    vocab = nets.TextTowerConfig().vocab
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
    elif tower.vocab == vocab:
        tokenizer = clip_tokenizer()
    else:
        ids = np.random.default_rng(inputs.seed).integers(0, tower.vocab, (len(inputs.prompts), tower.length), np.int32)
        ids[:, -1] = tower.vocab - 1 if tower.eos_id is None else tower.eos_id
        return ids
    end = tokenizer.eos_token_id if tower.eos_id is None else tower.eos_id
    return tokenize(with_special_tokens(tokenizer, end, end), list(inputs.prompts), tower.length, tower.vocab).ids


def _pixels(tower: nets.ImageTowerConfig) -> jax.Array:
    return normalised(jnp.asarray(picture(tower.resolution, tower.resolution)))


def _theirs(
    folder: Path, settings: dict[str, Any], inputs: Inputs, libraries: Libraries, config: nets.CLIPConfig
) -> dict[str, np.ndarray]:
    name = (settings.get("architectures") or ["CLIPModel"])[0]
    kind = getattr(libraries.transformers, name, None)
    if kind is None or not name.startswith("CLIP"):
        raise ValueError(f"{folder / 'config.json'}: architectures = {name!r} is no class of transformers' CLIP")
    network = libraries.loaded(kind, folder, inputs.variant)
    given = {}
    if config.text is not None:
        given["input_ids"] = libraries.tensor(_ids(folder, config.text, inputs)).long()
    if config.image is not None:
        given["pixel_values"] = libraries.images(_pixels(config.image))
    with libraries.torch.inference_mode():
        found = network(**given)
    if len(given) == 2:
        outputs = {
            "text states": found.text_model_output.last_hidden_state,
            "text embedding": found.text_embeds,
            "image states": found.vision_model_output.last_hidden_state,
            "image embedding": found.image_embeds,
            "both logits": found.logits_per_text,
        }
    else:
        tower = "image" if config.text is None else "text"
        embedding = found.pooler_output if config.width is None else getattr(found, f"{tower}_embeds")
        outputs = {f"{tower} states": found.last_hidden_state, f"{tower} embedding": embedding}
    return {name: to_numpy(tensor) for name, tensor in outputs.items()}

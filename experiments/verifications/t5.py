"""T5 in the transformers layout, against transformers: the encoder's states, and the decoder's logits if there is one.

Without a tokenizer beside the weights both read random tokens.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verifications.inputs import Inputs
from experiments.verifications.libraries import Libraries, freed, to_numpy
from experiments.verifications.rows import Row, arrays
from jaxdiff.nets import t5 as nets
from jaxdiff.text.tokenizer import Tokens, load_tokenizer, tokenize, with_special_tokens
from jaxdiff.weights import hub, t5

LENGTH = 77
"""Tokens per caption."""
CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
"""transformers' prefixes, by model_type."""


class _Outputs(NamedTuple):
    states: np.ndarray
    logits: np.ndarray | None


def compare(places: Sequence[str | Path], inputs: Inputs, libraries: Libraries) -> Iterator[Row]:
    """The rows of one model. ValueError for an unsupported one."""
    (place,) = places
    folder = hub.directory_of(place, "T5", variant=inputs.variant)
    tokens = _tokens(folder, inputs)
    ours = freed(_ours, folder, inputs, tokens)
    theirs = freed(_theirs, folder, inputs, libraries, tokens, ours.logits is not None)
    mask = tokens.mask[..., None]  # the states of padding are arbitrary
    yield arrays("encoder", "states", mask * ours.states, mask * theirs.states, inputs.limits)
    if ours.logits is not None:
        yield arrays("decoder", "logits", ours.logits, theirs.logits, inputs.limits)


def _tokens(folder: Path, inputs: Inputs) -> Tokens:
    config = t5.read_config(folder / "config.json")
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "spiece.model")):
        tokenizer = with_special_tokens(load_tokenizer(folder), config.pad_id, config.eos_id)
        return tokenize(tokenizer, list(inputs.prompts), LENGTH, config.vocab)
    rng, shape = np.random.default_rng(inputs.seed), (len(inputs.prompts), LENGTH)
    return Tokens(rng.integers(0, config.vocab, shape, np.int32), np.ones(shape, bool))


def _ours(folder: Path, inputs: Inputs, tokens: Tokens) -> _Outputs:
    config, params = t5.load(folder, inputs.dtype, variant=inputs.variant)
    ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    states = _states(config, nets.encoder_params(params), ids, mask)
    logits = None
    if config.decoder_layers:
        targets = nets.shift_right(ids, config.decoder_start_id)
        logits = np.asarray(_logits(config, params, ids, mask, targets))
    return _Outputs(np.asarray(states), logits)


@partial(jax.jit, static_argnums=0)
def _states(config: nets.T5Config, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return nets.T5Encoder(config).apply({"params": params}, ids, mask)


@partial(jax.jit, static_argnums=0)
def _logits(config: nets.T5Config, params: Any, ids: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
    return nets.T5(config).apply({"params": params}, ids, mask, targets)


def _theirs(folder: Path, inputs: Inputs, libraries: Libraries, tokens: Tokens, decodes: bool) -> _Outputs:
    prefix = CLASSES[hub.read_json(folder / "config.json", "T5")["model_type"]]
    name = f"{prefix}{'ForConditionalGeneration' if decodes else 'EncoderModel'}"
    network = libraries.loaded(getattr(libraries.transformers, name), folder, inputs.variant)
    given = {"input_ids": libraries.tensor(tokens.ids).long(), "attention_mask": libraries.tensor(tokens.mask).long()}
    with libraries.torch.inference_mode():
        if not decodes:
            return _Outputs(to_numpy(network(**given).last_hidden_state), None)
        start = network.config.decoder_start_token_id or 0
        targets = libraries.torch.nn.functional.pad(given["input_ids"][:, :-1], (1, 0), value=start)
        found = network(**given, decoder_input_ids=targets)
        return _Outputs(to_numpy(found.encoder_last_hidden_state), to_numpy(found.logits))

"""T5 in the transformers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Reads v1.0, v1.1, Flan-T5, ByT5, mT5 and UMT5: the full model or only its encoder, one file or shards with an index.
Every tensor must be a parameter or a known duplicate; any other is an error.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import trees
from jaxdiff.nets.t5 import T5, T5Config, T5Encoder
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import check_vocabulary, load_tokenizer, with_special_tokens
from jaxdiff.weights import hub, sizes, tree

UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
"""In the v1.0 files but used by no implementation: cross-attention has no positions."""


def load(
    path_or_id: str | Path,
    dtype: str = "float32",
    *,
    encoder_only: bool = False,
    variant: str | None = None,
    place: hub.Place = jnp.asarray,
) -> tuple[T5Config, dict]:
    """Load configuration and parameters from a directory or hub id; leaves in `dtype`, "float32" or "bfloat16".

    With `encoder_only`, or from a checkpoint without a decoder, the parameters are those of `T5Encoder` and
    `decoder_layers` is 0. variant: "fp16" reads the files of that name. place: puts an array on its devices; tensors
    are read one at a time. Raises FileNotFoundError, or ValueError that names the invalid setting or tensors.
    """
    compute_type = hub.check_dtype(dtype)
    directory = hub.directory_of(path_or_id, "T5", variant=variant)
    config = replace(read_config(directory / "config.json"), dtype=compute_type)
    tensors = hub.open_tensors(directory, variant)
    if encoder_only or not any(key.startswith("decoder.") for key in tensors):
        config = replace(config, decoder_layers=0)
    elif not config.decoder_layers:
        raise ValueError(f"{directory}: num_decoder_layers = 0 in config.json, but there is a decoder")
    else:
        config = replace(config, tied=_is_tied(config, tensors))
    tensors = _without_copies(config, tensors, directory)
    shapes = sizes.shapes(_init, config, str(directory / "config.json"))
    return config, hub.load_params(tensors, shapes, key_map(shapes), dtype, place, str(directory))


def load_text_encoder(
    path_or_id: str | Path,
    length: int,
    dtype: str = "float32",
    *,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    place: hub.Place = jnp.asarray,
) -> T5TextEncoder:
    """Load the frozen encoder and its tokenizer from a directory or hub id. length: tokens per caption.

    tokenizer: its directory, if not beside the weights. Missing padding or end tokens are taken from config.json.
    """
    directory = hub.directory_of(path_or_id, "T5", variant=variant)
    settings = read_config(directory / "config.json")  # validated before the tokenizer library reads it
    loaded = load_tokenizer(directory if tokenizer is None else tokenizer)
    check_vocabulary(loaded, settings.vocab, str(directory))
    loaded = with_special_tokens(loaded, settings.pad_id, settings.eos_id)
    config, params = load(directory, dtype, encoder_only=True, variant=variant, place=place)
    return T5TextEncoder(config, params, loaded, length)


def export(config: T5Config, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors, each atomically, for transformers.

    The class is T5ForConditionalGeneration, or T5EncoderModel if `params` has no decoder. ValueError if `params` does
    not fit `config`, OSError if writing fails.
    """
    directory = Path(directory)
    if "decoder" not in params:
        config = replace(config, decoder_layers=0)
    trees.check_tree(params, _shapes(config), "the T5 to export")
    hub.write_params(directory / tree.PARAMS, params, key_map(params), dtype)
    hub.write_json(directory / "config.json", _hub_config(config, dtype))


def read_config(path: Path) -> T5Config:
    """Read a transformers config.json. ValueError that names a missing or unsupported setting."""
    values = hub.read_json(path, "T5")
    lacking = [theirs for theirs in REQUIRED.values() if theirs not in values]
    if lacking:
        raise ValueError(f"{path} lacks the setting '{lacking[0]}'")
    config = hub.Group(path, {name: value for name, value in values.items() if value is not None or name in REQUIRED})
    config.require("quantization_config", (None,))
    config.require("model_type", ("t5", "mt5", "umt5"))
    config.require("feed_forward_proj", tuple(FEED_FORWARD), "relu")
    gated = FEED_FORWARD[config.values.get("feed_forward_proj", "relu")]
    config.require("dense_act_fn", ("gelu_new",) if gated else ("relu",), "gelu_new" if gated else "relu")
    bounds = sizes.BOUNDS[T5Config]
    required: dict[str, Any] = {ours: config.size(theirs, None, *bounds[ours]) for ours, theirs in REQUIRED.items()}
    ids: dict[str, Any] = {
        ours: config.size(theirs, getattr(T5Config, ours), 0, required["vocab"] - 1) for ours, theirs in IDS.items()
    }
    buckets = config.size(OPTIONAL["buckets"], T5Config.buckets, *bounds["buckets"])
    tied = config.flag("tie_word_embeddings", True)
    return T5Config(
        **required,
        **ids,
        decoder_layers=config.size(OPTIONAL["decoder_layers"], required["layers"], *bounds["decoder_layers"]),
        buckets=buckets,
        max_distance=config.size(OPTIONAL["max_distance"], T5Config.max_distance, buckets // 2 + 1),
        eps=config.fraction(OPTIONAL["eps"], T5Config.eps),
        gated=gated,
        tied=tied,
        bias_per_layer=config.values["model_type"] == "umt5",
        # mT5's logits are never scaled, although transformers 5 writes "tied" for it too.
        scale_logits=config.flag("scale_decoder_outputs", tied and config.values["model_type"] != "mt5"),
    )


REQUIRED = {
    "vocab": "vocab_size",
    "d_model": "d_model",
    "d_kv": "d_kv",
    "d_ff": "d_ff",
    "layers": "num_layers",
    "heads": "num_heads",
}
OPTIONAL = {
    "decoder_layers": "num_decoder_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
IDS = {"pad_id": "pad_token_id", "eos_id": "eos_token_id", "decoder_start_id": "decoder_start_token_id"}
FEED_FORWARD = {"relu": False, "gated-gelu": True}
"""transformers' names of T5's feed-forward layers, and whether each is gated."""


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path, joined by "/", to its transformers name."""
    return hub.names(trees.flatten(params), RULES)


RULES = (
    ("shared/embedding", "shared.weight"),
    ("head/kernel", "lm_head.weight"),
    ("{stack}/norm/scale", "{stack}.final_layer_norm.weight"),
    ("{stack}/relative_bias/embedding", "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("{stack}/relative_bias_{i}/embedding", "{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("{stack}/block_{i}/attention_norm/scale", "{stack}.block.{i}.layer.0.layer_norm.weight"),
    ("{stack}/block_{i}/attention/{part}/kernel", "{stack}.block.{i}.layer.0.SelfAttention.{part}.weight"),
    ("decoder/block_{i}/cross_attention_norm/scale", "decoder.block.{i}.layer.1.layer_norm.weight"),
    ("decoder/block_{i}/cross_attention/{part}/kernel", "decoder.block.{i}.layer.1.EncDecAttention.{part}.weight"),
    ("encoder/block_{i}/feed_forward_norm/scale", "encoder.block.{i}.layer.1.layer_norm.weight"),
    ("encoder/block_{i}/feed_forward/{part}/kernel", "encoder.block.{i}.layer.1.DenseReluDense.{part}.weight"),
    ("decoder/block_{i}/feed_forward_norm/scale", "decoder.block.{i}.layer.2.layer_norm.weight"),
    ("decoder/block_{i}/feed_forward/{part}/kernel", "decoder.block.{i}.layer.2.DenseReluDense.{part}.weight"),
)


def _hub_config(config: T5Config, dtype: str) -> dict[str, Any]:
    with_decoder = config.decoder_layers > 0
    family = "UMT5" if config.bias_per_layer else "T5"
    names = REQUIRED | OPTIONAL | IDS
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    return values | {
        "num_decoder_layers": config.decoder_layers or config.layers,
        "architectures": [f"{family}{'ForConditionalGeneration' if with_decoder else 'EncoderModel'}"],
        "model_type": family.lower(),
        "is_encoder_decoder": with_decoder,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scale_logits,
        "dropout_rate": 0.0,
        "dtype": dtype,
    }


def _shapes(config: T5Config) -> dict:
    return sizes.shapes_of(_init, config)


def _init(config: T5Config) -> dict:
    ids, mask, key = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), jax.random.key(0)
    if config.decoder_layers:
        return T5(config).init(key, ids, mask, ids)["params"]
    return T5Encoder(config).init(key, ids, mask)["params"]


def _is_tied(config: T5Config, tensors: Mapping[str, hub.Stored]) -> bool:
    """Whether the output layer is the embedding. transformers 5 writes "tied" for every model, so the tensors decide;
    if the settings say untied, the output layer's tensor must be present."""
    head, embedding = tensors.get(HEAD), _embedding(config, tensors)
    if head is None or not config.tied:
        return config.tied
    return embedding is not None and _same(head, embedding)


SHARED, HEAD = "shared.weight", "lm_head.weight"
EMBEDDINGS = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""The possible names of the embedding in a file."""


def _embedding(config: T5Config, tensors: Mapping[str, hub.Stored]) -> hub.Stored | None:
    """The embedding, under the name of either stack or, for v1.0, of the tied output layer.

    "tied" alone does not identify v1.0: transformers 5 also writes it for v1.1, whose output layer differs. It scales
    the logits only for v1.0.
    """
    names = (*EMBEDDINGS, *([HEAD] if config.tied and config.scale_logits else []))
    return next((tensors[name] for name in names if name in tensors), None)


def _without_copies(config: T5Config, tensors: Mapping[str, hub.Stored], directory: Path) -> dict[str, hub.Stored]:
    """`tensors` with the embedding under its own name, without its copies and, for an encoder, without the decoder.

    ValueError if a copy differs from the embedding.
    """
    embedding = _embedding(config, tensors)
    copies = (*EMBEDDINGS, *([HEAD] if config.tied else []))
    for key in copies if config.decoder_layers else EMBEDDINGS[:2]:  # an unused decoder is not read
        if key in tensors and embedding is not None and not _same(tensors[key], embedding):
            raise ValueError(f"{directory}: {key} differs from {embedding.key}, of which it should be a copy")
    left_out = UNUSED if config.decoder_layers else {k for k in tensors if k.startswith(("decoder.", "lm_head."))}
    kept = {key: tensor for key, tensor in tensors.items() if key not in {*left_out, *copies}}
    return kept if embedding is None else kept | {SHARED: embedding}


def _same(a: hub.Stored, b: hub.Stored) -> bool:
    return a == b or (a.shape == b.shape and np.array_equal(a.read(), b.read()))

"""dalle-mini and dalle-mega in their published layout ⇄ a pipeline.

DIR/config.json         settings (model_type "dallebart")
DIR/flax_model.msgpack  the transformer; layers are stacked along the first axis, or one by one
DIR/tokenizer.json      byte-pair tokens (BART's kind)
DIR/vqgan/              the decoder of its codes, if it was written here; the published one is a folder of its own
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxdiff.core import json_files, trees
from jaxdiff.core.messages import reason
from jaxdiff.core.products import TokenSpec
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.dvae import TrainedDVAE
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.systems.dalle import SAMPLING_MINI, dalle
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.bpe import TokenTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, check_vocabulary, import_transformers, special_ids
from jaxdiff.weights import dalle as code_decoders
from jaxdiff.weights import dvae, flax_files, hub, lazy, sizes, tree, vqgan
from jaxdiff.weights.tree import Stored

CONFIG, TOKENIZER, DECODER, RANGE = "config.json", "tokenizer.json", "vqgan", "image_range"
SPARE = 64
"""Maximum entries between the last code and the start token; dalle-mega has 31 unused ones in all."""
TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FIXED = {
    "activation_function": "gelu",
    "ln_type": "layernorm",
    "ln_positions": "normformer",
    "use_bias": False,
    "use_glu": True,
    "use_head_scale": False,
    "use_cosine_attention": False,
    "use_absolute_position_embeddings": True,
    "use_swin_position_embeddings": False,
    "use_deepnet_scaling": False,
    "use_alibi": False,
    "sinkhorn_iters": 1,
    "use_final_ln_encoder": True,
    "use_final_ln_decoder": True,
    "force_ln_scale": False,
    "scale_embedding": False,
    "tie_word_embeddings": False,
}
"""The supported value of each setting, which is also its default."""
READ = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_vocab_size": 50264,
    "image_vocab_size": 16384,
    "image_length": 256,
    "max_text_length": 64,
    "normalize_text": False,
}
"""The settings that are read, with their defaults."""


def is_dalle_mini(folder: str | Path) -> bool:
    """Whether the folder has a model of this layout."""
    try:
        return json_files.read_object(Path(folder) / CONFIG).get("model_type") == "dallebart"
    except (OSError, ValueError):
        return False


def load(
    folder: str | Path,
    vae: str | Path | None = None,
    text: TextEncoder | None = None,
    dtype: str | None = None,
    place: hub.Place = jnp.asarray,
) -> Pipeline:
    """The pipeline of a folder. vae: the decoder of its codes, as `weights/dalle.py: load_decoder` reads it; by default
    DIR/vqgan. text: replaces its tokenizer. dtype: of parameters and computation; None: float32.

    Raises FileNotFoundError, or ValueError that names the invalid setting, tensors or decoder.
    """
    folder = Path(folder)
    inner = folder / DECODER
    if vae is None and not inner.is_dir():
        raise ValueError(f"{folder} has no decoder of its codes: name the folder of its VQGAN (--vae)")
    decoder = code_decoders.load_decoder(inner if vae is None else vae)
    if isinstance(decoder, VQCodes):
        decoder = replace(decoder, unit=reads_unit_images(folder / CONFIG))
    generator = load_generator(folder, decoder.consumes, dtype or "float32", place)
    return dalle(load_text(folder) if text is None else text, generator, decoder)


def load_text(folder: str | Path) -> TokenTextEncoder:
    """The tokenizer of a folder. Raises as `load`."""
    network, simplify = read_config(Path(folder) / CONFIG)
    path = Path(folder) / TOKENIZER
    tokenizer = _tokenizer(path)
    check_vocabulary(tokenizer, network.vocab, str(path))
    if not special_ids(tokenizer):
        raise ValueError(f"{path}: an empty caption has no tokens, and the model reads its start and end")
    return TokenTextEncoder(tokenizer, network.text_length, simplify)


def load_generator(
    folder: str | Path, product: TokenSpec, dtype: str = "float32", place: hub.Place = jnp.asarray
) -> TrainedAutoregressive:
    """The transformer of a folder. product: the codes of its decoder. Raises as `load`."""
    folder, text = Path(folder), load_text(folder)
    network, _ = read_config(folder / CONFIG, hub.check_dtype(dtype))
    if not 0 <= network.codes - product.classes <= SPARE:
        raise ValueError(f"the decoder has {product.classes} codes, the transformer of {folder} {network.codes}")
    model = AutoregressiveModel(
        replace(network, codes=product.classes), product, text_weight=0.0, null=tuple(special_ids(text.tokenizer))
    )
    shapes = shapes_of(network, str(folder))
    tensors = one_by_one(flax_files.read_index(folder / flax_files.FILE), str(folder))
    params = flax_files.load_params(tensors, shapes, key_map(shapes), dtype, place, str(folder))
    return TrainedAutoregressive(model, params, SAMPLING_MINI, text.fingerprint)


def export(pipeline: Pipeline, folder: str | Path, dtype: str = "float32") -> None:
    """The inverse of `load`, with the decoder in DIR/vqgan. ValueError for another pipeline, before anything is
    written; OSError if writing fails."""
    folder, text, generator = Path(folder), pipeline.text_encoder, pipeline.generator
    if not isinstance(generator, TrainedAutoregressive) or len(pipeline.decoders) != 1:
        raise ValueError("not a transformer of codes with one decoder")
    network, decoder = generator.model.network, pipeline.decoders[0]
    if not isinstance(network, EncoderDecoderConfig) or network.rows != network.columns:
        raise ValueError("not an encoder-decoder of a square grid of codes")
    if not isinstance(text, TokenTextEncoder):
        raise ValueError("the pipeline has no tokenizer: load it with its own text encoder")
    if isinstance(decoder, VQCodes):
        vqgan.export(decoder.autoencoder, folder / DECODER, dtype)
    elif isinstance(decoder, TrainedDVAE):
        dvae.save(decoder, folder / DECODER, dtype)
    else:
        raise ValueError("the decoder is neither a dVAE nor a VQ autoencoder")
    save(folder, network, generator.params, text, dtype)
    if not isinstance(decoder, VQCodes) or not decoder.unit:
        hub.write_json(folder / CONFIG, described(network, text.simplify) | {RANGE: [-1, 1]})


def save(
    folder: Path, network: EncoderDecoderConfig, params: dict, text: TokenTextEncoder, dtype: str = "float32"
) -> None:
    """Writes a transformer and its tokenizer as published, without a decoder. OSError if writing fails."""
    named = key_map(params)
    tensors = {named[path]: lazy.held(leaf) for path, leaf in trees.flatten(params).items()}
    flax_files.write(folder / flax_files.FILE, stacked(tensors), dtype)
    text.tokenizer.save_pretrained(str(folder))
    hub.write_json(folder / CONFIG, described(network, text.simplify))


def reads_unit_images(path: Path) -> bool:
    """Whether the codes are those of images in [0, 1]. dalle-mini's are, though its VQGAN was trained on [-1, 1]; this
    package writes the range of others."""
    values = hub.read_json(path, "dalle-mini")
    hub.require(path, values, RANGE, ([0, 1], [-1, 1]), [0, 1])
    return values.get(RANGE, [0, 1]) == [0, 1]


def read_config(path: Path, dtype: hub.Dtype = "float32") -> tuple[EncoderDecoderConfig, bool]:
    """Settings, and whether captions are simplified. All entries before the start token count as codes. ValueError that
    names an unsupported setting."""
    values = hub.read_json(path, "dalle-mini")
    hub.require(path, values, "model_type", ("dallebart",))
    group = hub.Group(path, READ | {name: value for name, value in values.items() if value is not None})
    for name, value in FIXED.items():
        group.require(name, (value,), value)
    heads, feed_forward = (group.size(f"encoder_{name}") for name in ("attention_heads", "ffn_dim"))
    group.require("decoder_attention_heads", (heads,))
    group.require("decoder_ffn_dim", (feed_forward,))
    width, entries = group.size("d_model"), group.size("image_vocab_size") + 1
    if width % heads:
        raise group.error("d_model", width, f"multiples of {heads} heads")
    length = group.size("image_length", None, *sizes.STEPS)
    side = math.isqrt(length)
    if side**2 != length:
        raise group.error("image_length", length, "squares")
    start = group.size("decoder_start_token_id", entries - 1, 1, entries - 1)
    config = EncoderDecoderConfig(
        vocab=group.size("encoder_vocab_size"),
        text_length=group.size("max_text_length", None, *sizes.STEPS),
        codes=start,
        entries=entries,
        start=start,
        rows=side,
        columns=side,
        width=width,
        heads=heads,
        encoder_layers=group.size("encoder_layers", None, *sizes.DEPTH),
        decoder_layers=group.size("decoder_layers", None, *sizes.DEPTH),
        feed_forward=feed_forward,
        execution=ExecutionConfig(dtype),
    )
    return config, group.flag("normalize_text", False)


def described(network: EncoderDecoderConfig, simplify: bool) -> dict[str, Any]:
    """The settings that `export` writes."""
    values: Mapping[str, Any] = {
        "d_model": network.width,
        "encoder_layers": network.encoder_layers,
        "decoder_layers": network.decoder_layers,
        "encoder_attention_heads": network.heads,
        "decoder_attention_heads": network.heads,
        "encoder_ffn_dim": network.feed_forward,
        "decoder_ffn_dim": network.feed_forward,
        "encoder_vocab_size": network.vocab,
        "image_vocab_size": network.entries - 1,
        "image_length": network.tokens,
        "max_text_length": network.text_length,
        "decoder_start_token_id": network.start,
        "normalize_text": simplify,
    }
    return {"architectures": ["DalleBart"], "model_type": "dallebart", "is_encoder_decoder": True, **FIXED, **values}


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path to its published name, with layers one by one; both joined by "/"."""
    return hub.names(trees.flatten(params), RULES, WORDS)


def _layer_rules(side: str, layers: Mapping[str, str]) -> list[tuple[str, str]]:
    """side: encoder or decoder. layers: the published name of each of ours that is not in both."""
    place = f"model/{side}/layers/FlaxBart{side.capitalize()}Layer_{{i}}"
    return [
        (f"{side}_{{i}}/feed_forward/{{layer}}/{{leaf}}", f"{place}/GLU_0/{{layer}}/{{leaf}}"),
        *((f"{side}_{{i}}/{ours}/{{leaf}}", f"{place}/{theirs}/{{leaf}}") for ours, theirs in layers.items()),
    ]


_NORMS = {"pre_norm": "LayerNorm_0", "post_norm": "LayerNorm_1"}
_TEXT_NORMS = {"text_pre_norm": "LayerNorm_2", "text_post_norm": "LayerNorm_3"}
_HEADS = {"attention/{layer}": "FlaxBartAttention_0/{layer}"}
RULES = (
    *_layer_rules("encoder", _NORMS | _HEADS),
    *_layer_rules("decoder", _NORMS | _TEXT_NORMS | _HEADS | {"text_attention/{layer}": "FlaxBartAttention_1/{layer}"}),
    ("{side}_embedding/{leaf}", "model/{side}/embed_tokens/{leaf}"),
    ("{side}_position/{leaf}", "model/{side}/embed_positions/{leaf}"),
    ("{side}_embedding_norm/{leaf}", "model/{side}/layernorm_embedding/{leaf}"),
    ("{side}_norm/{leaf}", "model/{side}/final_ln/{leaf}"),
    ("head/{leaf}", "lm_head/{leaf}"),
)
WORDS = {
    "text": "encoder",
    "code": "decoder",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "out_proj",
    "gate": "Dense_0",
    "up": "Dense_1",
    "down": "Dense_2",
    "pre_norm": "LayerNorm_0",
    "middle_norm": "LayerNorm_1",
}
STACK = re.compile(r"(.+/layers/FlaxBart(?:En|De)coderLayer)s/(.+)")
LAYER = re.compile(r"(.+/layers/FlaxBart(?:En|De)coderLayer)_(\d+)/(.+)")


def one_by_one(tensors: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """The tensors with stacked layers as one tensor for each; nothing is read. ValueError for a layer in both forms."""
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = STACK.fullmatch(name)
        if match is None or not tensor.shape or tensor.shape[0] > sizes.DEPTH.most or tensor.dtype not in tree.TYPES:
            layers = {name: tensor}
        else:
            size = math.prod(tensor.shape[1:]) * tree.TYPES[tensor.dtype].itemsize
            layers = {
                f"{match[1]}_{i}/{match[2]}": tensor._replace(shape=tensor.shape[1:], start=tensor.start + i * size)
                for i in range(tensor.shape[0])
            }
        if both := result.keys() & layers.keys():
            raise ValueError(f"{where} has layers stacked and one by one: {sizes.names(sorted(both))}")
        result |= layers
    return result


def stacked(tensors: Mapping[str, tree.Unread]) -> dict[str, tree.Unread]:
    """The inverse of `one_by_one`; nothing is read."""
    result: dict[str, tree.Unread] = {}
    layers: dict[str, dict[int, tree.Unread]] = {}
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            layers.setdefault(f"{match[1]}s/{match[3]}", {})[int(match[2])] = tensor
    return result | {name: lazy.stacked([each[i] for i in range(len(each))]) for name, each in layers.items()}


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a tokenizer.json; the class that tokenizer_config.json may name is not needed."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path.parent}: {path.name} is missing")
    json_files.read_object(path, "a tokenizer")
    try:
        inner = Tokenizer.from_file(str(path))
        inner.no_padding()
        inner.no_truncation()
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer: {reason(error)}") from error
    return wrapped(inner, str(path))


def wrapped(inner: Tokenizer, where: str) -> PreTrainedTokenizerBase:
    """With the special tokens that it has. ValueError, naming `where`, without <pad> or </s>."""
    known = inner.get_vocab()
    special = {name: token for name, token in TOKENS.items() if token in known}
    if not {"pad_token", "eos_token"} <= special.keys():
        raise ValueError(f"{where}: not a tokenizer of BART's kind: it has no <pad> or </s>")
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **special
    )


def shapes_of(network: EncoderDecoderConfig, where: str) -> dict:
    """Of the parameters. ValueError, naming `where`, if the settings are invalid."""
    return sizes.shapes(_init, replace(network, execution=ExecutionConfig()), where)


def _init(network: EncoderDecoderConfig) -> dict:
    text = jnp.zeros((1, network.text_length), jnp.int32)
    codes = jnp.zeros((1, network.rows, network.columns), jnp.int32)
    return network.module().init(jax.random.key(0), text, text == 0, codes)["params"]

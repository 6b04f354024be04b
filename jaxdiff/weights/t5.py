"""T5 in the transformers layout (config.json + safetensors) ⇄ configuration and parameter tree.

Reads v1.0, v1.1, Flan-T5, ByT5 and mT5, the whole model or its encoder alone, one file or shards with an index. Every
tensor is accounted for: it is read, or it is one of the named duplicates, or the checkpoint is refused.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Array

from jaxdiff.nets.t5 import T5, T5Config, T5Encoder
from jaxdiff.text.t5 import TextEncoder
from jaxdiff.text.tokenizer import load_tokenizer
from jaxdiff.weights import tree

UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
"""In the v1.0 files, and read by no implementation: cross-attention has no positions."""


def load(
    path_or_id: str | Path,
    dtype: str = "float32",
    *,
    encoder_only: bool = False,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
) -> tuple[T5Config, dict]:
    """Configuration and parameters of a directory or hub id; floating leaves in `dtype`, "float32" or "bfloat16".

    With `encoder_only`, or from a checkpoint that has no decoder, the parameters are those of `T5Encoder` and
    `decoder_layers` is 0. Tensors are read one at a time and handed to `place`, which puts them on devices.
    Raises FileNotFoundError, or ValueError that names the setting or the tensors at fault.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    directory = directory_of(path_or_id)
    config = replace(read_config(directory / "config.json"), dtype=dtype)
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        if encoder_only or not any(key.startswith("decoder.") for key in tensors):
            config = replace(config, decoder_layers=0)
        else:
            config = replace(config, tied=_is_tied(config, tensors))
        tensors = _accounted(config, tensors)
        paths = {hub_key(path): path for path in tree.flatten(_shapes(config))}
        tree.check_shapes({key: tensor.shape for key, tensor in tensors.items()}, _hub_shapes(config), str(directory))
        flat = {}
        for key, path in paths.items():
            array = tensors[key].read().astype(jnp.dtype(dtype), copy=False)
            flat[path] = place(np.ascontiguousarray(array.T) if path.endswith("/kernel") else array)
    return config, tree.unflatten(flat)


def load_text_encoder(
    path_or_id: str | Path,
    length: int,
    dtype: str = "float32",
    *,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
) -> TextEncoder:
    """The frozen encoder of a directory or hub id with its tokenizer, `length` tokens a caption."""
    directory = directory_of(path_or_id)
    tokenizer = load_tokenizer(directory)
    config, params = load(directory, dtype, encoder_only=True, place=place)
    if len(tokenizer) > config.vocab:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} ids, the embedding only {config.vocab}")
    return TextEncoder(config, params, tokenizer, length)


def export(config: T5Config, params: dict, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors as transformers' T5ForConditionalGeneration, or T5EncoderModel, opens.

    Parameters without a decoder make the latter. ValueError where `params` does not fit `config`, OSError where
    something cannot be written; each file appears whole or not at all.
    """
    directory = Path(directory)
    if "decoder" not in params:
        config = replace(config, decoder_layers=0)
    tree.check_tree(params, _shapes(config), "the T5 to export")
    tensors = {}
    for path, leaf in tree.flatten(params).items():
        array = np.asarray(leaf).astype(jnp.dtype(dtype))
        tensors[hub_key(path)] = np.ascontiguousarray(array.T if path.endswith("/kernel") else array)
    tree.write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    with tree.replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(_hub_config(config, dtype), indent=2) + "\n")


def read_config(path: Path) -> T5Config:
    """The settings in a transformers config.json. ValueError that names a setting that is missing or not supported."""
    if not path.is_file():
        raise FileNotFoundError(f"no T5 at {path.parent}: config.json is missing")
    try:
        values = json.loads(path.read_text())
        given = {name: values[theirs] for name, theirs in REQUIRED.items()}
        given |= {name: values[theirs] for name, theirs in OPTIONAL.items() if values.get(theirs) is not None}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not JSON with settings: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks the setting {error}") from error
    _require(path, values, "model_type", ("t5", "mt5"))
    _require(path, values, "feed_forward_proj", tuple(FEED_FORWARD), "relu")
    gated = FEED_FORWARD[values.get("feed_forward_proj", "relu")]
    _require(path, values, "dense_act_fn", ("gelu_new",) if gated else ("relu",), "gelu_new" if gated else "relu")
    tied = values.get("tie_word_embeddings") is not False
    return T5Config(
        decoder_layers=given.pop("decoder_layers", given["layers"]),
        gated=gated,
        tied=tied,
        scale_logits=bool(values.get("scale_decoder_outputs", tied)),
        **given,
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
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "decoder_start_id": "decoder_start_token_id",
}
FEED_FORWARD = {"relu": False, "gated-gelu": True}
"""transformers' name of each feed-forward that T5 was published with, and whether it is the gated one."""


def hub_key(path: str) -> str:
    """transformers' name of one of our parameters, its path joined by "/"."""
    if path in ("shared/embedding", "head/kernel"):
        return {"shared/embedding": "shared.weight", "head/kernel": "lm_head.weight"}[path]
    stack, part, *rest = path.split("/")
    if part == "norm":
        return f"{stack}.final_layer_norm.weight"
    if part == "relative_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    last = 2 if stack == "decoder" else 1
    layer = {
        "attention_norm": "layer.0.layer_norm",
        "attention": "layer.0.SelfAttention",
        "cross_attention_norm": "layer.1.layer_norm",
        "cross_attention": "layer.1.EncDecAttention",
        "feed_forward_norm": f"layer.{last}.layer_norm",
        "feed_forward": f"layer.{last}.DenseReluDense",
    }[rest[0]]
    return ".".join([stack, part.replace("_", "."), layer, *rest[1:-1], "weight"])


def _hub_config(config: T5Config, dtype: str) -> dict[str, Any]:
    whole = config.decoder_layers > 0
    names = REQUIRED | OPTIONAL
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    return values | {
        "num_decoder_layers": config.decoder_layers or config.layers,
        "architectures": ["T5ForConditionalGeneration" if whole else "T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": whole,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scale_logits,
        "dropout_rate": 0.0,
        "dtype": dtype,
    }


def _shapes(config: T5Config) -> dict:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), bool)
    key = jax.random.key(0)
    if config.decoder_layers:
        return jax.eval_shape(T5(config).init, key, ids, mask, ids)["params"]
    return jax.eval_shape(T5Encoder(config).init, key, ids, mask)["params"]


def _hub_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint; a Linear of PyTorch holds its matrix as (out, in)."""
    leaves = tree.flatten(_shapes(config)).items()
    return {hub_key(path): leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape for path, leaf in leaves}


class _Stored(NamedTuple):
    """A tensor that has not been read yet."""

    file: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.key).get_shape())

    def read(self) -> np.ndarray:
        array = self.file.get_tensor(self.key)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{self.key} holds {array.dtype}: quantized checkpoints are not read")
        return array


def directory_of(path_or_id: str | Path) -> Path:
    """A directory as it is; a hub id (`id@revision` for another than main) as its downloaded snapshot."""
    text = str(path_or_id)
    hub_id, _, revision = text.partition("@")
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if isinstance(path_or_id, Path) or text.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FileNotFoundError(f"no T5 at {text}: not a directory")
    wanted = ["*.json", "*.safetensors", "spiece.model"]
    try:
        directory = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{text} is neither a directory nor a hub id that could be downloaded: {reason}") from error
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{text} holds no safetensors, only pickles perhaps, which are not read: name a revision that has them "
            f"({hub_id}@refs/pr/N), or convert a copy that you trust and give its directory"
        )
    return directory


def _open(directory: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not whole.is_file() and not index.is_file():
        for pickle in sorted(directory.glob("*.bin")):
            tree.refuse_pickle(pickle)
        raise FileNotFoundError(f"no weights at {directory}: neither {whole.name} nor {index.name}")
    listed: dict[str, str] = {}
    if not whole.is_file():
        try:
            listed = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    tensors = {}
    for name in sorted(set(listed.values())) or [whole.name]:
        file = stack.enter_context(tree.open_safetensors(directory / name))
        tensors |= {key: _Stored(file, key) for key in file.keys()}  # noqa: SIM118
    lost = sorted(listed.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{index} lists {len(lost)} tensors that its shards lack ({', '.join(lost[:10])})")
    return tensors


def _is_tied(config: T5Config, tensors: Mapping[str, _Stored]) -> bool:
    """Whether the output layer is the embedding. transformers 5 writes "tied" for all, so the tensors decide; where the
    settings say that it is not, its tensor must be there."""
    if "lm_head.weight" not in tensors:
        return config.tied
    return config.tied and "shared.weight" in tensors and _same(tensors["lm_head.weight"], tensors["shared.weight"])


def _accounted(config: T5Config, tensors: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """`tensors` without what is knowingly left out: the decoder of an encoder, and copies of the embedding.

    Older files hold the embedding under each stack's name too, some under the encoder's alone.
    """
    left_out = UNUSED if config.decoder_layers else {k for k in tensors if k.startswith(("decoder.", "lm_head."))}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    embedding = "encoder.embed_tokens.weight"
    if embedding in tensors:
        tensors.setdefault("shared.weight", tensors[embedding])
    for key in (embedding, "decoder.embed_tokens.weight", *(["lm_head.weight"] if config.tied else [])):
        copy = tensors.pop(key, None)
        if copy is not None and "shared.weight" in tensors and not _same(copy, tensors["shared.weight"]):
            raise ValueError(f"{key} differs from shared.weight, of which it should be a copy")
    return tensors


def _same(a: _Stored, b: _Stored) -> bool:
    return a == b or (a.shape == b.shape and np.array_equal(a.read(), b.read()))


def _require(path: Path, values: Mapping, name: str, allowed: tuple, default: Any = None) -> None:
    value = values.get(name, default)
    if value not in allowed:
        raise ValueError(f"{path}: {name} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}")

"""The transformer of dalle-mini in min-dalle's files: encoder.pt, decoder.pt, vocab.json and merges.txt.

The two .pt files are PyTorch's pickles of tensors; nothing in them is executed (`weights/pickles.py`). min-dalle's
third file, detoker.pt, has only half of the VQGAN: the published VQGAN is read instead (`weights/vqgan.py`).
"""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxdiff.core import json_files, trees
from jaxdiff.core.messages import reason
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.text.bpe import TokenTextEncoder
from jaxdiff.text.tokenizer import check_vocabulary
from jaxdiff.weights import dalle_mini, hub, lazy, pickles, sizes, tree

HEAD = 64
"""The width of a head in both published models; the files do not say it."""
START = 16384
"""The start token of dalle-mini's own settings; the files do not say it either."""


def load(encoder: str | Path, decoder: str | Path) -> tuple[EncoderDecoderConfig, dict]:
    """Settings and float32 parameters; sizes are those of the tensors. Raises FileNotFoundError, or ValueError if a
    file is no such pickle, or its tensors do not fit together."""
    tensors: dict[str, tree.Unread] = {}
    for side, path in (("encoder", encoder), ("decoder", decoder)):
        for name, array in pickles.read_tensors(path).items():
            if array.ndim == 4 and array.shape[2:] == (1, 1):  # older files have 1×1 convolutions
                array = array[:, :, 0, 0]
            # Norms before a dense layer have no scale; PyTorch's module may have saved ones.
            if not UNSCALED.fullmatch(name) or not (array == 1).all():
                tensors[f"{side}.{name}"] = lazy.held(array)
    where = f"{encoder} and {decoder}"
    network = _sizes(tensors, where)
    shapes = dalle_mini.shapes_of(network, where)
    return network, hub.load_params(tensors, shapes, key_map(shapes), "float32", jnp.asarray, where)


def load_text(vocabulary: str | Path, merges: str | Path, network: EncoderDecoderConfig) -> TokenTextEncoder:
    """The tokenizer. Raises FileNotFoundError, or ValueError if the files are no such tokenizer, or not that of the
    network."""
    vocab = json_files.read_object(Path(vocabulary), "a vocabulary")
    try:
        lines = Path(merges).read_text(encoding="utf-8").splitlines()
        parts = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        pairs = [(first, second) for first, _, second in parts]
        inner = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        end, start = ((token, vocab[token]) for token in ("</s>", "<s>"))
        inner.post_processor = processors.RobertaProcessing(end, start, add_prefix_space=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{vocabulary} and {merges}: not a byte-pair tokenizer: {reason(error)}") from error
    tokenizer = dalle_mini.wrapped(inner, str(vocabulary))
    check_vocabulary(tokenizer, network.vocab, str(vocabulary))
    return TokenTextEncoder(tokenizer, network.text_length, simplify=True)


def key_map(params: dict) -> dict[str, str]:
    """Maps each parameter path to the file's side and its name there."""
    return hub.names(trees.flatten(params), RULES, WORDS)


def _sizes(tensors: dict[str, tree.Unread], where: str) -> EncoderDecoderConfig:
    """The settings that the shapes imply."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{where}: not min-dalle's encoder and decoder: they have no matrix {name}")
        return tensors[name].shape

    def layers(side: str) -> int:
        numbers = {match[1] for name in tensors if (match := re.match(rf"{side}\.layers\.(\d+)\.", name))}
        if len(numbers) > sizes.DEPTH.most:
            raise ValueError(f"{where}: {len(numbers)} layers: at most {sizes.DEPTH.most} are supported")
        return len(numbers)

    entries, width = shape("decoder.embed_tokens.weight")
    side = int(np.sqrt(shape("decoder.embed_positions.weight")[0]))
    start = min(START, entries - 1)
    try:
        return EncoderDecoderConfig(
            vocab=shape("encoder.embed_tokens.weight")[0],
            text_length=shape("encoder.embed_positions.weight")[0],
            codes=start,
            entries=entries,
            start=start,
            rows=side,
            columns=side,
            width=width,
            heads=max(1, width // HEAD),
            encoder_layers=layers("encoder"),
            decoder_layers=layers("decoder"),
            feed_forward=shape("encoder.layers.0.glu.fc0.weight")[0],
        )
    except ValueError as error:
        raise ValueError(f"{where}: not min-dalle's encoder and decoder: {reason(error)}") from error


_SHARED = {
    "feed_forward/{layer}": "glu.{layer}",
    "attention/{layer}": "self_attn.{layer}",
    "pre_norm": "pre_self_attn_layer_norm",
    "post_norm": "self_attn_layer_norm",
}
_DECODER = _SHARED | {
    "text_attention/{layer}": "encoder_attn.{layer}",
    "text_pre_norm": "pre_encoder_attn_layer_norm",
    "text_post_norm": "encoder_attn_layer_norm",
}
RULES = (
    *((f"encoder_{{i}}/{ours}/{{leaf}}", f"encoder.layers.{{i}}.{to}.{{leaf}}") for ours, to in _SHARED.items()),
    *((f"decoder_{{i}}/{ours}/{{leaf}}", f"decoder.layers.{{i}}.{to}.{{leaf}}") for ours, to in _DECODER.items()),
    ("{side}_embedding/{leaf}", "{side}.embed_tokens.{leaf}"),
    ("{side}_position/{leaf}", "{side}.embed_positions.{leaf}"),
    ("{side}_embedding_norm/{leaf}", "{side}.layernorm_embedding.{leaf}"),
    ("{side}_norm/{leaf}", "{side}.final_ln.{leaf}"),
    ("head/{leaf}", "decoder.lm_head.{leaf}"),
)  # fmt: skip
WORDS = {
    **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
    "text": "encoder",
    "code": "decoder",
    **{letter: f"{letter}_proj" for letter in ("q", "k", "v", "out")},
    "pre_norm": "ln0",
    "middle_norm": "ln1",
    "gate": "fc0",
    "up": "fc1",
    "down": "fc2",
}
UNSCALED = re.compile(r"(?:layers\.\d+\.(?:pre_(?:self|encoder)_attn_layer_norm|glu\.ln[01])|final_ln)\.weight")

"""A dalle-mini of the published topology and very small, with its tokenizer and VQGAN; and the same in PyTorch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small_autoencoder import random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxdiff.core.products import TokenSpec
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.systems.dalle import SAMPLING_MINI, dalle
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.bpe import TokenTextEncoder
from jaxdiff.weights import dalle_mini

VQGAN = AutoencoderConfig(
    channels=(32, 32), blocks=1, latent_channels=8, bottleneck=VQBottleneck(12, 6), attention_levels=(1,)
)
CAPTIONS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green")]


def tokenizer() -> PreTrainedTokenizerFast:
    """BART's kind: bytes in pairs, <s> 0, <pad> 1, </s> 2 and <unk> 3."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([f" {caption}" for caption in CAPTIONS], trainer)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pipeline() -> Pipeline:
    """With random parameters, none of which is 0 or its initial value."""
    text = TokenTextEncoder(tokenizer(), 8, simplify=True)
    network = EncoderDecoderConfig(
        vocab=310, text_length=8, codes=12, entries=15, start=13, rows=4, columns=4, width=12, heads=3,
        encoder_layers=2, decoder_layers=3, feed_forward=10,
    )  # fmt: skip
    model = AutoregressiveModel(network, TokenSpec(12, 2), text_weight=0.0, null=(0, 2))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    decoder = VQCodes(TrainedAutoencoder(VQGAN, random_params(VQGAN), 1.0, side=8), unit=True)
    return dalle(text, TrainedAutoregressive(model, params, SAMPLING_MINI, text.fingerprint), decoder)


def folder(path: Path) -> tuple[Path, Path]:
    """The pipeline in two folders, as published: the transformer and the VQGAN."""
    dalle_mini.export(pipeline(), path / "mini")
    (path / "mini" / "vqgan").rename(path / "vqgan")
    return path / "mini", path / "vqgan"


def in_torch(torch, tensors: dict[str, np.ndarray], ids, mask, codes) -> tuple[np.ndarray, set[str]]:
    """The logits of all entries, with PyTorch's functions, from the tensors of a file by their published names; and the
    names that were read. Three heads of width 4, start token 13; layers are stacked."""
    weights = {name: torch.tensor(np.asarray(array, np.float64)) for name, array in tensors.items()}
    functions, read = torch.nn.functional, set()

    class Layer:
        """The part of the tensors below a name, of one layer."""

        def __init__(self, name, number=None):
            self.name, self.number = name, number

        def __call__(self, name):
            full = f"{self.name}/{name}"
            read.add(full)
            return weights[full] if self.number is None else weights[full][self.number]

        def norm(self, x, name):
            scale = self(f"{name}/scale") if f"{self.name}/{name}/scale" in weights else None
            return functions.layer_norm(x, x.shape[-1:], scale, self(f"{name}/bias"), 1e-5)

        def dense(self, x, name):
            return functions.linear(x, self(f"{name}/kernel").T)

        def attention(self, x, source, allowed, name):
            q, k, v = (self.dense(y, f"{name}/{z}_proj") for y, z in ((x, "q"), (source, "k"), (source, "v")))
            q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
            logits = (q @ k.mT / 2.0).masked_fill(~allowed, -torch.inf)
            return self.dense((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}/out_proj")

        def gated(self, x):
            x = self.norm(x, "GLU_0/LayerNorm_0")
            x = functions.gelu(self.dense(x, "GLU_0/Dense_0")) * self.dense(x, "GLU_0/Dense_1")
            return self.dense(self.norm(x, "GLU_0/LayerNorm_1"), "GLU_0/Dense_2")

        def embedded(self, ids):
            x = self("embed_tokens/embedding")[ids] + self("embed_positions/embedding")[: ids.shape[1]]
            return self.norm(x, "layernorm_embedding")

    ids, codes, seen = (torch.tensor(np.asarray(x)) for x in (ids, codes, mask))
    seen = seen[:, None, None]
    encoder, decoder = Layer("model/encoder"), Layer("model/decoder")
    x = encoder.embedded(ids)
    for i in range(2):
        layer = Layer("model/encoder/layers/FlaxBartEncoderLayers", i)
        y = layer.norm(x, "LayerNorm_0")
        x = x + layer.norm(layer.attention(y, y, seen, "FlaxBartAttention_0"), "LayerNorm_1")
        x = x + layer.gated(x)
    states = encoder.norm(x, "final_ln")
    tokens = torch.cat([torch.full((len(codes), 1), 13), codes.flatten(1)[:, :-1]], 1)
    x, causal = decoder.embedded(tokens), torch.ones(16, 16, dtype=torch.bool).tril()
    for i in range(3):
        layer = Layer("model/decoder/layers/FlaxBartDecoderLayers", i)
        y = layer.norm(x, "LayerNorm_0")
        x = x + layer.norm(layer.attention(y, y, causal, "FlaxBartAttention_0"), "LayerNorm_1")
        y = layer.norm(x, "LayerNorm_2")
        x = x + layer.norm(layer.attention(y, states, seen, "FlaxBartAttention_1"), "LayerNorm_3")
        x = x + layer.gated(x)
    read.add("lm_head/kernel")
    return (decoder.norm(x, "final_ln") @ weights["lm_head/kernel"]).numpy(), read

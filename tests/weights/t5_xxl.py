"""What T5 v1.1-XXL's encoder takes in memory: `write DIR` makes one of random weights, `encode DIR` a caption with it.

Each runs in a process of its own, so that the peak is that of loading and encoding alone.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxdiff.core import trees
from jaxdiff.nets.t5 import XXL
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.weights import hub, t5, tree

BLOCKS_A_SHARD = 5


def write(directory):
    """bfloat16 in five shards, of which one at a time is in memory."""
    config = replace(XXL, decoder_layers=0, dtype="bfloat16")
    shapes = t5._shapes(config)
    names = t5.key_map(shapes)
    shards = {}
    for path, leaf in trees.flatten(shapes).items():
        block = path.split("/")[1].removeprefix("block_")
        shard = int(block) // BLOCKS_A_SHARD if block.isdigit() else (config.layers - 1) // BLOCKS_A_SHARD
        shards.setdefault(shard, []).append((path, leaf.shape))
    rng, weight_map = np.random.default_rng(0), {}
    for shard, members in sorted(shards.items()):
        file = f"model-{shard + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {names[path]: weights(rng, path, hub.theirs_shape(path, shape)) for path, shape in members}
        tree.write_safetensors(directory / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(t5._hub_config(config, "bfloat16")))
    byte_tokenizer().save_pretrained(directory)


def weights(rng, path, shape):
    """Of random sign and mantissa, as large as in a model at its start: normal numbers would take minutes."""
    exponent = 127 if path.endswith("scale") else 126 - round(np.log2(shape[-1]) / 2)
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    bits &= 0x807F
    bits |= exponent << 7
    return bits.view(ml_dtypes.bfloat16)


def encode_one(directory):
    start = time.perf_counter()
    encoder = t5.load_text_encoder(directory, 77, "bfloat16")
    loaded = time.perf_counter()
    size = sum(leaf.nbytes for leaf in trees.flatten(encoder.params).values())
    after = memory()
    text = encoder.encode(["a red star above a blue ring"])
    finite = bool(np.isfinite(text.tokens).all()) and float(np.abs(text.tokens).max()) > 0
    told = {"parameters": size, "loading": after, "peak": memory(), "finite": finite, "tokens": int(text.mask.sum())}
    told |= {"seconds_to_load": loaded - start, "seconds_to_encode": time.perf_counter() - loaded}
    print(json.dumps(told))


def memory():
    """The largest resident set of this process so far, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    {"write": write, "encode": encode_one}[sys.argv[1]](Path(sys.argv[2]))

"""What a large encoder takes in memory: its parameters, little else while it is read, and little while it encodes."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.core import trees
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.weights import hub, t5

CONFIG = T5Config(vocab=500, d_model=256, d_ff=512, heads=4, layers=8, decoder_layers=0, dtype="bfloat16")


def zeros(dtype):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), t5._shapes(CONFIG))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_one_at_a_time(dtype, tmp_path):
    t5.export(CONFIG, zeros("float32"), tmp_path, "bfloat16")
    shapes, tensors = t5._shapes(CONFIG), hub.open_tensors(tmp_path)
    sizes = [leaf.size * jnp.dtype(dtype).itemsize for leaf in trees.flatten(shapes).values()]
    names, placed = t5.key_map(shapes), []
    tracemalloc.start()
    try:
        hub.load_params(tensors, shapes, names, dtype, lambda array: placed.append(array.nbytes), "here")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert placed == sizes and sum(sizes) > 20 * max(sizes)
    # As it is in the file, in the wanted type, and in our layout.
    assert peak < 3 * max(sizes) + 200_000


def test_encoding_in_bfloat16_converts_one_layer_at_a_time():
    ids, mask = jax.ShapeDtypeStruct((1, 7), jnp.int32), jax.ShapeDtypeStruct((1, 7), bool)
    params = zeros("bfloat16")
    program = jax.jit(T5Encoder(CONFIG).apply).lower({"params": params}, ids, mask).compile()
    layer = 4 * sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]["block_0"]))
    assert program.memory_analysis().temp_size_in_bytes < 2 * layer


def run(*arguments):
    # Of one CPU device, as where it will be used.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
    script = Path(__file__).with_name("t5_xxl.py")
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_encoder_of_t5_xxl(tmp_path, capsys):
    """9.5 GB of bfloat16 on disk for a while; about three minutes."""
    try:
        run("write", tmp_path)
        assert len(list(tmp_path.glob("model-*.safetensors"))) == 5
        told = json.loads(run("encode", tmp_path))
    finally:
        for shard in tmp_path.glob("*.safetensors"):
            shard.unlink()
    with capsys.disabled():
        print(f"\nT5-XXL's encoder: {told}")
    assert told["finite"] and told["parameters"] > 9.5e9
    assert told["peak"] < 14e9

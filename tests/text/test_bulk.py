"""Very many captions: the same embeddings, whatever a caption is padded to and however the encoder is split."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text import bulk
from jaxdiff.text.bulk import BulkEncoder, batches
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.training.mesh import batch_sharding, make_mesh
from jaxdiff.training.param_sharding import ParamSharding, shardings

CONFIG = T5Config(vocab=384, d_model=32, d_kv=8, d_ff=64, layers=2, decoder_layers=0, heads=4)
CAPTIONS = ["a star", "", "x" * 19, "red", "  ", "a circle, cut", *(f"{'o' * (i % 17)} {i}" for i in range(30))]


@pytest.fixture(scope="module")
def encoder():
    ids, rng = jnp.zeros((1, 2), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(CONFIG).init, jax.random.key(0), ids, ids == 0)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return T5TextEncoder(CONFIG, params, byte_tokenizer(), 20)


@pytest.fixture(scope="module")
def expected(encoder):
    text = jax.tree.map(np.asarray, encoder.encode(CAPTIONS))
    return [row[kept] for row, kept in zip(text.tokens, text.mask)]


def close(rows, expected):
    assert [row.shape for row in rows] == [row.shape for row in expected]
    for row, wanted in zip(rows, expected):
        assert row.dtype == np.float16
        np.testing.assert_allclose(row, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(), (8,), (4, 8, 16, 64)], ids=str)
def test_the_padded_length_changes_nothing(encoder, expected, lengths):
    told = []
    program = BulkEncoder(encoder, 4, lengths)
    rows, length = program.encode(program.prepare(CAPTIONS), lambda *done: told.append(done))
    assert length == 20
    close(rows, expected)
    assert not len(rows[1]) and not len(rows[4])
    assert np.sum(told, 0).tolist() == [len(CAPTIONS), sum(map(len, expected))]
    compiled = program._program._cache_size()
    assert compiled <= 1 + sum(length < 20 for length in lengths)
    close(program(CAPTIONS[::-1])[0], expected[::-1])
    assert program._program._cache_size() == compiled


def test_nothing_but_blanks_is_not_encoded(encoder):
    program = BulkEncoder(encoder)
    rows, _ = program(["", " "])
    assert [row.shape for row in rows] == [(0, 32), (0, 32)] and program._program._cache_size() == 0


def test_batches_take_each_caption_once_and_waste_little():
    rng = np.random.default_rng(1)
    lengths = (16, 32, 64, 128)
    for count in (1, 7, 500, 4096):
        counts = np.sort(np.clip(rng.lognormal(2.9, 0.6, count), 1, 128).astype(int))
        found = list(batches(counts, lengths, 8))
        assert [batch.start for batch in found] == [0, *(batch.stop for batch in found[:-1])]
        assert found[-1].stop == count
        for batch in found:
            assert batch.rows * batch.length == 8 * 128 and 0 < batch.stop - batch.start <= batch.rows
            assert counts[batch.stop - 1] <= batch.length
    assert sum(batch.rows * batch.length for batch in found) < 1.5 * counts.sum()
    assert not list(batches(counts[:0], lengths, 8))


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_the_encoder_over_a_mesh(encoder, expected, fsdp):
    mesh = make_mesh(fsdp=fsdp)
    params = jax.device_put(encoder.params, shardings(encoder.params, mesh, ParamSharding(minimum=0)))
    kernel = params["encoder"]["block_0"]["feed_forward"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
    program = BulkEncoder(dataclasses.replace(encoder, params=params), 8, (8,), batch_sharding(mesh))
    close(program(CAPTIONS)[0], expected)


def test_a_split_encoder_is_never_whole_on_a_device():
    """Layers are gathered one after another: the memory beside the split parameters does not grow with their number."""
    mesh = make_mesh(fsdp=8)
    rows = batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((8, 4), bool, sharding=rows)
    extra = []
    for layers in (2, 8):
        config = dataclasses.replace(CONFIG, d_model=256, d_ff=512, layers=layers)
        shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, mask)["params"]
        size = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes["encoder"]["block_0"]))
        places = shardings(shapes, mesh, ParamSharding(minimum=1024))
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )
        program = jax.jit(
            functools.partial(bulk._embed, T5TextEncoder(config, {}, byte_tokenizer(), 4)), out_shardings=rows
        )
        compiled = program.lower(params, ids, mask).compile()
        assert re.search("all-gather|all-reduce", compiled.as_text())
        extra.append(compiled.memory_analysis().temp_size_in_bytes)
    assert extra[1] - extra[0] < size


def test_what_cannot_be_done_is_said(encoder):
    with pytest.raises(ValueError, match="batch 0"):
        BulkEncoder(encoder, 0)
    with pytest.raises(ValueError, match="lengths"):
        BulkEncoder(encoder, 4, (8, 0))
    with pytest.raises(ValueError, match="padding"):
        BulkEncoder(dataclasses.replace(encoder, padding_is_read=True))
    with pytest.warns(UserWarning, match="longer than 20 tokens"):
        rows, _ = BulkEncoder(encoder, 4, (8,))(["o" * 50])
    assert len(rows[0]) == 20

"""The embeddings command with a real, tiny T5."""

import jax
import numpy as np
import pytest

from experiments.text import embed
from jaxdiff.data import sources
from jaxdiff.data.embeddings import fingerprint, open_embeddings
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.t5 import encode
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.weights.t5 import export, load_text_encoder


@pytest.fixture
def encoder_dir(tmp_path):
    config = T5Config(vocab=384, d_model=16, d_kv=8, d_ff=16, layers=1, decoder_layers=0, heads=2)
    ids, rng = np.zeros((1, 8), np.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    export(config, params, tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_the_command_stores_what_the_encoder_says(tmp_path, encoder_dir, source, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, example in enumerate(source.examples[:3]):
        (photos / f"{i}.png").write_bytes(example["image"])
    (photos / "0.txt").write_text("a cat")
    (photos / "2.txt").write_text("two dogs")
    embed.main(f"folder:{photos}", str(encoder_dir), tmp_path / "text", length=12, batch=2)
    assert "3 embeddings of 12 × 16" in capsys.readouterr().out
    encoder = load_text_encoder(encoder_dir, 12)
    stored = open_embeddings(tmp_path / "text", fingerprint(encoder))
    pairs = [encode(encoder, texts) for texts in (["a cat", ""], ["two dogs", ""])]  # the size compiled already
    expected = jax.tree.map(lambda *parts: np.concatenate(parts), *pairs)
    for i in range(len(sources.open(sources.Folder(photos), 64, "train", ""))):
        text, mask, _ = stored[i]
        np.testing.assert_array_equal(mask, expected.mask[i])
        np.testing.assert_allclose(text, expected.embeddings[i], atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="use a new path"):
        embed.main(f"folder:{photos}", str(encoder_dir), tmp_path / "text", length=13)

"""min-dalle's files: written by PyTorch with names written here, and read without it."""

import json

import jax
import numpy as np
import pytest
import small_dalle_mini

from experiments import export
from experiments.exports.dalle import MinDalleSettings, convert_min_dalle
from jaxdiff.core.trees import flatten
from jaxdiff.weights import dalle_mini, flax_files, min_dalle

torch = pytest.importorskip("torch", reason="min-dalle's files are PyTorch's")


@pytest.fixture(scope="module")
def pipeline():
    return small_dalle_mini.pipeline()


def state_dicts(tensors):
    """The tensors of a folder of dalle-mini as min-dalle names them."""
    words = {
        "LayerNorm_0": "pre_self_attn_layer_norm",
        "LayerNorm_1": "self_attn_layer_norm",
        "LayerNorm_2": "pre_encoder_attn_layer_norm",
        "LayerNorm_3": "encoder_attn_layer_norm",
        "FlaxBartAttention_0": "self_attn",
        "FlaxBartAttention_1": "encoder_attn",
        "GLU_0": "glu",
    }
    inner = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}
    files = {"encoder": {}, "decoder": {}}

    def add(side, name, leaf, array):
        array = array.T if leaf == "kernel" else array
        leaf = "bias" if leaf == "bias" else "weight"
        files[side][f"{name}.{leaf}"] = torch.tensor(np.ascontiguousarray(array))

    for name, array in tensors.items():
        parts = name.split("/")
        if parts[0] == "lm_head":
            add("decoder", "lm_head", parts[-1], array)
        elif parts[2] != "layers":
            add(parts[1], parts[2], parts[-1], array)
        else:
            middle = [words[parts[4]], *(inner.get(part, part) for part in parts[5:-1])]
            for i, layer in enumerate(array):
                add(parts[1], ".".join(["layers", str(i), *middle]), parts[-1], layer)
    return files


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("min-dalle")
    dalle_mini.export(pipeline, folder / "flax")
    index = flax_files.read_index(folder / "flax" / flax_files.FILE)
    for side, state in state_dicts({name: tensor.read() for name, tensor in index.items()}).items():
        torch.save(state, folder / f"{side}.pt")
    model = json.loads((folder / "flax" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    return folder


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """Those of the small network, which the files do not say."""
    monkeypatch.setattr(min_dalle, "HEAD", 4)
    monkeypatch.setattr(min_dalle, "START", 13)


def test_converted(folder, pipeline, tmp_path):
    """The folder has the parameters, the settings and the tokens of the one that the files were made of."""
    files = (folder / name for name in ("encoder.pt", "decoder.pt", "vocab.json", "merges.txt"))
    convert_min_dalle(MinDalleSettings(*files, out=tmp_path / "out"))
    other = dalle_mini.load(tmp_path / "out", folder / "flax" / "vqgan")
    assert other.generator.model == pipeline.generator.model
    jax.tree.map(np.testing.assert_array_equal, other.generator.params, pipeline.generator.params)
    captions = ["a small red circle", "wörds", ""]
    ours, theirs = (each.text_encoder.encode(captions) for each in (other, pipeline))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    assert "min-dalle" in export.commands()


def test_older_forms(folder, pipeline, tmp_path):
    """Projections as 1×1 convolutions, and the ones of norms without a scale, in half precision."""
    for side in ("encoder", "decoder"):
        state = torch.load(folder / f"{side}.pt")
        state = {name: x[:, :, None, None] if "_proj" in name else x for name, x in state.items()}
        state |= {
            f"{name[:-4]}weight": torch.ones_like(x) for name, x in state.items() if name.endswith("bias")
        } | state
        torch.save({name: x.half() for name, x in state.items()}, tmp_path / f"{side}.pt")
    _, params = min_dalle.load(tmp_path / "encoder.pt", tmp_path / "decoder.pt")
    for name, leaf in flatten(params).items():
        np.testing.assert_allclose(leaf, flatten(pipeline.generator.params)[name], atol=1e-3)


def test_refused(folder, tmp_path):
    encoder, decoder = folder / "encoder.pt", folder / "decoder.pt"
    state = torch.load(encoder)
    for change, message in (
        ({"embed_tokens.weight": torch.zeros(5)}, "have no matrix encoder.embed_tokens.weight"),
        ({"layers.0.glu.fc0.weight": torch.zeros(9, 12)}, "of another shape"),
        ({"layers.0.glu.ln0.weight": torch.zeros(12)}, "unexpected"),
        ({"layers.7.glu.ln0.bias": torch.zeros(12)}, "missing"),
    ):
        torch.save(state | change, tmp_path / "encoder.pt")
        with pytest.raises(ValueError, match=message) as raised:
            min_dalle.load(tmp_path / "encoder.pt", decoder)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="22 unexpected"):
        min_dalle.load(decoder, encoder)
    network, _ = min_dalle.load(encoder, decoder)
    (tmp_path / "vocab.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a byte-pair tokenizer"):
        min_dalle.load_text(tmp_path / "vocab.json", folder / "merges.txt", network)
    with pytest.raises(FileNotFoundError):
        min_dalle.load_text(folder / "vocab.json", tmp_path / "merges.txt", network)

"""dalle-mini's layout: against PyTorch's layers by the published names, both forms of layers, the published sizes."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_dalle_mini
from flax import serialization

import jaxdiff
from jaxdiff.core.products import TokenSpec
from jaxdiff.core.trees import flatten
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.encoder_decoder import MEGA, MINI
from jaxdiff.systems.dalle import DALLE_MEGA, DALLE_MINI, SAMPLING_MINI
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.text.precomputed import embed_captions
from jaxdiff.weights import dalle_mini, flax_files, lazy, pretrained, vqgan
from jaxdiff.weights.pretrained import LoadOptions
from jaxdiff.weights.settings import from_json, to_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_dalle_mini.folder(tmp_path_factory.mktemp("dalle"))


@pytest.fixture(scope="module")
def loaded(folders):
    return dalle_mini.load(*folders)


def test_parity(folders, loaded):
    torch = pytest.importorskip("torch", reason="compared with PyTorch's layers")
    text = loaded.text_encoder.encode(["a small red circle", ""])
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 4, 4)))
    stored = flatten(serialization.msgpack_restore((folders[0] / flax_files.FILE).read_bytes()))
    wanted, read = small_dalle_mini.in_torch(torch, stored, text.ids, text.mask, codes)
    assert read == stored.keys()  # nothing is left over
    generator = loaded.generator
    logits = generator.model.network.module().apply({"params": generator.params}, text.ids, text.mask, codes)
    error = np.abs(np.asarray(logits.codes) - wanted[..., :12]).max() / np.abs(wanted).max()
    print(f"largest error {error:.1e} of the largest logit")
    assert error < 1e-5


def test_round_trip(folders, loaded, tmp_path):
    """All parts are read back; one folder with its decoder samples the same images."""
    wanted = small_dalle_mini.pipeline()
    assert loaded.generator.model == wanted.generator.model
    jax.tree.map(np.testing.assert_array_equal, loaded.generator.params, wanted.generator.params)
    assert loaded.generator.sampling == SAMPLING_MINI == TokenSampling(top_k=256, guidance=16.0)
    assert loaded.text_encoder.fingerprint == wanted.text_encoder.fingerprint == loaded.generator.text_fingerprint
    jaxdiff.save_pretrained(loaded, tmp_path / "again")
    again = jaxdiff.from_pretrained(tmp_path / "again")
    prompts, options = ["a Small, red circle!", "a large blue circle"], SampleOptions(seed=3, negative="green")
    results = [each.sample(prompts, options) for each in (wanted, loaded, again)]
    for codes, images in results:
        np.testing.assert_array_equal(codes, results[0][0])
        np.testing.assert_allclose(images, results[0][1], atol=1e-5)
    assert codes.shape == (2, 4, 4) and images.shape == (2, 8, 8, 3) and codes.dtype == np.int32
    again = jaxdiff.from_pretrained(tmp_path / "again", dtype="bfloat16")
    assert again.generator.params["head"]["kernel"].dtype == jnp.bfloat16
    assert pretrained.text_length(tmp_path / "again") == 8


@pytest.mark.parametrize("unit", [True, False])
def test_range_of_images(unit, loaded, tmp_path):
    """The published codes are those of images in [0, 1]; others say so."""
    decoder = replace(loaded.decoders[0], unit=unit)
    dalle_mini.export(replace(loaded, decoders=(decoder,)), tmp_path)
    assert dalle_mini.load(tmp_path).decoders[0].unit == unit
    assert ("image_range" in json.loads((tmp_path / "config.json").read_text())) != unit


def test_captions(folders, loaded):
    """They are simplified, end with </s>, and are cut with a warning; padding is masked; an empty one is start, end."""
    encoded = loaded.text_encoder.encode(["A Small-red circle!!", "a small red circle", ""])
    np.testing.assert_array_equal(encoded.ids[0], encoded.ids[1])
    assert encoded.ids[2].tolist() == [0, 2] + 6 * [1] and encoded.mask[2].tolist() == [True, True] + 6 * [False]
    with pytest.warns(UserWarning, match="longer than 8 tokens cut short; lost: 'large green circle'"):
        long = loaded.text_encoder.encode(["a small red circle a blue large green circle"])
    assert long.ids[0, -1] == 2 and long.mask.all()


def test_layers_one_by_one(folders, loaded, tmp_path):
    """The form without a loop over layers, and with float16."""
    shutil.copytree(folders[0], tmp_path / "plain")
    path = tmp_path / "plain" / flax_files.FILE
    tensors = flatten(serialization.msgpack_restore(path.read_bytes()))
    plain = {}
    for name, array in tensors.items():
        head, found, tail = name.partition("Layers/")
        plain |= {f"{head}Layer_{i}/{tail}": part for i, part in enumerate(array)} if found else {name: array}
    assert len(plain) > len(tensors)
    plain = {name: lazy.held(array) for name, array in plain.items()}
    flax_files.write(path, plain, "float16")
    other = dalle_mini.load(tmp_path / "plain", folders[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), other.generator.params, loaded.generator.params
    )
    flax_files.write(path, plain | {name: lazy.held(array) for name, array in tensors.items()})
    with pytest.raises(ValueError, match="layers stacked and one by one"):
        dalle_mini.load(tmp_path / "plain", folders[1])


def published(width, layers, feed_forward, vocab, entries):
    """Names and shapes of the published files."""
    d, f, n = width, feed_forward, layers
    shapes = {"lm_head/kernel": (d, entries)}
    for side, rows, positions, attentions in (("encoder", vocab, 64, 1), ("decoder", entries, 256, 2)):
        top, layer = f"model/{side}", f"model/{side}/layers/FlaxBart{side.title()}Layers"
        shapes |= {f"{top}/embed_tokens/embedding": (rows, d), f"{top}/embed_positions/embedding": (positions, d)}
        shapes |= {f"{top}/layernorm_embedding/{leaf}": (d,) for leaf in ("scale", "bias")}
        shapes |= {f"{top}/final_ln/bias": (d,)}
        for i in range(attentions):
            shapes |= {f"{layer}/LayerNorm_{2 * i}/bias": (n, d)}
            shapes |= {f"{layer}/LayerNorm_{2 * i + 1}/{leaf}": (n, d) for leaf in ("scale", "bias")}
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes[f"{layer}/FlaxBartAttention_{i}/{projection}/kernel"] = (n, d, d)
        shapes |= {f"{layer}/GLU_0/LayerNorm_0/bias": (n, d), f"{layer}/GLU_0/LayerNorm_1/bias": (n, f)}
        shapes |= {f"{layer}/GLU_0/Dense_{i}/kernel": (n, d, f) for i in (0, 1)}
        shapes |= {f"{layer}/GLU_0/Dense_2/kernel": (n, f, d)}
    return shapes


SETTINGS = {
    "mini": {"encoder_ffn_dim": 2730, "decoder_ffn_dim": 2730},
    "mega": {
        "d_model": 2048,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "encoder_attention_heads": 32,
        "decoder_attention_heads": 32,
        "encoder_vocab_size": 50272,
        "image_vocab_size": 16415,
        "decoder_start_token_id": 16384,
        "ln_positions": "normformer",
        "normalize_text": True,
        "pad_token_id": 16385,
    },
}


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [("mini", MINI, (1024, 12, 2730, 50264, 16385)), ("mega", MEGA, (2048, 24, 4096, 50272, 16416))],
)
def test_published(name, config, sizes, tmp_path):
    """The settings give the preset, and the preset all names and shapes; nothing is left over."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dallebart"} | SETTINGS[name]))
    assert dalle_mini.read_config(tmp_path / "config.json") == (config, name == "mega")
    shapes = jax.eval_shape(lambda: dalle_mini._init(config))
    leaves = {theirs: flatten(shapes)[ours] for ours, theirs in dalle_mini.key_map(shapes).items()}
    # Strides of zero: nothing is allocated.
    arrays = {theirs: np.broadcast_to(np.zeros((), "i1"), leaf.shape) for theirs, leaf in leaves.items()}
    counts = {}
    for theirs in arrays:
        match = dalle_mini.LAYER.fullmatch(theirs)
        key = theirs if match is None else f"{match[1]}s/{match[3]}"
        counts.setdefault(key, []).append(arrays[theirs].shape)
    ours = {key: value[0] if "Layers/" not in key else (len(value), *value[0]) for key, value in counts.items()}
    assert all(len(set(value)) == 1 for value in counts.values())
    assert ours == published(*sizes)


@pytest.mark.parametrize("model", [DALLE_MINI, DALLE_MEGA])
def test_settings_of_ours(model):
    """The presets, which fit their VQGAN, as JSON of a run."""
    assert from_json(json.loads(json.dumps(to_json(model))), "here") == model
    network, bottleneck = model.network, vqgan.IMAGENET_F16_16384.bottleneck
    assert model.product == TokenSpec(bottleneck.codes, vqgan.IMAGENET_F16_16384.stride)
    assert network.start == bottleneck.codes < network.entries and model.null == (0, 2)
    data = to_json(model)
    data["network"]["start"] = -1
    with pytest.raises(ValueError, match="start of EncoderDecoderConfig is -1"):
        from_json(data, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type = 't5' is not supported, only 'dallebart'"),
        ({"ln_positions": "swinv2"}, "ln_positions = 'swinv2'"),
        ({"use_glu": False}, "use_glu = False"),
        ({"force_ln_scale": True}, "force_ln_scale = True"),
        ({"decoder_ffn_dim": 11}, "decoder_ffn_dim = 11 is not supported, only 10"),
        ({"d_model": 13}, "d_model = 13"),
        ({"d_model": 24}, "of another shape"),
        ({"encoder_layers": 3}, "missing"),
        ({"decoder_layers": 2}, "unexpected"),
        ({"decoder_layers": 10**6}, "decoder_layers = 1000000"),
        ({"image_length": 15}, "image_length = 15 is not supported, only squares"),
        ({"image_vocab_size": 10}, "decoder_start_token_id = 13"),
        ({"encoder_vocab_size": 200}, "the embedding only 200"),
        ({"max_text_length": "8"}, "max_text_length = '8'"),
        ({"normalize_text": 1}, "normalize_text = 1"),
        ({"image_range": [0, 255]}, "image_range = "),
        ({"decoder_start_token_id": 9}, "12 codes, the transformer"),
    ],
)
def test_settings_refused(change, message, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "mini")
    path = tmp_path / "mini" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        dalle_mini.load(tmp_path / "mini", folders[1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", flax_files.FILE])
def test_missing_and_damaged_files(name, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "mini")
    (tmp_path / "mini" / name).write_bytes(b'{"a": 1}')
    with pytest.raises(ValueError, match=str(tmp_path / "mini")) as raised:
        dalle_mini.load(tmp_path / "mini", folders[1])
    assert "\n" not in str(raised.value)
    (tmp_path / "mini" / name).unlink()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "mini")):
        dalle_mini.load(tmp_path / "mini", folders[1])


def test_decoders_refused(folders, tmp_path):
    """None, or one with other codes."""
    with pytest.raises(ValueError, match="has no decoder of its codes: name the folder of its VQGAN"):
        pretrained.load(folders[0])
    other = replace(vqgan.load(folders[1]), side=16)
    vqgan.export(other, tmp_path / "other")
    with pytest.raises(ValueError, match="enlarges 8 pixels"):
        pretrained.load(folders[0], LoadOptions(vae=str(tmp_path / "other")))
    shutil.copytree(folders[0], tmp_path / "mini")
    tokenizer = json.loads((tmp_path / "mini" / "tokenizer.json").read_text())
    (tmp_path / "mini" / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(ValueError, match="an empty caption has no tokens"):
        dalle_mini.load_text(tmp_path / "mini")


def test_another_pipeline_is_not_written(loaded, tmp_path):
    for other, message in (
        (replace(loaded, text_encoder=embed_captions(loaded.text_encoder, ["a"])), "has no tokenizer"),
        (replace(loaded, decoders=()), "with one decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            dalle_mini.export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()

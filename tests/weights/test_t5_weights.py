"""T5 checkpoints: every layout in which they are published, every tensor accounted for, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.nets import t5 as nets
from jaxdiff.text.tokenizer import byte_tokenizer, train_tokenizer
from jaxdiff.weights import hub, t5

V1_1 = nets.T5Config(vocab=500, d_model=24, d_kv=8, d_ff=40, layers=2, decoder_layers=1, heads=2, max_distance=64)
V1_0 = replace(V1_1, gated=False, tied=True, scale_logits=True)
UMT5 = replace(V1_1, bias_per_layer=True, decoder_layers=2)
WITHOUT_TORCH = "transformers' T5 is PyTorch's"


def init(config):
    """Random parameters by numpy: nothing to compile."""
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    shapes = jax.eval_shape(nets.T5(config).init, jax.random.key(0), ids, mask, ids)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[0] ** -0.5, "f4"), shapes)


PARAMS = {}


@pytest.fixture(params=[V1_0, V1_1, UMT5], ids=["v1.0", "v1.1", "UMT5"])
def exported(request, tmp_path):
    config = request.param
    params = PARAMS.setdefault(config, init(config))
    t5.export(config, params, tmp_path)
    return config, params, tmp_path


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(directory, change):
    """Passes the tensors through `change` and saves what it returns."""
    tensors = dict(load_file(directory / "model.safetensors"))
    save_file(change(tensors), directory / "model.safetensors", {"format": "pt"})


def setting(directory, **values):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def shard(directory, count=3):
    """The one file as numbered shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::count]}, directory / file)
        index |= dict.fromkeys(names[i::count], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "model.safetensors").unlink()


def test_export_and_load_are_inverse(exported):
    config, params, directory = exported
    loaded_config, loaded = t5.load(directory)
    assert loaded_config == config
    equal(loaded, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_encoder_only(exported, tmp_path):
    config, params, directory = exported
    alone_config, alone = t5.load(directory, encoder_only=True)
    assert alone_config == replace(config, decoder_layers=0)
    equal(alone, nets.encoder_params(params))
    t5.export(config, alone, tmp_path / "alone")
    again_config, again = t5.load(tmp_path / "alone")
    assert again_config == alone_config
    equal(again, alone)
    assert not any(name.startswith(("decoder", "lm_head")) for name in load_file(tmp_path / "alone/model.safetensors"))


def test_shards(exported):
    _, params, directory = exported
    shard(directory)
    equal(t5.load(directory)[1], params)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        t5.load(directory)


def test_an_index_that_promises_too_much(exported):
    _, _, directory = exported
    shard(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["encoder.extra.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists 1 tensors that its shards lack \(encoder.extra.weight\)"):
        t5.load(directory)
    for text in ('{"weight_map": [1]}', "{}", '{"weight_map": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not an index of shards"):
            t5.load(directory)
    path.write_text('{"weight_map": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(ValueError, match=r"index\.json is not JSON with settings: it is nested too deeply"):
        t5.load(directory)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_files(exported, stored):
    config, params, directory = exported
    t5.export(config, params, directory, stored)
    equal(t5.load(directory)[1], jax.tree.map(lambda p: p.astype(stored).astype(jnp.float32), params))
    half_config, half = t5.load(directory, "bfloat16")
    assert half_config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, not int8"):
        t5.load(directory, "int8")


def test_tensors_go_where_they_are_told(exported):
    _, params, directory = exported
    placed = []
    _, loaded = t5.load(
        directory, place=lambda array: placed.append(array.shape) or jax.device_put(array, jax.devices()[-1])
    )
    assert len(placed) == len(jax.tree.leaves(params))
    assert {leaf.device for leaf in jax.tree.leaves(loaded)} == {jax.devices()[-1]}


def test_copies_of_the_embedding(exported):
    config, params, directory = exported

    def with_copies(tensors):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].copy()
        if config.tied:
            tensors["lm_head.weight"] = tensors["shared.weight"].copy()
            tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((32, 2), "f4")
        return tensors

    rewrite(directory, with_copies)
    loaded_config, loaded = t5.load(directory)
    assert loaded_config == config
    equal(loaded, params)
    rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if k != "shared.weight"})
    equal(t5.load(directory, encoder_only=True)[1], nets.encoder_params(params))
    rewrite(directory, lambda t: t | {"shared.weight": t["encoder.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight differs from shared.weight"):
        t5.load(directory)


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize("name", [*EMBEDDINGS, "lm_head.weight"])
def test_the_embedding_under_one_of_its_names(exported, name):
    """As transformers takes it: under that of either stack, or of an output layer that is the same."""
    config, params, directory = exported
    alone = name == "lm_head.weight"
    if alone and not config.tied:
        rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if k != "shared.weight"})
        with pytest.raises(ValueError, match=r"1 missing \(shared\.weight\)"):
            t5.load(directory)
        return
    rewrite(directory, lambda tensors: {name if k == "shared.weight" else k: v for k, v in tensors.items()})
    loaded_config, loaded = t5.load(directory)
    assert loaded_config == config
    equal(loaded, params)
    equal(t5.load(directory, encoder_only=True)[1], nets.encoder_params(params))
    if config is V1_0:
        assert_transformers_takes_it(directory, params)


def assert_transformers_takes_it(directory, params):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    theirs, report = transformers_class(directory).from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    for layer in (theirs.shared, theirs.encoder.embed_tokens, theirs.decoder.embed_tokens, theirs.lm_head):
        np.testing.assert_array_equal(layer.weight.detach().numpy(), params["shared"]["embedding"])


@pytest.mark.parametrize("exported", [V1_1], ids=["v1.1"], indirect=True)
def test_an_embedding_that_no_name_holds(exported):
    """Neither is the output layer of v1.1 taken for it, whatever transformers 5 has written into its settings."""
    _, _, directory = exported
    setting(directory, tie_word_embeddings=True, scale_decoder_outputs=False)
    rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if k != "shared.weight"})
    with pytest.raises(ValueError, match=r"1 missing \(shared\.weight\)"):
        t5.load(directory)


def test_copies_that_differ(exported):
    _, _, directory = exported
    for name in EMBEDDINGS[1:]:
        rewrite(directory, lambda tensors, name=name: tensors | {name: tensors["shared.weight"] + 1})
        with pytest.raises(ValueError, match=f"{name} differs from shared.weight, of which it should be a copy"):
            t5.load(directory)
        rewrite(directory, lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})


def test_transformers_5_calls_everything_tied(tmp_path):
    """It writes tie_word_embeddings = true for v1.1 too; the tensors say what is so."""
    params = PARAMS.setdefault(V1_1, init(V1_1))
    t5.export(V1_1, params, tmp_path)
    setting(tmp_path, tie_word_embeddings=True)
    config, loaded = t5.load(tmp_path)
    assert config == V1_1
    equal(loaded, params)


def test_older_configs_leave_out_what_is_usual(exported):
    config, _, directory = exported
    setting(directory, scale_decoder_outputs=..., relative_attention_max_distance=..., decoder_start_token_id=...)
    assert t5.load(directory)[0] == replace(config, max_distance=128)


def test_missing_extra_and_misshapen_tensors(exported):
    _, _, directory = exported
    final = "encoder.final_layer_norm.weight"

    def damage(tensors):
        tensors["encoder.block.7.layer.0.layer_norm.weight"] = tensors.pop(final)
        tensors["shared.weight"] = tensors["shared.weight"][:, :-1].copy()
        return tensors

    rewrite(directory, damage)
    with pytest.raises(ValueError) as error:
        t5.load(directory)
    message = str(error.value)
    assert str(directory) in message and "\n" not in message
    assert f"1 missing ({final})" in message
    assert "1 unexpected (encoder.block.7.layer.0.layer_norm.weight)" in message
    assert "1 of another shape (shared.weight (500, 23), not (500, 24))" in message


@pytest.mark.parametrize(
    "values, message",
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu' is not supported"),
        ({"model_type": "longt5"}, "model_type = 'longt5' is not supported, only 't5' or 'mt5' or 'umt5'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn = 'silu' is not supported"),
        ({"d_kv": ...}, "lacks the setting 'd_kv'"),
    ],
)
def test_unsupported_settings_are_named(exported, values, message):
    _, _, directory = exported
    setting(directory, **values)
    with pytest.raises(ValueError, match=message):
        t5.load(directory)


def test_no_checkpoint(tmp_path, exported):
    _, _, directory = exported
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        (tmp_path / "empty").mkdir()
        t5.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not a directory"):
        t5.load(tmp_path / "none")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        t5.load(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        t5.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON with settings"):
        t5.load(directory)


def test_a_hub_id_offline_is_one_line():
    with pytest.raises(ValueError, match="nobody/nothing is not a directory, and could not be downloaded") as error:
        t5.load("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_hub_id_with_its_revision(exported, monkeypatch, tmp_path):
    config, params, directory = exported
    asked, empty = [], tmp_path / "empty"
    empty.mkdir()

    def download(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision))
        return str(directory if revision else empty)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found, loaded = t5.load("some/t5@refs/pr/3")
    assert found == config
    equal(loaded, params)
    with pytest.raises(ValueError, match=r"some/t5 holds no safetensors.*some/t5@refs/pr/N"):
        t5.load("some/t5")
    assert set(asked) == {("some/t5", "refs/pr/3"), ("some/t5", None)}


def test_export_refuses_what_does_not_fit(tmp_path):
    params = PARAMS.setdefault(V1_1, init(V1_1))
    with pytest.raises(ValueError, match=r"the T5 to export does not fit .* missing"):
        t5.export(replace(V1_1, layers=3), params, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_tokenizer(["a red star", "a blue ring"] * 20, 450)])
@pytest.mark.parametrize("exported", [V1_0, V1_1], ids=["v1.0", "v1.1"], indirect=True)
def test_text_encoder(exported, make):
    config, params, directory = exported
    tokenizer = make()
    tokenizer.save_pretrained(directory)
    encoder = t5.load_text_encoder(directory, 10)
    assert (encoder.length, encoder.config) == (10, replace(config, decoder_layers=0))
    got = encoder.encode(["a ring", ""])
    ids = jnp.asarray([tokenizer("a ring")["input_ids"]], jnp.int32)
    expected = jax.jit(nets.T5Encoder(config).apply)({"params": nets.encoder_params(params)}, ids, ids > 0)
    np.testing.assert_allclose(got.tokens[0, : ids.shape[1]], expected[0], atol=1e-5)
    assert got.mask.sum(1).tolist() == [ids.shape[1], 0]


def test_a_tokenizer_too_large_for_the_embedding(tmp_path):
    config = replace(V1_1, vocab=100)
    t5.export(config, init(config), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 384 ids, the embedding only 100"):
        t5.load_text_encoder(tmp_path, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"text/config\.json is not JSON with settings"),
        pytest.param(
            "[" * 10**5 + "]" * 10**5, r"text/config\.json is not JSON .* it is nested too deeply", id="nested"
        ),
        ('{"model_type": "t5"}', r"text/config\.json lacks the setting 'vocab_size'"),
        (None, r"no T5 at .*text: config\.json is missing"),
        ({"model_type": "bert"}, r"text/config\.json: model_type = 'bert' is not supported"),
        ({"num_layers": 10**9}, r"text/config\.json: num_layers = 1000000000 is not supported"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["beside", "apart"])
def test_bad_settings_are_not_blamed_on_the_tokenizer(text, message, apart, tmp_path):
    """transformers reads config.json too, in search of the tokenizer's class."""
    directory = tmp_path / "text"
    t5.export(V1_1, PARAMS.setdefault(V1_1, init(V1_1)), directory)
    words = tmp_path / "words" if apart else directory
    byte_tokenizer().save_pretrained(words)
    path = directory / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | text) if isinstance(text, dict) else text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        t5.load_text_encoder(directory, 10, tokenizer=words)
    assert "tokenizer" not in str(error.value)


def words_without(*lacking):
    """A trained tokenizer that does not name its padding or its end."""
    words = train_tokenizer(["a red star", "a blue ring"] * 20, 450)
    for name in lacking:
        setattr(words, name, None)
    return words


@pytest.mark.parametrize("lacking", [("pad_token",), ("eos_token",), ("pad_token", "eos_token")], ids="+".join)
def test_a_tokenizer_without_padding_or_end(lacking, tmp_path):
    """The settings of the network say which they are: the same embeddings, and captions that are cut the same way."""
    t5.export(V1_1, PARAMS.setdefault(V1_1, init(V1_1)), tmp_path)
    captions, found = ["a red star", "a ring", "a blue ring a red star"], []
    for words in (words_without(), words_without(*lacking)):
        words.save_pretrained(tmp_path)
        encoder = t5.load_text_encoder(tmp_path, 5)
        assert (encoder.tokenizer.pad_token_id, encoder.tokenizer.eos_token_id) == (0, 1)
        with pytest.warns(UserWarning, match="prompt longer than 5 tokens cut short"):
            found.append(replace(encoder, padding_is_read=True).encode(captions).tokens)
    np.testing.assert_array_equal(*found)


def test_ids_beyond_the_embedding(tmp_path):
    """Of a word, found when the encoder is loaded; of a template's end, when a caption is encoded."""
    t5.export(V1_1, PARAMS.setdefault(V1_1, init(V1_1)), tmp_path)
    words_without().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    told = path.read_text()
    for beyond in (500, 2**31, 2**32 - 2):
        changed = json.loads(told)
        changed["post_processor"]["special_tokens"]["</s>"]["ids"] = [beyond]
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"the tokenizer gives the id {beyond}, the embedding has only 500"):
            t5.load_text_encoder(tmp_path, 5).encode(["a red star"])
        changed = json.loads(told)
        vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": beyond}
        changed["model"] = {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocabulary}
        changed["added_tokens"] = changed["added_tokens"][:3]
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"the tokenizer's 'red' has the id {beyond}, the embedding only 500"):
            t5.load_text_encoder(tmp_path, 5)


def transformers_class(directory):
    import transformers

    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def test_transformers_opens_what_is_exported(exported):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    config, params, directory = exported
    model, report = transformers_class(directory).from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = np.random.default_rng(0).integers(3, config.vocab, (2, 9), dtype=np.int32)
    mask = np.arange(9) < np.array([[9], [4]])
    said = np.pad(ids[:, :6], ((0, 0), (1, 0)))
    with torch.no_grad():
        expected = model.eval()(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(said)
        ).logits.numpy()
    got = jax.jit(nets.T5(config).apply)({"params": params}, ids, mask, said)
    assert np.abs(got - expected).max() <= 2e-5

    t5.export(config, nets.encoder_params(params), directory / "encoder")
    encoder = directory / "encoder"
    alone, report = transformers_class(encoder).from_pretrained(encoder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        expected = alone.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    got = jax.jit(nets.T5Encoder(config).apply)({"params": nets.encoder_params(params)}, ids, mask)
    assert np.abs(got - expected)[mask].max() <= 2e-5


def test_shards_of_transformers(exported, tmp_path):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    config, params, directory = exported
    model = transformers_class(directory).from_pretrained(directory)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    loaded_config, loaded = t5.load(tmp_path / "shards")
    assert loaded_config == config
    equal(loaded, params)


def test_a_lost_output_layer_is_not_taken_for_a_tied_one(tmp_path):
    config = replace(V1_1, tied=False)
    t5.export(config, init(config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\)"):
        t5.load(tmp_path)

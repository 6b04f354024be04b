"""T5's config.json: every setting that is wrong is named in one line, what may be left out may be null."""

import json

import pytest

from jaxdiff.nets.t5 import T5Config
from jaxdiff.weights import t5

VALUES = t5._hub_config(T5Config(layers=2, decoder_layers=2), "float32")
NAN, INFINITE = float("nan"), float("inf")
NO_SIZES = ["8", "", 8.0, 2.5, -8, True, False, [8], {"8": 8}, NAN, INFINITE, 10**30]
NO_STRINGS = ["silu", "", "a\nb", 3, 2.5, True, ["relu"], {"relu": True}, NAN]
BAD = {
    **{name: [*NO_SIZES, 0, None] for name in t5.REQUIRED.values()},
    "num_decoder_layers": [*NO_SIZES, 257],
    "num_layers": [*NO_SIZES, 0, 257, None],
    "relative_attention_num_buckets": [*NO_SIZES, 0, 3],
    "relative_attention_max_distance": [*NO_SIZES, 0, 16],
    "layer_norm_epsilon": ["1e-6", "", 0, 1, 0.0, 1.0, -1e-6, 1e30, True, [1e-6], {}, NAN, INFINITE],
    **{name: [*NO_SIZES, VALUES["vocab_size"]] for name in t5.IDS.values()},
    **{name: ["False", "", 0, 1, 0.5, [], {}, NAN] for name in ("tie_word_embeddings", "scale_decoder_outputs")},
    **dict.fromkeys(("feed_forward_proj", "dense_act_fn"), NO_STRINGS),
    "model_type": [*NO_STRINGS, None],
    "quantization_config": [{"bits": 4}, "int8", 4, True, []],
}


def written(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(VALUES | values))
    return path


def test_every_setting_that_is_read_is_swept():
    told = {"architectures", "is_encoder_decoder", "dropout_rate", "dtype"}
    assert set(VALUES) - told <= set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name, tmp_path):
    for value in BAD[name]:
        path = written(tmp_path, **{name: value})
        with pytest.raises(ValueError) as refused:
            t5.load(tmp_path)
        message = str(refused.value)
        assert message.startswith(f"{path}: {name} = {value!r} is not supported, only ") and "\n" not in message


def test_what_may_be_left_out_may_be_null(tmp_path):
    names = [*t5.OPTIONAL.values(), *t5.IDS.values(), "tie_word_embeddings", "scale_decoder_outputs"]
    names += ["feed_forward_proj", "dense_act_fn"]
    null = t5.read_config(written(tmp_path, **dict.fromkeys(names)))
    left = {name: value for name, value in VALUES.items() if name not in names}
    (tmp_path / "config.json").write_text(json.dumps(left))
    assert null == t5.read_config(tmp_path / "config.json")
    assert null == T5Config(layers=2, decoder_layers=2, gated=False, tied=True, scale_logits=True)


def test_the_furthest_values_that_are_right(tmp_path):
    values = {
        "vocab_size": 2**20,
        "pad_token_id": 2**20 - 1,
        "relative_attention_num_buckets": 4,
        "relative_attention_max_distance": 3,
        "num_layers": 256,
        "layer_norm_epsilon": 1e-30,
    }
    found = t5.read_config(written(tmp_path, **values))
    assert (found.vocab, found.pad_id, found.buckets, found.max_distance) == (2**20, 2**20 - 1, 4, 3)
    assert (found.layers, found.eps) == (256, 1e-30)


def test_no_decoder_where_there_is_one(tmp_path):
    from test_t5_weights import V1_1, init

    t5.export(V1_1, init(V1_1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_decoder_layers": 0}))
    with pytest.raises(ValueError, match=r"num_decoder_layers = 0 in config.json, but there is a decoder"):
        t5.load(tmp_path)
    assert t5.load(tmp_path, encoder_only=True)[0].decoder_layers == 0
